// Python bindings of the CUDA kernels: device addresses, sizes and a stream; no torch headers. Importing needs no
// driver; a launch without one raises RuntimeError.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>

#include "attention_binding.h"
#include "cuda/ops.h"

namespace py = pybind11;
using Address = std::uintptr_t;

namespace {

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

// Calls body with a zero of the dtype: an index into DTYPES of v05/kernels/segments.py.
template <class Body>
void with_dtype(int dtype, const Body& body) {
  switch (dtype) {
    case 0:
      return body(float());
    case 1:
      return body(double());
    case 2:
      return body(__nv_bfloat16());
    case 3:
      return body(__half());
  }
  throw std::invalid_argument("dtype is not 0 to 3");
}

// ---- groups: the dtype is that of the rewards ----------------------------------------------------------------------
void shrinkage(Address rewards, Address offsets, Address prior, int64_t groups, double low, double high, double cost,
               int64_t k_init, int64_t k_max, Address floats, Address integers, Address more, Address rollout_baseline,
               Address advantages, Address stream, int dtype) {
  with_dtype(dtype, [&](auto zero) {
    using Reward = decltype(zero);
    using T = typename v05::cuda::WideOf<Reward>::type;
    v05::cuda::shrinkage(at<const Reward>(rewards), at<const int64_t>(offsets), at<const T>(prior), groups,
                         v05::Budget<T>{T(low), T(high), T(cost), k_init, k_max}, at<T>(floats), at<int64_t>(integers),
                         at<bool>(more), at<T>(rollout_baseline), at<T>(advantages),
                         reinterpret_cast<cudaStream_t>(stream));
  });
}

void calibrated(const std::array<Address, 4>& in, int64_t n, int64_t groups, double low, double high, double cost,
                int64_t k_init, int64_t k_max, double decay, const std::array<Address, 8>& out, Address stream,
                int dtype) {
  with_dtype(dtype, [&](auto zero) {
    using Reward = decltype(zero);
    using T = typename v05::cuda::WideOf<Reward>::type;
    const v05::Budget<double> budget{low, high, cost, k_init, k_max};
    v05::cuda::calibrated(v05::calibration_at<T, Reward>(in.data(), n, groups, budget, decay, out.data()),
                          reinterpret_cast<cudaStream_t>(stream));
  });
}

void batch_moments(Address rewards, Address lengths, int64_t n, double eps, Address partial, Address moments,
                   Address stream, int dtype) {
  with_dtype(dtype, [&](auto zero) {
    using Reward = decltype(zero);
    using T = typename v05::cuda::WideOf<Reward>::type;
    v05::cuda::batch_moments(at<const Reward>(rewards), at<const T>(lengths), n, eps, at<v05::cuda::Pool>(partial),
                             at<T>(moments), reinterpret_cast<cudaStream_t>(stream));
  });
}

void advantage(Address rewards, Address offsets, Address prior, Address lengths, Address moments, int64_t groups,
               int baseline, int scale, double low, double high, double eps, Address out, Address stream, int dtype) {
  with_dtype(dtype, [&](auto zero) {
    using Reward = decltype(zero);
    using T = typename v05::cuda::WideOf<Reward>::type;
    v05::cuda::advantage(at<const Reward>(rewards), at<const int64_t>(offsets), at<const T>(prior),
                         at<const T>(lengths), at<const T>(moments), groups, v05::Baseline(baseline), v05::Scale(scale),
                         T(low), T(high), T(eps), at<T>(out), reinterpret_cast<cudaStream_t>(stream));
  });
}

// logits, targets, temperatures; stride, count, vocabulary, ignore_index.
template <class T>
v05::LogprobRows<T> logprob_rows(const std::array<Address, 3>& tensors, const std::array<int64_t, 4>& sizes,
                                 double temperature) {
  return {at<T>(tensors[0]),      sizes[0],   sizes[1], sizes[2], at<int64_t>(tensors[1]), sizes[3],
          at<double>(tensors[2]), temperature};
}

// ---- query_attention -----------------------------------------------------------------------------------------------
void query_attention(int dtype, const std::array<Address, 13>& tensors, const std::array<int64_t, 6>& sizes, double eps,
                     const std::array<Address, 4>& saved, Address scratch, Address features, Address stream) {
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    using Wide = typename v05::cuda::WideOf<T>::type;
    v05::cuda::query_attention<T>(v05::attention_inputs<T, Wide>(tensors, sizes, eps),
                                  v05::attention_saved<Wide>(saved), at<Wide>(scratch), at<Wide>(features),
                                  reinterpret_cast<cudaStream_t>(stream));
  });
}

// gradients: of the states (0 where not wanted), the queries and each weight.
void query_attention_backward(int dtype, const std::array<Address, 13>& tensors, const std::array<int64_t, 6>& sizes,
                              double eps, const std::array<Address, 4>& saved, Address grad_features, Address scratch,
                              const std::array<Address, 12>& gradients, Address stream) {
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    using Wide = typename v05::cuda::WideOf<T>::type;
    const auto wide = [&](size_t i) { return at<Wide>(gradients[i]); };
    v05::cuda::query_attention_backward<T>(
        v05::attention_inputs<T, Wide>(tensors, sizes, eps), v05::attention_saved<const Wide>(saved),
        at<Wide>(grad_features), at<Wide>(scratch), at<T>(gradients[0]), wide(1),
        {wide(2), wide(3), wide(4), wide(5), wide(6), wide(7), wide(8), wide(9), wide(10), wide(11)},
        reinterpret_cast<cudaStream_t>(stream));
  });
}

