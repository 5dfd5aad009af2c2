// Sixteen float32 at a time: one register of AVX-512, or two of AVX2. What a file computes with them is written once and
// compiled for either.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <initializer_list>

#ifdef __AVX512F__
#include "avx512/vectors.h"
#else
#include "avx2/vectors.h"
#endif

namespace wicore {

constexpr int64_t kLanes = 16;

// 2^x for x in [-126, 126], to 3e-7 of its value: the fraction's Taylor polynomial of degree 6 on [-1/2, 1/2], and the
// whole part in the exponent.
inline Floats power_of_two(Floats x) {
  const Floats whole = nearest(x);
  const Floats part = sub(x, whole);
  Floats sum = splat(1.54035304e-4f);  // ln(2)^6 / 6!
  for (const float coefficient : {1.33335581e-3f, 9.61812911e-3f, 5.55041087e-2f, 2.40226507e-1f, 6.93147181e-1f, 1.0f}) {
    sum = fmadd(sum, part, splat(coefficient));
  }
  return scale_by_power(sum, whole);
}

// x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3))) (arXiv 1606.08415, section 2), as x / (1 + e^-2u).
inline Floats gelu_tanh(Floats x) {
  constexpr float kLinear = -2.302208198f, kCubic = -0.102943240f;  // -2 sqrt(2 / pi) / ln 2, and 0.044715 of it
  const Floats slope = fmadd(mul(x, x), splat(kCubic), splat(kLinear));
  const Floats exponent = mul(x, slope);
  const Floats bounded = larger(smaller(splat(120.0f), exponent), splat(-120.0f));  // of NaN, too, NaN is left
  return mul(x, reciprocal(add(splat(1.0f), power_of_two(bounded))));
}

}  // namespace wicore
