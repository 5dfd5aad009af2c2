#include "panels.h"

#include <immintrin.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <new>
#include <thread>
#include <vector>

namespace wicore {
namespace {

constexpr size_t kHugePage = size_t{1} << 21;

size_t rounded(size_t bytes, size_t unit) { return (bytes + unit - 1) / unit * unit; }

// Value `index` of a row of packed unsigned integers.
uint8_t value_at(const uint8_t* row, int64_t index, int64_t bits) {
  if (bits == 8) return row[index];
  const uint8_t pair = row[index / 2];
  return index % 2 ? pair >> 4 : pair & 15;
}

}  // namespace

PackedMatrix::PackedMatrix(const Shape& shape, const uint8_t* data, const float* scales, const uint8_t* zero_points,
                           int threads)
    : shape_(shape) {
  const size_t records = rounded(shape.panels() * shape.panel_bytes(), kLine);
  const size_t columns = shape.panels() * kPanel * sizeof(float);
  const size_t zeros = zero_points ? shape.panels() * shape.blocks() * kPanel : 0;
  const size_t wanted = records + columns + zeros;
  const size_t unit = wanted >= kHugePage ? kHugePage : 4096;
  bytes_ = rounded(wanted, unit) + unit;
  void* memory = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  memory_ = static_cast<uint8_t*>(memory);
  if (unit == kHugePage) madvise(memory_, bytes_, MADV_HUGEPAGE);
  records_ = reinterpret_cast<uint8_t*>(rounded(reinterpret_cast<size_t>(memory_), unit));
  column_scales_ = reinterpret_cast<float*>(records_ + records);
  if (zero_points) zero_points_ = records_ + records + columns;

  std::atomic<int64_t> next{0};
  const auto work = [&] {
    for (int64_t panel = next++; panel < shape_.panels(); panel = next++) pack_panel(panel, data, scales, zero_points);
  };
  std::vector<std::thread> helpers;
  for (int64_t i = 1; i < std::min<int64_t>(threads, shape_.panels()); ++i) helpers.emplace_back(work);
  work();
  for (std::thread& helper : helpers) helper.join();
}

PackedMatrix::~PackedMatrix() { munmap(memory_, bytes_); }

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
      uint8_t* line = records_ + panel * shape_.panel_bytes() + block * shape_.record_bytes();
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
      uint8_t* to = records_ + panel * shape_.panel_bytes() + block * shape_.record_bytes() + kLine;
      if (shape_.bits == 8) {
        for (int64_t k = 0; k < shape_.block; k += 4) {
          std::memcpy(to + k / 4 * 2 * kLine + i * 4, from + k, 4);  // column i of 32 is byte 4 * i of the two lines
        }
        continue;
      }
      for (int64_t k = 0; k < shape_.block; k += 4) {
        uint16_t four;  // q0 | q1 << 4 | q2 << 8 | q3 << 12
        std::memcpy(&four, from + k / 2, 2);
        const uint32_t spread = _pdep_u32(four, 0x0f0f0f0fu);
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
