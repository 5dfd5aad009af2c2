// Masks for the ends of rows.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace wicore {

// The lanes of a vector of 16 that hold the next `left` elements.
inline __mmask16 lanes(int64_t left) {
  return left >= 16 ? 0xffff : left <= 0 ? 0 : static_cast<__mmask16>((1u << left) - 1);
}

}  // namespace wicore
