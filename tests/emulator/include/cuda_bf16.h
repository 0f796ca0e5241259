#pragma once

#include "half_types.h"

using __nv_bfloat16 = emulated::Half<v05::cpu::BFloat16>;
using __nv_bfloat162 = emulated::Pair<v05::cpu::BFloat16>;

inline float __bfloat162float(__nv_bfloat16 x) { return x.wide(); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return x; }
