// Activations as the integer kernels take them.
#pragma once

#include <cstdint>

#include "panels.h"

namespace wicore {

// Rows of activations rounded to int8 with one scale per row and block of K: x = value * scale. A block whose largest
// magnitude is below 1e-30 counts as zero. Borrowed memory, see `bytes`.
struct QuantizedRows {
  int8_t* values;        // [rows, padded K], zero past K
  float* scales;         // [rows, blocks]
  int32_t* corrections;  // [rows, blocks], minus the middle of the weights' range times the sum of the block's values
  int64_t padded_k;
  int64_t blocks;

  static int64_t bytes(const Shape& shape, int64_t rows);
  QuantizedRows(const Shape& shape, int64_t rows, uint8_t* memory);

  // Fills row `row` from x [K].
  void fill(const Shape& shape, int64_t row, const float* x) const;
  // Fills one block of a row from its `count` values, at most a block.
  void fill_block(const Shape& shape, int64_t row, int64_t block, const float* x, int64_t count) const;
};

}  // namespace wicore
