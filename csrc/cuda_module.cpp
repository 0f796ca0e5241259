// Python bindings of the CUDA kernels: device addresses, sizes and a stream; no torch headers. Importing needs no
// driver; a launch without one raises RuntimeError.
#include <pybind11/pybind11.h>

#include "cuda/ops.h"

namespace py = pybind11;
using Address = std::uintptr_t;

namespace {

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

template <class T>
void shrinkage(Address rewards, Address offsets, Address prior, int64_t groups, const v05::Budget<double>& budget,
               Address floats, Address integers, Address more, Address rollout_baseline, Address advantages,
               Address stream) {
  const v05::Budget<T> rule{T(budget.low), T(budget.high), T(budget.cost), budget.k_init, budget.k_max};
  v05::cuda::shrinkage(at<T>(rewards), at<int64_t>(offsets), at<T>(prior), groups, rule, at<T>(floats),
                       at<int64_t>(integers), at<bool>(more), at<T>(rollout_baseline), at<T>(advantages),
                       reinterpret_cast<cudaStream_t>(stream));
}

template <class T>
void advantage(Address rewards, Address offsets, Address prior, Address moments, int64_t groups, int baseline,
               int scale, double low, double high, double eps, Address out, Address stream) {
  v05::cuda::advantage(at<T>(rewards), at<int64_t>(offsets), at<T>(prior), at<T>(moments), groups,
                       v05::Baseline(baseline), v05::Scale(scale), T(low), T(high), T(eps), at<T>(out),
                       reinterpret_cast<cudaStream_t>(stream));
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA kernels of v05; each takes addresses of contiguous tensors, a stream, and a flag that says float64.";

  m.def("shrinkage", [](Address rewards, Address offsets, Address prior, int64_t groups, double low, double high,
                        double cost, int64_t k_init, int64_t k_max, Address floats, Address integers, Address more,
                        Address rollout_baseline, Address advantages, Address stream, bool wide) {
    (wide ? shrinkage<double> : shrinkage<float>)(rewards, offsets, prior, groups, {low, high, cost, k_init, k_max},
                                                  floats, integers, more, rollout_baseline, advantages, stream);
  });

  m.def("advantage", [](Address rewards, Address offsets, Address prior, Address moments, int64_t groups, int baseline,
                        int scale, double low, double high, double eps, Address out, Address stream, bool wide) {
    (wide ? advantage<double> : advantage<float>)(rewards, offsets, prior, moments, groups, baseline, scale, low, high,
                                                  eps, out, stream);
  });
}
