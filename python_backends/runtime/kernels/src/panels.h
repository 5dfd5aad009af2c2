// A quantized weight matrix in the layout that the kernels stream through.
//
// A weight W [N, K] comes as MatMulNBits stores it: unsigned q of 4 or 8 bits in blocks along K,
// w = (q - zero_point) * scale. It is cut into panels of 32 output columns. A panel is one run of memory, read from
// front to back: for every block a line of 32 float16 scales, then the block's weights in the order that both VPDPBUSD and
// the AMX tiles want, four consecutive k of a column beside each other (AVX2 reads them by halves of a line):
//   8 bits: for every 4 k two lines of 64 bytes, columns 0-15 and 16-31
//   4 bits: for every 4 k one line, columns 0-15 in the lower halves of the bytes, 16-31 in the upper halves
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

namespace wicore {

constexpr int64_t kPanel = 32;       // output columns of a panel
constexpr int64_t kLine = 64;        // bytes of a cache line and of a vector register
constexpr int64_t kBlockStep = 32;   // block sizes are multiples of it
constexpr int64_t kMaxBlock = 256;

struct Shape {
  int64_t n = 0;      // output columns, rows of W
  int64_t k = 0;      // inner dimension
  int64_t bits = 4;   // 4 or 8
  int64_t block = 32; // weights along K that share a scale

  int64_t blocks() const { return (k + block - 1) / block; }
  int64_t padded_k() const { return blocks() * block; }
  int64_t panels() const { return (n + kPanel - 1) / kPanel; }
  int64_t lines() const { return block / 4 * (bits == 8 ? 2 : 1); }  // of weights in a block's record
  int64_t record_bytes() const { return (1 + lines()) * kLine; }
  int64_t panel_bytes() const { return blocks() * record_bytes(); }
  int32_t middle() const { return 1 << (bits - 1); }                 // the zero point of a symmetric matrix
};

// How panels follow each other in memory. In pairs: the first of the lower half of the columns, the first of the upper
// half, the second of the lower half and so on, for halves that are read together.
enum class PanelOrder { kPlain, kPairs };

class PackedMatrix {
 public:
  // data: uint8 [N, blocks, block * bits / 8]; scales: float32 [N, blocks]; zero_points: uint8
  // [N, ceil(blocks * bits / 8)] or null. Repacks with `threads` threads of its own. Throws std::bad_alloc.
  PackedMatrix(const Shape& shape, const uint8_t* data, const float* scales, const uint8_t* zero_points, int threads,
               PanelOrder order = PanelOrder::kPlain);
  PackedMatrix(const PackedMatrix&) = delete;
  PackedMatrix& operator=(const PackedMatrix&) = delete;

  const Shape& shape() const { return shape_; }
  const uint8_t* panel(int64_t index) const { return memory_.get() + position(index) * shape_.panel_bytes(); }
  // What every float16 scale of a column is to be multiplied by: a power of two, so that float16 rounds the scales by
  // 2^-12 at most whatever their size. [32]
  const float* column_scales(int64_t panel) const { return column_scales_ + panel * kPanel; }
  bool has_zero_points() const { return zero_points_ != nullptr; }
  // Zero points of a panel, uint8 [blocks, 32].
  const uint8_t* zero_points(int64_t panel) const { return zero_points_ + panel * shape_.blocks() * kPanel; }

 private:
  int64_t position(int64_t panel) const {
    if (order_ == PanelOrder::kPlain) return panel;
    const int64_t half = shape_.panels() / 2;
    return panel < half ? 2 * panel : 2 * (panel - half) + 1;
  }
  uint8_t* record(int64_t panel, int64_t block) {
    return memory_.get() + position(panel) * shape_.panel_bytes() + block * shape_.record_bytes();
  }
  void pack_panel(int64_t panel, const uint8_t* data, const float* scales, const uint8_t* zero_points);
  void pack_scales(int64_t panel, const float* scales);
  void pack_weights(int64_t panel, const uint8_t* data);

  Shape shape_;
  PanelOrder order_;
  std::shared_ptr<uint8_t> memory_;
  float* column_scales_ = nullptr;
  uint8_t* zero_points_ = nullptr;
};

}  // namespace wicore
