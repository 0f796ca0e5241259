// Tiles of a matrix product: strips of packed rows and columns, and the loop over their shared depth in registers.
//
// Every element is summed over the depth in one order, in the same pieces, whatever else is in the matrices, wherever
// in them it lies and whoever computes it: its bits depend on its row, its column and the processor alone.
#pragma once

#include <utility>

#include "half.h"
#include "ops.h"

#if V05_X86
#include <immintrin.h>
#endif

namespace v05::cpu {

constexpr int64_t kDepth = 256;      // elements of the shared dimension at a time
constexpr int64_t kRun = 64;         // of what is packed, summed up in registers
constexpr int64_t kTransposed = 16;  // rows packed together

typedef float FloatVector __attribute__((vector_size(64)));
typedef double DoubleVector __attribute__((vector_size(64)));
typedef uint32_t WordVector __attribute__((vector_size(64)));
template <class Wide>
using VectorOf = std::conditional_t<std::is_same_v<Wide, double>, DoubleVector, FloatVector>;

// What is packed: one wide number, or two bfloat16 that follow each other along the depth.
struct Pair {
  uint32_t bits;
};

V05_INLINE float as_float(float x) { return x; }
V05_INLINE float as_float(BFloat16 x) { return widen(x); }
V05_INLINE float as_float(Float16 x) { return widen(x); }
V05_INLINE float as_float(double x) { return float(x); }

V05_INLINE uint32_t bfloat16_bits(BFloat16 x) { return x.bits; }
template <class T>
V05_INLINE uint32_t bfloat16_bits(T x) {
  BFloat16 half;
  narrow(as_float(x), &half);
  return half.bits;
}

// The unit at depth k of a row whose elements are `stride` apart; `last` says that no element follows.
template <class T>
V05_INLINE void unit_at(const T* row, int64_t k, int64_t stride, bool, float* out) {
  *out = as_float(row[k * stride]);
}
V05_INLINE void unit_at(const double* row, int64_t k, int64_t stride, bool, double* out) { *out = row[k * stride]; }
template <class T>
V05_INLINE void unit_at(const T* row, int64_t k, int64_t stride, bool last, Pair* out) {
  uint32_t second = last ? 0 : bfloat16_bits(row[(2 * k + 1) * stride]);
  out->bits = bfloat16_bits(row[2 * k * stride]) | second << 16;
}

template <class Unit>
constexpr int64_t kPerUnit = std::is_same_v<Unit, Pair> ? 2 : 1;

#if V05_X86
// Words of two rows by their places, 16 and more being the second row's.
template <int... kPlace>
V05_INLINE void choose(const WordVector& a, const WordVector& b, std::integer_sequence<int, kPlace...>,
                       WordVector* out) {
#ifdef __clang__
  *out = __builtin_shufflevector(a, b, kPlace...);
#else
  *out = __builtin_shuffle(a, b, WordVector{kPlace...});
#endif
}

template <int kStep, int... kWord>
V05_INLINE void exchange(WordVector* rows, std::integer_sequence<int, kWord...>) {
  using FromFirst = std::integer_sequence<int, ((kWord & kStep) ? 16 + kWord - kStep : kWord)...>;
  using FromSecond = std::integer_sequence<int, ((kWord & kStep) ? 16 + kWord : kWord + kStep)...>;
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i)
    if (!(i & kStep)) {
      WordVector a = rows[i], b = rows[i + kStep];
      choose(a, b, FromFirst{}, rows + i);
      choose(a, b, FromSecond{}, rows + i + kStep);
    }
}

// Transposes 16 rows of 16 words by exchanging blocks of 8, 4, 2 and 1.
V05_INLINE void transpose(WordVector* rows) {
  constexpr std::make_integer_sequence<int, 16> kWords{};
  exchange<8>(rows, kWords);
  exchange<4>(rows, kWords);
  exchange<2>(rows, kWords);
  exchange<1>(rows, kWords);
}
#endif

