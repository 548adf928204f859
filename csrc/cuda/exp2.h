// Pairs of exponentials: on the special-function unit, or as polynomials on the FMA pipes where
// that unit would be the limit (benchmarks/NOTES.md).
#pragma once

#include "cuda/device.h"

namespace pear::cuda {

constexpr float kLog2e = 1.44269504088896341f;

__device__ __forceinline__ float2 both(float x) { return {x, x}; }

__device__ __forceinline__ float2 exp2_approx(float2 x) {
  return {exp2_approx(x.x), exp2_approx(x.y)};
}

// For x <= 127; 0 below the smallest normal; a NaN stays one. The nearest integer is split off, and
// the polynomial of csrc/cpu/logprob_kernel.inl takes the rest: relative error 9.2e-8, 2^0 = 1.
__device__ __forceinline__ float2 exp2_polynomial(float2 x) {
  x = {x.x < -127.0f ? -127.0f : x.x, x.y < -127.0f ? -127.0f : x.y};
  // Adding 1.5 * 2^23 leaves the nearest integer in the low bits, here plus the bias of exponents.
  constexpr float shift = 12582912.0f + 127.0f;
  const float2 shifted = add(x, both(shift)), whole = add(shifted, both(-shift));
  const float2 r = add(x, {-whole.x, -whole.y});
  float2 p = both(1.32647273e-3f);
  p = multiply_add(p, r, both(9.67151299e-3f));
  p = multiply_add(p, r, both(5.55073358e-2f));
  p = multiply_add(p, r, both(2.40222424e-1f));
  p = multiply_add(p, r, both(6.93147004e-1f));
  p = multiply_add(p, r, both(1.0f));
  return multiply(p, {__uint_as_float(__float_as_uint(shifted.x) << 23),
                      __uint_as_float(__float_as_uint(shifted.y) << 23)});
}

// The i-th of a thread's pairs: where there are polynomials, every eighth is one.
__device__ __forceinline__ float2 exp2_pair(float2 x, int i) {
  return kPolynomialExponentials && i % 8 == 0 ? exp2_polynomial(x) : exp2_approx(x);
}

}  // namespace pear::cuda
