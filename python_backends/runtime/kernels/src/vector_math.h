// Elementwise functions of 16 float32.
#pragma once

#include <immintrin.h>

namespace wicore {

// 2^x for x in [-126, 126], to 3e-7 of its value: the fraction's Taylor polynomial of degree 6 on [-1/2, 1/2], and the
// whole part in the exponent.
inline __m512 power_of_two(__m512 x) {
  const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT);
  const __m512 part = _mm512_sub_ps(x, whole);
  __m512 sum = _mm512_set1_ps(1.54035304e-4f);  // ln(2)^6 / 6!
  for (const float coefficient : {1.33335581e-3f, 9.61812911e-3f, 5.55041087e-2f, 2.40226507e-1f, 6.93147181e-1f, 1.0f}) {
    sum = _mm512_fmadd_ps(sum, part, _mm512_set1_ps(coefficient));
  }
  return _mm512_scalef_ps(sum, whole);
}

// 1 / x to about 1e-7 of its value: 14 bits of the instruction and a step of Newton's method. x is at least 2^-126 and at
// most 2^126.
inline __m512 reciprocal(__m512 x) {
  const __m512 guess = _mm512_rcp14_ps(x);
  return _mm512_mul_ps(guess, _mm512_fnmadd_ps(x, guess, _mm512_set1_ps(2.0f)));
}

// x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3))) (arXiv 1606.08415, section 2), as x / (1 + e^-2u).
inline __m512 gelu_tanh(__m512 x) {
  constexpr float kLinear = -2.302208198f, kCubic = -0.102943240f;  // -2 sqrt(2 / pi) / ln 2, and 0.044715 of it
  const __m512 slope = _mm512_fmadd_ps(_mm512_mul_ps(x, x), _mm512_set1_ps(kCubic), _mm512_set1_ps(kLinear));
  const __m512 exponent = _mm512_mul_ps(x, slope);
  const __m512 bounded =
      _mm512_max_ps(_mm512_min_ps(_mm512_set1_ps(120.0f), exponent), _mm512_set1_ps(-120.0f));  // of NaN, too, NaN is left
  return _mm512_mul_ps(x, reciprocal(_mm512_add_ps(_mm512_set1_ps(1.0f), power_of_two(bounded))));
}

}  // namespace wicore
