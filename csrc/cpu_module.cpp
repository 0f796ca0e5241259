// Python bindings of the CPU kernels: addresses and sizes, no torch headers, the GIL released while a kernel runs.
#include <pybind11/pybind11.h>

#include "cpu/ops.h"

namespace py = pybind11;
using Address = std::uintptr_t;

namespace {

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

template <class T>
bool groups_valid(Address rewards, Address offsets, Address prior, int64_t n, int64_t groups, double low, double high) {
  return v05::cpu::groups_valid(at<T>(rewards), at<int64_t>(offsets), at<T>(prior), n, groups, low, high);
}

template <class T>
void shrinkage(Address rewards, Address offsets, Address prior, int64_t n, int64_t groups,
               const v05::Budget<double>& budget, Address floats, Address integers, Address more,
               Address rollout_baseline) {
  v05::cpu::shrinkage(at<T>(rewards), at<int64_t>(offsets), at<T>(prior), n, groups, budget, at<T>(floats),
                      at<int64_t>(integers), at<bool>(more), at<T>(rollout_baseline));
}

template <class T>
void advantage(Address rewards, Address offsets, Address prior, Address lengths, int64_t n, int64_t groups,
               int baseline, int scale, double low, double high, double eps, Address out) {
  v05::cpu::advantage(at<T>(rewards), at<int64_t>(offsets), at<T>(prior), at<T>(lengths), n, groups,
                      v05::Baseline(baseline), v05::Scale(scale), low, high, eps, at<T>(out));
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "CPU kernels of v05; each takes addresses of contiguous tensors, and a flag that says float64.";
  using Guard = py::call_guard<py::gil_scoped_release>;

  m.def(
      "groups_valid",
      [](Address rewards, Address offsets, Address prior, int64_t n, int64_t groups, double low, double high,
         bool wide) {
        return (wide ? groups_valid<double> : groups_valid<float>)(rewards, offsets, prior, n, groups, low, high);
      },
      Guard());

  m.def(
      "shrinkage",
      [](Address rewards, Address offsets, Address prior, int64_t n, int64_t groups, double low, double high,
         double cost, int64_t k_init, int64_t k_max, Address floats, Address integers, Address more,
         Address rollout_baseline, bool wide) {
        (wide ? shrinkage<double> : shrinkage<float>)(rewards, offsets, prior, n, groups,
                                                      {low, high, cost, k_init, k_max}, floats, integers, more,
                                                      rollout_baseline);
      },
      Guard());

  m.def(
      "advantage",
      [](Address rewards, Address offsets, Address prior, Address lengths, int64_t n, int64_t groups, int baseline,
         int scale, double low, double high, double eps, Address out, bool wide) {
        (wide ? advantage<double> : advantage<float>)(rewards, offsets, prior, lengths, n, groups, baseline, scale, low,
                                                      high, eps, out);
      },
      Guard());
}
