// Python bindings of the CPU kernels: addresses and sizes, no torch headers, the GIL released while a kernel runs.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "attention_binding.h"
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
               Address rollout_baseline, Address advantages) {
  v05::cpu::shrinkage(at<T>(rewards), at<int64_t>(offsets), at<T>(prior), n, groups, budget, at<T>(floats),
                      at<int64_t>(integers), at<bool>(more), at<T>(rollout_baseline), at<T>(advantages));
}

template <class T>
void calibrated(const std::array<Address, 4>& in, int64_t n, int64_t groups, const v05::Budget<double>& budget,
                double decay, const std::array<Address, 8>& out) {
  v05::cpu::calibrated(v05::calibration_at<T>(in.data(), n, groups, budget, decay, out.data()));
}

template <class T>
void advantage(Address rewards, Address offsets, Address prior, Address lengths, int64_t n, int64_t groups,
               int baseline, int scale, double low, double high, double eps, Address out) {
  v05::cpu::advantage(at<T>(rewards), at<int64_t>(offsets), at<T>(prior), at<T>(lengths), n, groups,
                      v05::Baseline(baseline), v05::Scale(scale), low, high, eps, at<T>(out));
}

template <class T>
v05::LogprobRows<T> logprob_rows(Address logits, int64_t stride, int64_t count, int64_t vocabulary, Address targets,
                                 int64_t ignore_index, Address temperatures, double temperature) {
  return {at<T>(logits), stride, count, vocabulary, at<int64_t>(targets), ignore_index, at<double>(temperatures),
          temperature};
}

// Calls run with a value of the type that a code names: 0 float32, 1 float64, 2 bfloat16, 3 float16.
template <class Run>
auto with_dtype(int code, const Run& run) {
  switch (code) {
    case 0:
      return run(float{});
    case 1:
      return run(double{});
    case 2:
      return run(v05::cpu::BFloat16{});
    default:
      return run(v05::cpu::Float16{});
  }
}

// Address, and how many elements apart its rows and columns are.
using Operand = std::array<int64_t, 3>;

template <class T>
v05::cpu::Matrix<const T> operand(const Operand& given) {
  return {at<const T>(Address(given[0])), given[1], given[2], 0, 0};
}

template <class T>
void join_slices(const std::array<Address, 3>& fields, int64_t slices, int64_t rows, Address temperatures,
                 double temperature, Address joined) {
  v05::cpu::join_slices<T>({at<const T>(fields[0]), at<const T>(fields[1]), at<const T>(fields[2])}, slices, rows,
                           at<const double>(temperatures), temperature, at<T>(joined));
}

