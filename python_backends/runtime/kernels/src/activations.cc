#include "activations.h"

#include <algorithm>
#include <limits>

#include "vectors.h"

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
  const int64_t vectors = shape.block / kLanes;
  int8_t* to = values + row * padded_k + block * shape.block;
  Floats piece[kMaxBlock / kLanes];
  Floats largest = zeros();
  bool broken = false;  // NaN and infinities, which make the whole block NaN
  for (int64_t i = 0; i < vectors; ++i) {
    piece[i] = load(x + i * kLanes, lanes(count - i * kLanes));
    largest = larger(largest, absolute(piece[i]));
    broken |= any_not_finite(piece[i]);
  }
  const float top = largest_of(largest);
  const bool dead = broken || top < kSmallest;
  const Floats inverse = splat(dead ? 0.0f : 127.0f / top);
  Integers sum = no_integers();
  for (int64_t i = 0; i < vectors; ++i) {
    const Integers rounded = broken ? sum : to_integers(mul(piece[i], inverse));
    sum = add(sum, rounded);
    store_int8(to + i * kLanes, rounded);
  }
  scales[row * blocks + block] = broken ? std::numeric_limits<float>::quiet_NaN() : dead ? 0.0f : top / 127.0f;
  corrections[row * blocks + block] = -shape.middle() * sum_of(sum);
}

}  // namespace wicore