// Packs one strip, `width` rows of `depth` elements, unit by unit along the depth; rows past `rows` are zero.
template <bool kShuffles, class T, class Unit>
V05_INLINE void pack_strip(const T* x, int64_t row_stride, int64_t stride, int64_t rows, int64_t depth, int64_t width,
                           Unit* out) {
  int64_t units = (depth + kPerUnit<Unit> - 1) / kPerUnit<Unit>;
  bool odd = units * kPerUnit<Unit> != depth;
  if (stride != 1 || rows < width) {
    for (int64_t k = 0; k < units; ++k) {
      bool last = odd && k == units - 1;
      for (int64_t r = 0; r < rows; ++r) unit_at(x + r * row_stride, k, stride, last, out + k * width + r);
      for (int64_t r = rows; r < width; ++r) out[k * width + r] = Unit{};
    }
    return;
  }
  alignas(64) Unit lines[kTransposed][kDepth];
  for (int64_t first = 0; first < width; first += kTransposed) {
    int64_t count = std::min(kTransposed, width - first);
    for (int64_t r = 0; r < count; ++r) {
      const T* row = x + (first + r) * row_stride;
      for (int64_t k = 0; k < units - odd; ++k) unit_at(row, k, 1, false, &lines[r][k]);
      if (odd) unit_at(row, units - 1, 1, true, &lines[r][units - 1]);
    }
    int64_t k = 0;
#if V05_X86
    if constexpr (kShuffles && sizeof(Unit) == 4)
      for (; k + 16 <= units; k += 16) {
        WordVector block[16] = {};
        for (int64_t r = 0; r < count; ++r) __builtin_memcpy(&block[r], &lines[r][k], 64);
        transpose(block);
        for (int64_t i = 0; i < 16; ++i) __builtin_memcpy(out + (k + i) * width + first, &block[i], size_t(count) * 4);
      }
#endif
    for (; k < units; ++k)
      for (int64_t r = 0; r < count; ++r) out[k * width + first + r] = lines[r][k];
  }
}

// Multiplies two strips in registers.
template <class W, int kStripRows, int kVectors>
struct WideTile {
  using Wide = W;
  using Unit = W;
  static constexpr int64_t kRows = kStripRows, kColumns = kVectors * 64 / sizeof(W);

  static V05_INLINE void run(const Unit* a, const Unit* b, int64_t units, Wide* out) {
    using Vector = VectorOf<Wide>;
    Vector sum[kStripRows][kVectors] = {};
    for (int64_t k = 0; k < units; ++k, a += kRows, b += kColumns) {
      Vector right[kVectors];
      __builtin_memcpy(right, b, sizeof right);
#pragma GCC unroll 16
      for (int r = 0; r < kStripRows; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) sum[r][v] += a[r] * right[v];
    }
    __builtin_memcpy(out, sum, sizeof sum);
  }
};

#if V05_X86
// The same for pairs of bfloat16, whose products are exact and are added in float32.
struct PairTile {
  using Wide = float;
  using Unit = Pair;
  static constexpr int64_t kRows = 12, kColumns = 32;

  __attribute__((target("avx512f,avx512bw,avx512bf16"), noinline)) static void run(const Pair* a, const Pair* b,
                                                                                   int64_t units, float* out) {
    __m512 sum[kRows][2];
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) sum[r][0] = sum[r][1] = _mm512_setzero_ps();
    for (int64_t k = 0; k < units; ++k, a += kRows, b += kColumns) {
      __m512bh left = (__m512bh)_mm512_loadu_si512(b), right = (__m512bh)_mm512_loadu_si512(b + 16);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        __m512bh scalar = (__m512bh)_mm512_set1_epi32(int(a[r].bits));
        sum[r][0] = _mm512_dpbf16_ps(sum[r][0], scalar, left);
        sum[r][1] = _mm512_dpbf16_ps(sum[r][1], scalar, right);
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      _mm512_storeu_ps(out + r * kColumns, sum[r][0]);
      _mm512_storeu_ps(out + r * kColumns + 16, sum[r][1]);
    }
  }
};

inline bool has_bfloat16() {
  static const bool has = has_avx512() && __builtin_cpu_supports("avx512bf16");
  return has;
}
#endif

}  // namespace v05::cpu