template <class T>
bool policy_loss(const std::array<Address, 8>& inputs, int64_t n, int64_t sequences, bool advantage_per_token,
                 const std::array<int, 4>& kinds, const std::array<double, 9>& numbers, Address loss, Address gradient,
                 Address metrics) {
  v05::PolicyNumbers<T> by{T(numbers[0]), T(numbers[1]), T(numbers[2]), T(numbers[3]), T(numbers[4]),
                           T(numbers[5]), T(numbers[6]), T(numbers[7]), T(numbers[8])};
  v05::PolicyInputs<T> in{at<T>(inputs[0]),
                          at<T>(inputs[1]),
                          at<T>(inputs[2]),
                          at<T>(inputs[3]),
                          at<T>(inputs[4]),
                          at<T>(inputs[5]),
                          at<uint8_t>(inputs[6]),
                          at<int64_t>(inputs[7]),
                          n,
                          sequences,
                          advantage_per_token,
                          kinds[1] != 0,
                          v05::Surrogate(kinds[0]),
                          v05::Kl(kinds[2]),
                          v05::Correction(kinds[3]),
                          by};
  return v05::cpu::policy_loss(in, at<T>(loss), at<T>(gradient), at<T>(metrics));
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
         Address rollout_baseline, Address advantages, bool wide) {
        (wide ? shrinkage<double> : shrinkage<float>)(rewards, offsets, prior, n, groups,
                                                      {low, high, cost, k_init, k_max}, floats, integers, more,
                                                      rollout_baseline, advantages);
      },
      Guard());

  m.def(
      "calibrated",
      [](const std::array<Address, 4>& in, int64_t n, int64_t groups, double low, double high, double cost,
         int64_t k_init, int64_t k_max, double decay, const std::array<Address, 8>& out, bool wide) {
        (wide ? calibrated<double> : calibrated<float>)(in, n, groups, {low, high, cost, k_init, k_max}, decay, out);
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

  m.def(
      "token_logprob",
      [](int dtype, Address logits, int64_t stride, int64_t count, int64_t vocabulary, Address targets,
         int64_t ignore_index, Address temperatures, double temperature, Address logprob, Address entropy, Address max,
         Address log_sum) {
        return with_dtype(dtype, [&](auto zero) {
          using T = decltype(zero);
          using Wide = v05::cpu::WideOf<T>;
          return v05::cpu::token_logprob<T>(
              logprob_rows<T>(logits, stride, count, vocabulary, targets, ignore_index, temperatures, temperature),
              {at<Wide>(logprob), at<Wide>(entropy), at<Wide>(max), at<Wide>(log_sum)});
        });
      },
      Guard());

  m.def(
      "token_logprob_backward",
      [](int dtype, Address logits, int64_t stride, int64_t count, int64_t vocabulary, Address targets,
         int64_t ignore_index, Address temperatures, double temperature, Address entropy, Address max, Address log_sum,
         Address grad_logprob, Address grad_entropy, Address grad_logits) {
        with_dtype(dtype, [&](auto zero) {
          using T = decltype(zero);
          using Wide = v05::cpu::WideOf<T>;
          v05::cpu::token_logprob_backward<T>(
              logprob_rows<T>(logits, stride, count, vocabulary, targets, ignore_index, temperatures, temperature),
              {nullptr, at<Wide>(entropy), at<Wide>(max), at<Wide>(log_sum)}, at<Wide>(grad_logprob),
              at<Wide>(grad_entropy), at<T>(grad_logits));
        });
      },
      Guard());

  m.def(
      "matrix_product",
      [](int dtype, bool wide_left, const Operand& left, const Operand& right, int64_t rows, int64_t columns,
         int64_t depth, Address out, int64_t stride, bool adds) {
        with_dtype(dtype, [&](auto zero) {
          using R = decltype(zero);
          using Wide = v05::cpu::WideOf<R>;
          v05::cpu::Matrix<Wide> to{at<Wide>(out), stride, 1, rows, columns};
          if (wide_left)
            v05::cpu::matrix_product<Wide, R>(operand<Wide>(left), operand<R>(right), depth, to, adds);
          else
            v05::cpu::matrix_product<R, R>(operand<R>(left), operand<R>(right), depth, to, adds);
        });
      },
      Guard());

  m.def(
      "join_slices",
      [](const std::array<Address, 3>& fields, int64_t slices, int64_t rows, Address temperatures, double temperature,
         Address joined, bool wide) {
        (wide ? join_slices<double> : join_slices<float>)(fields, slices, rows, temperatures, temperature, joined);
      },
      Guard());

  m.def(
      "policy_loss",
      [](const std::array<Address, 8>& inputs, int64_t n, int64_t sequences, bool advantage_per_token,
         const std::array<int, 4>& kinds, const std::array<double, 9>& numbers, Address loss, Address gradient,
         Address metrics, bool wide) {
        return (wide ? policy_loss<double> : policy_loss<float>)(inputs, n, sequences, advantage_per_token, kinds,
                                                                 numbers, loss, gradient, metrics);
      },
      Guard());

  m.def(
      "query_attention",
      [](int dtype, const std::array<Address, 13>& tensors, const std::array<int64_t, 6>& sizes, double eps,
         const std::array<Address, 4>& saved, Address features) {
        return with_dtype(dtype, [&](auto zero) {
          using T = decltype(zero);
          using Wide = v05::cpu::WideOf<T>;
          return v05::cpu::query_attention<T>(v05::attention_inputs<T, Wide>(tensors, sizes, eps),
                                              v05::attention_saved<Wide>(saved), at<Wide>(features));
        });
      },
      Guard());

  m.def(
      "query_attention_backward",
      [](int dtype, const std::array<Address, 13>& tensors, const std::array<int64_t, 6>& sizes, double eps,
         const std::array<Address, 4>& saved, Address grad_features, const std::array<Address, 12>& gradients) {
        with_dtype(dtype, [&](auto zero) {
          using T = decltype(zero);
          using Wide = v05::cpu::WideOf<T>;
          const auto wide = [&](int i) { return at<Wide>(gradients[static_cast<size_t>(i)]); };
          v05::cpu::query_attention_backward<T>(
              v05::attention_inputs<T, Wide>(tensors, sizes, eps), v05::attention_saved<const Wide>(saved),
              at<Wide>(grad_features), at<T>(gradients[0]), wide(1),
              {wide(2), wide(3), wide(4), wide(5), wide(6), wide(7), wide(8), wide(9), wide(10), wide(11)});
        });
      },
      Guard());
}
