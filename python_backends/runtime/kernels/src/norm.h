// Root mean square norms (arXiv 1910.07467).
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>

#include "lanes.h"

namespace wicore {

// 1 / root mean square of x [width].
inline float inverse_rms(const float* x, int64_t width, float epsilon) {
  __m512 sum = _mm512_setzero_ps();
  for (int64_t i = 0; i < width; i += 16) {
    const __m512 piece = _mm512_maskz_loadu_ps(lanes(width - i), x + i);
    sum = _mm512_fmadd_ps(piece, piece, sum);
  }
  return 1.0f / std::sqrt(_mm512_reduce_add_ps(sum) / static_cast<float>(width) + epsilon);
}

}  // namespace wicore
