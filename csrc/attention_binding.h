// What both Python modules do with the arguments of query_attention.
#pragma once

#include <array>
#include <cstdint>

#include "inputs.h"

namespace v05 {

// From addresses of states, offsets, queries and weights, and stride, tokens, size, prompts, count, heads.
template <class T, class Wide>
AttentionInputs<T, Wide> attention_inputs(const std::array<std::uintptr_t, 13>& tensors,
                                          const std::array<int64_t, 6>& sizes, double eps) {
  const auto wide = [&](size_t i) { return reinterpret_cast<const Wide*>(tensors[i]); };
  AttentionInputs<T, Wide> in{};
  in.states = reinterpret_cast<const T*>(tensors[0]);
  in.offsets = reinterpret_cast<const int64_t*>(tensors[1]);
  in.queries = wide(2);
  in.stride = sizes[0], in.tokens = sizes[1], in.size = sizes[2], in.prompts = sizes[3], in.count = sizes[4];
  in.heads = int(sizes[5]), in.eps = Wide(eps);
  in.weights = {wide(3), wide(4), wide(5), wide(6), wide(7), wide(8), wide(9), wide(10), wide(11), wide(12)};
  return in;
}

template <class Wide>
AttentionSaved<Wide> attention_saved(const std::array<std::uintptr_t, 4>& saved) {
  const auto wide = [&](size_t i) { return reinterpret_cast<Wide*>(saved[i]); };
  return {wide(0), wide(1), wide(2), wide(3)};
}

}  // namespace v05
