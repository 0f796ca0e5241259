// bfloat16 and float16 as bits: branch-free conversions that vectorise, exact to float and rounding to nearest even
// back.
#pragma once

#include "vector_math.h"

namespace v05::cpu {

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

V05_INLINE float widen(float x) { return x; }
V05_INLINE double widen(double x) { return x; }
V05_INLINE float widen(BFloat16 x) { return bits_of<float>(uint32_t(x.bits) << 16); }

// The exponent is moved by a multiplication by 2^112, which normalises subnormal numbers too.
V05_INLINE float widen(Float16 x) {
  uint32_t sign = uint32_t(x.bits & 0x8000) << 16, rest = uint32_t(x.bits & 0x7fff) << 13;
  uint32_t finite = bits_of<uint32_t>(bits_of<float>(rest) * 5.192296858534828e33f);
  return bits_of<float>((rest >= 0x0f800000 ? rest | 0x7f800000 : finite) | sign);
}

V05_INLINE void narrow(float x, float* out) { *out = x; }
V05_INLINE void narrow(double x, double* out) { *out = x; }

V05_INLINE void narrow(float x, BFloat16* out) {
  uint32_t bits = bits_of<uint32_t>(x), rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  out->bits = uint16_t(x != x ? 0x7fc0 : rounded);
}

// Below 2^-14 the addition of 1/2 rounds to a multiple of 2^-24; from 65520 up the result is inf.
V05_INLINE void narrow(float x, Float16* out) {
  uint32_t bits = bits_of<uint32_t>(x), sign = (bits >> 16) & 0x8000;
  uint32_t rest = bits & 0x7fffffff;
  float magnitude = bits_of<float>(rest);
  uint32_t normal = (rest - 0x38000000 + 0xfff + ((rest >> 13) & 1)) >> 13;
  uint32_t subnormal = bits_of<uint32_t>(magnitude + 0.5f) - 0x3f000000;
  uint32_t result = magnitude < 6.103515625e-05f ? subnormal : normal;
  result = magnitude >= 65520.0f ? 0x7c00 : result;
  result = x != x ? 0x7e00 : result;
  out->bits = uint16_t(result | sign);
}

}  // namespace v05::cpu
