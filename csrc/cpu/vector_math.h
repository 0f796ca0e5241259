// Branch-free maths that g++ and clang turn into vector code, and the choice of instruction set at run time.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#define V05_INLINE inline __attribute__((always_inline))

// Whether there are instruction sets to choose from; -DV05_X86=0 builds what other processors get.
#ifndef V05_X86
#if defined(__x86_64__) && defined(__GNUC__)
#define V05_X86 1
#else
#define V05_X86 0
#endif
#endif

// g++ prefers half as wide vectors unless told; clang has no such word in an attribute, and takes what types ask for.
#ifdef __clang__
#define V05_AVX512 "avx512f,avx512bw,avx512dq,avx512vl,fma"
#else
#define V05_AVX512 "avx512f,avx512bw,avx512dq,avx512vl,fma,prefer-vector-width=512"
#endif

namespace v05::cpu {

template <class To, class From>
V05_INLINE To bits_of(From value) {
  static_assert(sizeof(To) == sizeof(From), "the same bits in another type");
  To bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  return bits;
}

// e^x within 1 ulp for x in [-87.33, 88.72], where the result is a normal number; anything elsewhere.
// x = n ln2 + r with |r| <= ln2 / 2; e^r is a polynomial and n is added to its exponent.
V05_INLINE float exp_normal(float x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  float shifted = x * 1.44269504f + kRound;
  float n = shifted - kRound;
  float r = x - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  float p = 1.38145406e-3f;  // minimax for (e^r - 1 - r) / r^2, weighted to the relative error of e^r: 3.1e-9
  p = p * r + 8.36874545e-3f;
  p = p * r + 4.1668389e-2f;
  p = p * r + 1.66665211e-1f;
  p = p * r + 4.9999994e-1f;
  p = p * (r * r) + r + 1.0f;
  return bits_of<float>(bits_of<uint32_t>(p) + (bits_of<uint32_t>(shifted) << 23));
}

// e^x for every x: 0 where the result is below the normal numbers, so e^-inf = 0; inf above 88.72; NaN stays NaN.
V05_INLINE float exp_fast(float x) {
  float result = exp_normal(x);
  result = x < -87.33654f ? 0.0f : result;
  result = x > 88.72283f ? std::numeric_limits<float>::infinity() : result;
  return x != x ? x : result;
}

// x, or 0. A mask, because g++ turns a choice whose result is compared again into branches, which do not vectorise.
V05_INLINE float zero_unless(bool keep, float x) { return bits_of<float>(bits_of<uint32_t>(x) & -uint32_t(keep)); }
V05_INLINE double zero_unless(bool keep, double x) { return bits_of<double>(bits_of<uint64_t>(x) & -uint64_t(keep)); }

// x, or 1; a mask again.
V05_INLINE float one_unless(bool keep, float x) {
  return bits_of<float>((bits_of<uint32_t>(x) & -uint32_t(keep)) | (bits_of<uint32_t>(1.0f) & ~-uint32_t(keep)));
}
V05_INLINE double one_unless(bool keep, double x) {
  return bits_of<double>((bits_of<uint64_t>(x) & -uint64_t(keep)) | (bits_of<uint64_t>(1.0) & ~-uint64_t(keep)));
}

constexpr float kNegligible = -87.33f;

// e^x for x <= 0, give or take rounding; 0 up to kNegligible, where it leaves the normal numbers.
V05_INLINE float exp_negative(float x) { return zero_unless(x > kNegligible, exp_normal(x)); }
V05_INLINE double exp_negative(double x) { return zero_unless(x > kNegligible, std::exp(x)); }

V05_INLINE double exp_fast(double x) { return std::exp(x); }

// Kernel is a struct with `static V05_INLINE void run(args...)`, by value, that calls only V05_INLINE functions: its
// body is compiled once per instruction set, and vectorised<Kernel>(args...) runs the best one that the processor has.
// Call it per thread, inside parallel_for: a target does not reach into an OpenMP region.
#if V05_X86
template <class Kernel, class... Args>
__attribute__((target(V05_AVX512), noinline)) void run_avx512(Args... args) {
  Kernel::run(args...);
}

template <class Kernel, class... Args>
__attribute__((target("avx2,fma"), noinline)) void run_avx2(Args... args) {
  Kernel::run(args...);
}

inline bool has_avx2() {
  static const bool has = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  return has;
}

inline bool has_avx512() {
  static const bool has = has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return has;
}
#endif

template <class Kernel, class... Args>
void vectorised(Args... args) {
#if V05_X86
  if (has_avx512()) return run_avx512<Kernel>(args...);
  if (has_avx2()) return run_avx2<Kernel>(args...);
#endif
  Kernel::run(args...);
}

}  // namespace v05::cpu
