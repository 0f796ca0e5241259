// float16 on the processor, as csrc/cuda uses it.
#pragma once

#include "cpu/half.h"

struct __half {
  v05::cpu::Float16 of;

  __half() = default;
  __half(float x) { v05::cpu::narrow(x, &of); }
};

struct __half2 {
  __half x, y;
};

inline float __half2float(__half x) { return v05::cpu::widen(x.of); }
inline __half __float2half_rn(float x) { return x; }
inline float __low2float(__half2 pair) { return __half2float(pair.x); }
inline float __high2float(__half2 pair) { return __half2float(pair.y); }
inline __half2 __hmax2(__half2 a, __half2 b) {
  return {fmaxf(__low2float(a), __low2float(b)), fmaxf(__high2float(a), __high2float(b))};
}
