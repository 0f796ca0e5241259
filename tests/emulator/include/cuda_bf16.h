// bfloat16 on the processor, as csrc/cuda uses it.
#pragma once

#include "cpu/half.h"

struct __nv_bfloat16 {
  v05::cpu::BFloat16 of;

  __nv_bfloat16() = default;
  __nv_bfloat16(float x) { v05::cpu::narrow(x, &of); }
};

struct __nv_bfloat162 {
  __nv_bfloat16 x, y;
};

inline float __bfloat162float(__nv_bfloat16 x) { return v05::cpu::widen(x.of); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return x; }
inline float __low2float(__nv_bfloat162 pair) { return __bfloat162float(pair.x); }
inline float __high2float(__nv_bfloat162 pair) { return __bfloat162float(pair.y); }
inline __nv_bfloat162 __hmax2(__nv_bfloat162 a, __nv_bfloat162 b) {
  return {fmaxf(__low2float(a), __low2float(b)), fmaxf(__high2float(a), __high2float(b))};
}
