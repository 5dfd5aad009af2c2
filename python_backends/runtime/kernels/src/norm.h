// Root mean square norms (arXiv 1910.07467).
#pragma once

#include <cmath>
#include <cstdint>

#include "vectors.h"

namespace wicore {

// 1 / root mean square of x [width].
inline float inverse_rms(const float* x, int64_t width, float epsilon) {
  Floats sum = zeros();
  for (int64_t i = 0; i < width; i += kLanes) {
    const Floats piece = load(x + i, lanes(width - i));
    sum = fmadd(piece, piece, sum);
  }
  return 1.0f / std::sqrt(sum_of(sum) / static_cast<float>(width) + epsilon);
}

}  // namespace wicore
