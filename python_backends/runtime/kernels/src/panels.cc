#include "panels.h"

#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <thread>
#include <vector>

#include "large_pages.h"

namespace wicore {
namespace {

// Value `index` of a row of packed unsigned integers.
uint8_t value_at(const uint8_t* row, int64_t index, int64_t bits) {
  if (bits == 8) return row[index];
  const uint8_t pair = row[index / 2];
  return index % 2 ? pair >> 4 : pair & 15;
}

}  // namespace

PackedMatrix::PackedMatrix(const Shape& shape, const uint8_t* data, const float* scales, const uint8_t* zero_points,
                           int threads, PanelOrder order)
    : shape_(shape), order_(order) {
  const int64_t records = shape.panels() * shape.panel_bytes();
  const int64_t columns = shape.panels() * kPanel * static_cast<int64_t>(sizeof(float));
  const int64_t zeros = zero_points ? shape.panels() * shape.blocks() * kPanel : 0;
  memory_ = large_pages(records + columns + zeros);
  column_scales_ = reinterpret_cast<float*>(memory_.get() + records);
  if (zero_points) zero_points_ = memory_.get() + records + columns;

  std::atomic<int64_t> next{0};
  const auto work = [&] {
    for (int64_t panel = next++; panel < shape_.panels(); panel = next++) pack_panel(panel, data, scales, zero_points);
  };
  std::vector<std::thread> helpers;
  for (int64_t i = 1; i < std::min<int64_t>(threads, shape_.panels()); ++i) helpers.emplace_back(work);
  work();
  for (std::thread& helper : helpers) helper.join();
}

void PackedMatrix::pack_panel(int64_t panel, const uint8_t* data, const float* scales, const uint8_t* zero_points) {
  pack_scales(panel, scales);
  pack_weights(panel, data);
  if (!zero_points) return;
  const int64_t blocks = shape_.blocks(), row_bytes = (blocks * shape_.bits + 7) / 8;
  uint8_t* to = zero_points_ + panel * blocks * kPanel;  // columns past N stay zero, as their scales do
  for (int64_t column = panel * kPanel; column < std::min(shape_.n, (panel + 1) * kPanel); ++column) {
    for (int64_t block = 0; block < blocks; ++block) {
      to[block * kPanel + column % kPanel] = value_at(zero_points + column * row_bytes, block, shape_.bits);
    }
  }
}

void PackedMatrix::pack_scales(int64_t panel, const float* scales) {
  const int64_t blocks = shape_.blocks();
  for (int64_t i = 0; i < kPanel; ++i) {
    const int64_t column = panel * kPanel + i;
    float& power = column_scales_[column];
    power = 1.0f;
    if (column >= shape_.n) continue;
    const float* from = scales + column * blocks;
    float largest = 0.0f;
    for (int64_t block = 0; block < blocks; ++block) largest = std::max(largest, std::fabs(from[block]));
    if (std::isnormal(largest)) power = std::ldexp(1.0f, std::max(-126, std::ilogb(largest)));
    for (int64_t block = 0; block < blocks; ++block) {
      uint8_t* line = record(panel, block);
      reinterpret_cast<uint16_t*>(line)[i] = _cvtss_sh(from[block] / power, _MM_FROUND_TO_NEAREST_INT);
    }
  }
}

void PackedMatrix::pack_weights(int64_t panel, const uint8_t* data) {
  const int64_t block_bytes = shape_.block * shape_.bits / 8, row_bytes = shape_.blocks() * block_bytes;
  for (int64_t i = 0; i < kPanel; ++i) {
    const int64_t column = panel * kPanel + i;
    if (column >= shape_.n) return;  // fresh memory is zero
    for (int64_t block = 0; block < shape_.blocks(); ++block) {
      const uint8_t* from = data + column * row_bytes + block * block_bytes;
      uint8_t* to = record(panel, block) + kLine;
      if (shape_.bits == 8) {
        for (int64_t k = 0; k < shape_.block; k += 4) {
          std::memcpy(to + k / 4 * 2 * kLine + i * 4, from + k, 4);  // column i of 32 is byte 4 * i of the two lines
        }
        continue;
      }
      for (int64_t k = 0; k < shape_.block; k += 4) {
        uint16_t four;  // q0 | q1 << 4 | q2 << 8 | q3 << 12
        std::memcpy(&four, from + k / 2, 2);
        uint32_t spread = (four | static_cast<uint32_t>(four) << 8) & 0x00ff00ffu;
        spread = (spread | spread << 4) & 0x0f0f0f0fu;
        uint8_t* dword = to + k / 4 * kLine + i % 16 * 4;
        uint32_t old;
        std::memcpy(&old, dword, 4);
        old |= i < 16 ? spread : spread << 4;
        std::memcpy(dword, &old, 4);
      }
    }
  }
}

}  // namespace wicore
