// Products of many rows with a packed matrix, for prompts and images: both factors as bfloat16 in AMX tiles, sums in
// float32. Activations are rounded to 8 bits of mantissa, weights after their scale was applied.
#pragma once

#include <cstdint>

#include "panels.h"

namespace wicore {

// Activations as tiles: [pairs of 16 rows][K steps of 32][2][16, 32] bfloat16, zero past K and past the last row.
struct BrainRows {
  uint16_t* values;
  int64_t steps;  // of 32 along K
  int64_t pairs;  // of tiles, 32 rows each

  static int64_t bytes(const Shape& shape, int64_t rows);
  BrainRows(const Shape& shape, int64_t rows, uint8_t* memory);

  // Fills the 32 rows of a pair from x [rows, K].
  void fill(const Shape& shape, int64_t pair, const float* x, int64_t rows) const;
};

// Whether all activations of a product fit in the second-level cache, so that panels can be computed one by one. Where
// they do not, K is cut into slices and every slice serves all panels of a call: give a thread all of its panels at once.
bool single_slice_bf16(const BrainRows& x);

// Bytes of scratch memory that `multiply_panels_bf16` needs for so many rows and panels.
int64_t scratch_bytes_bf16(const BrainRows& x, int64_t panels);

// out [rows, stride] float32, columns 32 * first_panel and on: the products of all rows with `panels` neighbouring
// panels. Columns past N are not written. bias is float32 [N] or null. The calling thread must hold `AmxTiles(64)`.
void multiply_panels_bf16(const PackedMatrix& matrix, int64_t first_panel, int64_t panels, const BrainRows& x,
                          int64_t rows, const float* bias, float* out, int64_t stride, uint8_t* scratch);

}  // namespace wicore
