// Products of many rows with a packed matrix, for prompts and images: both factors as bfloat16 in AMX tiles, sums in
// float32. Activations are rounded to 8 bits of mantissa, weights after their scale was applied.
#pragma once

#include <cstdint>

#include "panels.h"
#include "vectors.h"

namespace wicore {

// Activations as tiles: [pairs of 16 rows][K steps of 32][2][16, 32] bfloat16, zero past K and past the last row.
struct BrainRows {
  uint16_t* values;
  int64_t steps;  // of 32 along K
  int64_t pairs;  // of tiles, 32 rows each

  static int64_t bytes(const Shape& shape, int64_t rows) { return (rows + 31) / 32 * steps_of(shape) * 2048; }
  BrainRows(const Shape& shape, int64_t rows, uint8_t* memory)
      : values(reinterpret_cast<uint16_t*>(memory)), steps(steps_of(shape)), pairs((rows + 31) / 32) {}
  static int64_t steps_of(const Shape& shape) { return (shape.k + 31) / 32; }

  // Fills row `row` from x [K].
  void fill(const Shape& shape, int64_t row, const float* x) const;
  // Fills one K step of a row.
  void fill_step(int64_t row, int64_t step, Floats low, Floats high) const;
  // Zeroes the rows from `rows` on.
  void clear_from(int64_t rows) const;
};

// Whether all activations of a product fit in the second-level cache, so that panels can be computed one by one. Where
// they do not, K is cut into slices and every slice serves all panels of a call: give a thread all of its panels at once.
bool single_slice(const BrainRows& x);

// Floats that the sums of one panel take.
inline int64_t tiled_sums(const BrainRows& x) { return x.pairs * 1024; }

// Unpacked weights of so many steps fill 36 KiB of a first-level cache of 48 KiB.
constexpr int64_t kChunkSteps = 18;
constexpr int64_t kUnpackedBytes = kChunkSteps * 2048;

// sums [count][pairs][2 row tiles][2 halves of the panel][16, 16] float32: all rows times `count` panels. `unpacked` is
// scratch memory. The calling thread must hold `AmxTiles(64)`.
void multiply_panels_bf16(const PackedMatrix& matrix, const int64_t* panels, int64_t count, const BrainRows& x,
                          uint8_t* unpacked, float* sums);

}  // namespace wicore
