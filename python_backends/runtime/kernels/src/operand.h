// The left factor of a product in the form that its kernel takes, and the product's sums as any kernel leaves them.
#pragma once

#include <cstdint>

#include "activations.h"
#include "float_gemm.h"
#include "panels.h"

namespace wicore {

// Products of up to so many rows use int8 activations, and a row's result does not depend on the others. It covers a
// decode step of 16 sequences with 4 draft tokens each. More rows, a prompt's or an image's, are multiplied in
// bfloat16 where there is AMX.
constexpr int64_t kIntegerRows = 80;

// Rows of a prompt that are multiplied at once; memory for activations stays bounded by it.
constexpr int64_t kRowsAtOnce = 512;

enum class Kernel { kVector, kAmxInt8, kAmxBf16 };

// `rows` is of the whole product, of which a part may be multiplied at once.
Kernel kernel_for(int64_t rows);

// Activations [rows, K] of a product. Borrowed memory.
class Operand {
 public:
  static int64_t bytes(const Shape& shape, int64_t rows, Kernel kernel);
  Operand(const Shape& shape, int64_t rows, Kernel kernel, uint8_t* memory);

  // Fills row `row` from x [K] float32, and with the last row the padding behind it.
  void fill(int64_t row, const float* x) const;
  // Fills the columns of `shape().block` weights of a row, all of them within K. The padding is left to the caller.
  void fill_block(int64_t row, int64_t block, const float* x) const;
  void clear_padding() const;

  const Shape& shape() const { return *shape_; }
  int64_t rows() const { return rows_; }
  Kernel kernel() const { return kernel_; }
  // Whether a task should ask for all of its panels at once; see `single_slice`.
  bool together() const;

  const QuantizedRows& quantized() const { return quantized_; }
  const BrainRows& brain() const { return brain_; }

 private:
  const Shape* shape_;
  int64_t rows_;
  Kernel kernel_;
  QuantizedRows quantized_;
  BrainRows brain_;
};

// The products of all rows with one panel, float32.
struct PanelSums {
  const float* sums;
  bool tiled;

  // Columns 0-15 and 16-31 of a row.
  const float* low(int64_t row) const { return tiled ? sums + row / 16 * 512 + row % 16 * 16 : sums + row * kPanel; }
  const float* high(int64_t row) const { return low(row) + (tiled ? 256 : 16); }
};

// Multiplies the operand with `count` panels; results[i] stays valid until the thread multiplies again.
void multiply_panels(const PackedMatrix& matrix, const int64_t* panels, int64_t count, const Operand& x,
                     PanelSums* results);

}  // namespace wicore