void bind_query_attention(py::module_& m) {
  m.def("attention_scratch", &v05::cuda::attention_scratch);
  m.def("attention_backward_scratch", &v05::cuda::attention_backward_scratch);
  m.def("query_attention", &query_attention);
  m.def("query_attention_backward", &query_attention_backward);
}

template <class T>
void policy_loss(const std::array<Address, 8>& inputs, Address partial, int64_t n, int64_t sequences,
                 bool advantage_per_token, const std::array<int, 4>& kinds, const std::array<double, 9>& by,
                 Address gradient, Address loss, Address metrics, Address stream) {
  v05::PolicyInputs<T> in{};
  in.logprobs = at<T>(inputs[0]), in.old_logprobs = at<T>(inputs[1]), in.advantages = at<T>(inputs[2]);
  in.weights = at<T>(inputs[3]), in.ref_logprobs = at<T>(inputs[4]), in.sampler_logprobs = at<T>(inputs[5]);
  in.selected = at<uint8_t>(inputs[6]), in.offsets = at<int64_t>(inputs[7]);
  in.n = n, in.sequences = sequences, in.advantage_per_token = advantage_per_token;
  in.surrogate = v05::Surrogate(kinds[0]), in.sequence_level = kinds[1] != 0;
  in.kl = v05::Kl(kinds[2]), in.correction = v05::Correction(kinds[3]);
  in.numbers = {T(by[0]), T(by[1]), T(by[2]), T(by[3]), T(by[4]), T(by[5]), T(by[6]), T(by[7]), T(by[8])};
  v05::cuda::policy_loss(in, at<double>(partial), at<T>(gradient), at<T>(loss), at<T>(metrics),
                         reinterpret_cast<cudaStream_t>(stream));
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA kernels of v05; each takes addresses of contiguous tensors, a stream, and their dtype.";

  m.def("shrinkage", &shrinkage);
  m.def("calibrated", &calibrated);
  m.def("moment_blocks", &v05::cuda::moment_blocks);
  m.def("batch_moments", &batch_moments);
  m.def("advantage", &advantage);

  m.def("token_logprob", [](int dtype, const std::array<Address, 3>& tensors, const std::array<int64_t, 4>& sizes,
                            double temperature, const std::array<Address, 4>& outputs, Address stream) {
    with_dtype(dtype, [&](auto zero) {
      using T = decltype(zero);
      using Wide = typename v05::cuda::WideOf<T>::type;
      v05::cuda::token_logprob<T>(
          logprob_rows<T>(tensors, sizes, temperature),
          {at<Wide>(outputs[0]), at<Wide>(outputs[1]), at<Wide>(outputs[2]), at<Wide>(outputs[3])},
          reinterpret_cast<cudaStream_t>(stream));
    });
  });

  m.def("token_logprob_backward",
        [](int dtype, const std::array<Address, 3>& tensors, const std::array<int64_t, 4>& sizes, double temperature,
           const std::array<Address, 3>& saved, const std::array<Address, 2>& gradients, Address grad_logits,
           int64_t grad_stride, Address stream) {
          with_dtype(dtype, [&](auto zero) {
            using T = decltype(zero);
            using Wide = typename v05::cuda::WideOf<T>::type;
            v05::cuda::token_logprob_backward<T>(logprob_rows<T>(tensors, sizes, temperature),
                                                 {nullptr, at<Wide>(saved[0]), at<Wide>(saved[1]), at<Wide>(saved[2])},
                                                 at<Wide>(gradients[0]), at<Wide>(gradients[1]), at<T>(grad_logits),
                                                 grad_stride, reinterpret_cast<cudaStream_t>(stream));
          });
        });

  m.def("policy_blocks", &v05::cuda::policy_blocks);
  m.def("policy_loss",
        [](const std::array<Address, 8>& inputs, Address partial, int64_t n, int64_t sequences,
           bool advantage_per_token, const std::array<int, 4>& kinds, const std::array<double, 9>& numbers,
           Address gradient, Address loss, Address metrics, Address stream, bool wide) {
          (wide ? policy_loss<double> : policy_loss<float>)(inputs, partial, n, sequences, advantage_per_token, kinds,
                                                            numbers, gradient, loss, metrics, stream);
        });

  m.def("scale_unless_one", [](Address values, int64_t n, Address factor, Address stream, bool wide) {
    const auto on = reinterpret_cast<cudaStream_t>(stream);
    if (wide)
      v05::cuda::scale_unless_one(at<double>(values), n, at<double>(factor), on);
    else
      v05::cuda::scale_unless_one(at<float>(values), n, at<float>(factor), on);
  });

  bind_query_attention(m);
}
