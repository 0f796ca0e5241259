#pragma once

#include "half_types.h"

using __half = emulated::Half<v05::cpu::Float16>;
using __half2 = emulated::Pair<v05::cpu::Float16>;

inline float __half2float(__half x) { return x.wide(); }
inline __half __float2half_rn(float x) { return x; }
