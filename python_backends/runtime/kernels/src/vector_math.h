// Elementwise functions of 16 float32.
#pragma once

#include <immintrin.h>

namespace wicore {

// e^x to about 2 ulp; 0 below -104 and infinity above 89. Cody-Waite reduction and a Taylor polynomial of degree 7 on
// [-ln 2 / 2, ln 2 / 2].
inline __m512 exponential(__m512 x) {
  const __m512 power = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT);
  __m512 r = _mm512_fnmadd_ps(power, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fnmadd_ps(power, _mm512_set1_ps(-2.12194440e-4f), r);
  __m512 sum = _mm512_set1_ps(1.0f / 5040);
  for (const float coefficient : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) {
    sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(coefficient));
  }
  return _mm512_scalef_ps(sum, power);
}

// x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3))), as x / (1 + e^-2u) (arXiv 1606.08415, section 2).
inline __m512 gelu_tanh(__m512 x) {
  const __m512 cube = _mm512_mul_ps(_mm512_mul_ps(x, x), _mm512_set1_ps(0.044715f));
  const __m512 inner = _mm512_mul_ps(_mm512_fmadd_ps(cube, x, x), _mm512_set1_ps(-2 * 0.7978845608f));
  // Clipped, so that an infinite exponent makes 0 and not infinity minus infinity.
  const __m512 bounded = _mm512_max_ps(_mm512_min_ps(_mm512_set1_ps(88.0f), inner), _mm512_set1_ps(-104.0f));
  return _mm512_div_ps(x, _mm512_add_ps(_mm512_set1_ps(1.0f), exponential(bounded)));
}

}  // namespace wicore
