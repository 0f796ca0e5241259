// A number of 16 bits and a pair of them, as csrc/cuda uses CUDA's.
#pragma once

#include <math.h>

#include "cpu/half.h"

namespace emulated {

template <class Bits>
struct Half {
  Bits of;

  Half() = default;
  Half(float x) { v05::cpu::narrow(x, &of); }
  float wide() const { return v05::cpu::widen(of); }
};

template <class Bits>
struct Pair {
  Half<Bits> x, y;
};

template <class Bits>
float __low2float(Pair<Bits> pair) {
  return pair.x.wide();
}

template <class Bits>
float __high2float(Pair<Bits> pair) {
  return pair.y.wide();
}

template <class Bits>
Pair<Bits> __hmax2(Pair<Bits> a, Pair<Bits> b) {
  return {fmaxf(a.x.wide(), b.x.wide()), fmaxf(a.y.wide(), b.y.wide())};
}

}  // namespace emulated
