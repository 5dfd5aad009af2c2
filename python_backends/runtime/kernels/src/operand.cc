#include "operand.h"

#include "avx512/amx_tiles.h"
#include "integer_gemm.h"
#include "scratch.h"
#include "vectors.h"

namespace wicore {
namespace {

int64_t padded_rows(int64_t rows) { return (rows + 15) / 16 * 16; }

}  // namespace

Kernel kernel_for(int64_t rows) {
  if constexpr (kTiles) {
    if (amx_available() && rows >= kAmxFromRows) return rows <= kIntegerRows ? Kernel::kAmxInt8 : Kernel::kAmxBf16;
  }
  return Kernel::kVector;
}

int64_t Operand::bytes(const Shape& shape, int64_t rows, Kernel kernel) {
  if (kernel == Kernel::kAmxBf16) return BrainRows::bytes(shape, rows);
  return QuantizedRows::bytes(shape, padded_rows(rows));
}

Operand::Operand(const Shape& shape, int64_t rows, Kernel kernel, uint8_t* memory)
    : shape_(&shape),
      rows_(rows),
      kernel_(kernel),
      quantized_(shape, padded_rows(rows), memory),
      brain_(shape, rows, memory) {}

void Operand::fill(int64_t row, const float* x) const {
  if constexpr (kTiles) {
    if (kernel_ == Kernel::kAmxBf16) {
      brain_.fill(*shape_, row, x);
      if (row == rows_ - 1) clear_padding();
      return;
    }
  }
  quantized_.fill(*shape_, row, x);
}

void Operand::fill_block(int64_t row, int64_t block, const float* x) const {
  if (kernel_ != Kernel::kAmxBf16) return quantized_.fill_block(*shape_, row, block, x, shape_->block);
  if constexpr (kTiles) {
    for (int64_t i = 0; i < shape_->block; i += kPanel) {
      brain_.fill_step(row, (block * shape_->block + i) / kPanel, load(x + i), load(x + i + kLanes));
    }
  }
}

void Operand::clear_padding() const {
  if constexpr (kTiles) {
    if (kernel_ == Kernel::kAmxBf16) brain_.clear_from(rows_);
  }
}

bool Operand::together() const {
  if constexpr (kTiles) return kernel_ == Kernel::kAmxBf16 && !single_slice(brain_);
  return false;
}

void multiply_panels(const PackedMatrix& matrix, const int64_t* panels, int64_t count, const Operand& x,
                     PanelSums* results) {
  const bool tiled = x.kernel() == Kernel::kAmxBf16;
  const int64_t each = tiled ? tiled_sums(x.brain()) : x.rows() * kPanel;
  const int64_t unpacked = tiled ? kUnpackedBytes : 0;
  uint8_t* memory = task_scratch().at_least(unpacked + count * each * static_cast<int64_t>(sizeof(float)));
  auto* sums = reinterpret_cast<float*>(memory + unpacked);
  for (int64_t i = 0; i < count; ++i) results[i] = PanelSums{sums + i * each, tiled};
  if constexpr (kTiles) {
    if (tiled) {
      const AmxTiles held(64);
      return multiply_panels_bf16(matrix, panels, count, x.brain(), memory, sums);
    }
    if (x.kernel() == Kernel::kAmxInt8) {
      const AmxTiles held(tile_k_bytes(matrix.shape()));
      for (int64_t i = 0; i < count; ++i) multiply_panel_amx(matrix, panels[i], x.quantized(), x.rows(), sums + i * each);
      return;
    }
  }
  for (int64_t i = 0; i < count; ++i) multiply_panel_vector(matrix, panels[i], x.quantized(), x.rows(), sums + i * each);
}

}  // namespace wicore
