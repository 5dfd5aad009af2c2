// The float32 half of the integer kernels, shared so that they agree bit for bit.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "panels.h"

namespace wicore {

struct PanelScales {
  __m512 low, high;  // columns 0-15 and 16-31 of one block

  explicit PanelScales(const uint8_t* line)
      : low(_mm512_cvtph_ps(_mm256_load_si256(reinterpret_cast<const __m256i*>(line)))),
        high(_mm512_cvtph_ps(_mm256_load_si256(reinterpret_cast<const __m256i*>(line + kLine / 2)))) {}
};

// sum + dot * (scale * activation_scale)
inline __m512 add_block(__m512 sum, __m512i dot, __m512 scale, __m512 activation_scale) {
  return _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), _mm512_mul_ps(scale, activation_scale), sum);
}

// What the sum of q * x lacks to be the sum of (q - zero point) * x: `correction` is minus middle * sum of x.
inline __m512i zero_point_correction(int32_t correction, int32_t middle, const uint8_t* zero_points) {
  const __m512i zeros = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(zero_points)));
  return _mm512_mullo_epi32(zeros, _mm512_set1_epi32(correction / middle));
}

}  // namespace wicore
