#include "activations.h"

#include <immintrin.h>

#include <algorithm>
#include <limits>

#include "lanes.h"

namespace wicore {
namespace {

constexpr float kSmallest = 1e-30f;  // the reciprocal of anything below would overflow

int64_t aligned(int64_t bytes) { return (bytes + kLine - 1) / kLine * kLine; }

}  // namespace

int64_t QuantizedRows::bytes(const Shape& shape, int64_t rows) {
  return aligned(rows * shape.padded_k()) + 2 * aligned(rows * shape.blocks() * 4);
}

QuantizedRows::QuantizedRows(const Shape& shape, int64_t rows, uint8_t* memory)
    : padded_k(shape.padded_k()), blocks(shape.blocks()) {
  values = reinterpret_cast<int8_t*>(memory);
  memory += aligned(rows * padded_k);
  scales = reinterpret_cast<float*>(memory);
  corrections = reinterpret_cast<int32_t*>(memory + aligned(rows * blocks * 4));
}

void QuantizedRows::fill(const Shape& shape, int64_t row, const float* x) const {
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t start = block * shape.block;
    fill_block(shape, row, block, x + start, std::min(shape.block, shape.k - start));
  }
}

void QuantizedRows::fill_block(const Shape& shape, int64_t row, int64_t block, const float* x, int64_t count) const {
  const int64_t vectors = shape.block / 16;
  int8_t* to = values + row * padded_k + block * shape.block;
  __m512 piece[kMaxBlock / 16];
  __m512 largest = _mm512_setzero_ps();
  __mmask16 broken = 0;  // NaN and infinities, which make the whole block NaN
  for (int64_t i = 0; i < vectors; ++i) {
    piece[i] = _mm512_maskz_loadu_ps(lanes(count - i * 16), x + i * 16);
    largest = _mm512_max_ps(largest, _mm512_abs_ps(piece[i]));
    broken |= _mm512_fpclass_ps_mask(piece[i], 0x99);
  }
  const float top = _mm512_reduce_max_ps(largest);
  const bool dead = broken || top < kSmallest;
  const __m512 inverse = _mm512_set1_ps(dead ? 0.0f : 127.0f / top);
  __m512i sum = _mm512_setzero_si512();
  for (int64_t i = 0; i < vectors; ++i) {
    const __m512i rounded = broken ? sum : _mm512_cvtps_epi32(_mm512_mul_ps(piece[i], inverse));
    sum = _mm512_add_epi32(sum, rounded);
    _mm_store_si128(reinterpret_cast<__m128i*>(to + i * 16), _mm512_cvtsepi32_epi8(rounded));
  }
  scales[row * blocks + block] = broken ? std::numeric_limits<float>::quiet_NaN() : dead ? 0.0f : top / 127.0f;
  corrections[row * blocks + block] = -shape.middle() * _mm512_reduce_add_epi32(sum);
}

}  // namespace wicore
