#include "float_gemm.h"

#include <immintrin.h>

#include <algorithm>

#include "avx512/amx_tiles.h"
#include "avx512/scaling.h"

namespace wicore {
namespace {

constexpr int64_t kTileBytes = 1024;             // 16 rows of 64 bytes
constexpr int64_t kStep = 32;                    // k of one tile
// Of a second-level cache of 2 MiB: all activations of a product whose panels are computed one by one, or else a slice of
// them beside the sums of many panels.
constexpr int64_t kWholeBytes = 5 << 18, kSliceBytes = 5 << 17;

int64_t slice_steps(const BrainRows& x) {
  const int64_t bytes = x.pairs * x.steps * 2 * kTileBytes;
  if (bytes <= kWholeBytes) return x.steps;
  const int64_t slices = (bytes + kSliceBytes - 1) / kSliceBytes;
  return (x.steps + slices - 1) / slices;
}

// The bytes of q at bit `Bit` of every 32-bit lane as float32 (q - zero point) * scale: q is moved into the mantissa of
// 128, which makes 128 + q / 2; twice the scale and an offset do the rest. Both are exact, because a scale has 11
// significant bits.
template <int Bit, int Bits>
__m512 dequantize(__m512i lanes, __m512 twice_scale, __m512 offset) {
  constexpr int kMantissa = 15;
  const __m512i mask = _mm512_set1_epi32(((1 << Bits) - 1) << kMantissa);
  __m512i moved;
  if constexpr (Bit < kMantissa) {
    moved = _mm512_slli_epi32(lanes, kMantissa - Bit);
  } else {
    moved = _mm512_srli_epi32(lanes, Bit - kMantissa);
  }
  const __m512i number = _mm512_ternarylogic_epi32(moved, mask, _mm512_set1_epi32(0x43000000), 0xea);  // (a & b) | c
  return _mm512_fmadd_ps(_mm512_castsi512_ps(number), twice_scale, offset);
}

// Two neighbouring k as one row of a tile: bfloat16, rounded to nearest, the first k in the lower halves.
__m512i pair_bf16(__m512 first, __m512 second) {
  const __m512i half = _mm512_set1_epi32(0x8000);
  const __m512i low = _mm512_srli_epi32(_mm512_add_epi32(_mm512_castps_si512(first), half), 16);
  return _mm512_mask_blend_epi16(0xaaaaaaaau, low, _mm512_add_epi32(_mm512_castps_si512(second), half));
}

// Four k of 16 columns, as bytes of `lanes` from bit `Shift` on: two rows of a tile.
template <int Shift, int Bits>
void unpack_four(__m512i lanes, __m512 twice_scale, __m512 offset, uint8_t* rows) {
  const __m512 k0 = dequantize<Shift, Bits>(lanes, twice_scale, offset);
  const __m512 k1 = dequantize<Shift + 8, Bits>(lanes, twice_scale, offset);
  const __m512 k2 = dequantize<Shift + 16, Bits>(lanes, twice_scale, offset);
  const __m512 k3 = dequantize<Shift + 24, Bits>(lanes, twice_scale, offset);
  _mm512_store_si512(rows, pair_bf16(k0, k1));
  _mm512_store_si512(rows + kLine, pair_bf16(k2, k3));
}

// Steps [first, first + count) of a panel as tiles [count][2 halves of the panel][16, 16 pairs of k].
template <int Bits>
void unpack_steps(const PackedMatrix& matrix, int64_t panel, int64_t first, int64_t count, uint8_t* tiles) {
  const Shape& shape = matrix.shape();
  const int64_t per_block = shape.block / kStep, step_bytes = kStep / 4 * kLine * Bits / 4;
  const __m512 low_column = _mm512_loadu_ps(matrix.column_scales(panel));
  const __m512 high_column = _mm512_loadu_ps(matrix.column_scales(panel) + 16);
  for (int64_t step = first; step < first + count; ++step, tiles += 2 * kTileBytes) {
    const int64_t block = step / per_block;
    const uint8_t* record = matrix.panel(panel) + block * shape.record_bytes();
    const uint8_t* line = record + kLine + step % per_block * step_bytes;
    const PanelScales scale(record);
    const __m512 low_scale = _mm512_mul_ps(scale.low, low_column), high_scale = _mm512_mul_ps(scale.high, high_column);
    __m512 low_zero = _mm512_set1_ps(static_cast<float>(256 + shape.middle())), high_zero = low_zero;
    if (matrix.has_zero_points()) {
      const auto* zeros = reinterpret_cast<const __m128i*>(matrix.zero_points(panel) + block * kPanel);
      const __m512i base = _mm512_set1_epi32(256);
      low_zero = _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_cvtepu8_epi32(_mm_loadu_si128(zeros)), base));
      high_zero = _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_cvtepu8_epi32(_mm_loadu_si128(zeros + 1)), base));
    }
    const __m512 low_offset = _mm512_mul_ps(_mm512_sub_ps(_mm512_setzero_ps(), low_zero), low_scale);
    const __m512 high_offset = _mm512_mul_ps(_mm512_sub_ps(_mm512_setzero_ps(), high_zero), high_scale);
    const __m512 low_twice = _mm512_add_ps(low_scale, low_scale), high_twice = _mm512_add_ps(high_scale, high_scale);
    for (int64_t group = 0; group < kStep / 4; ++group) {
      uint8_t* rows = tiles + group * 2 * kLine;
      if constexpr (Bits == 4) {
        const __m512i both = _mm512_load_si512(line + group * kLine);
        unpack_four<0, 4>(both, low_twice, low_offset, rows);
        unpack_four<4, 4>(both, high_twice, high_offset, rows + kTileBytes);
      } else {
        unpack_four<0, 8>(_mm512_load_si512(line + 2 * group * kLine), low_twice, low_offset, rows);
        unpack_four<0, 8>(_mm512_load_si512(line + (2 * group + 1) * kLine), high_twice, high_offset, rows + kTileBytes);
      }
    }
  }
}

// sums [4][16, 16] += 32 rows times one panel over `steps`; `fresh` starts from zero.
void multiply_pair(const uint8_t* x, const uint8_t* weights, int64_t steps, bool fresh, float* sums) {
  if (fresh) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else {
    _tile_loadd(0, sums, kLine);
    _tile_loadd(1, sums + 256, kLine);
    _tile_loadd(2, sums + 512, kLine);
    _tile_loadd(3, sums + 768, kLine);
  }
  for (int64_t step = 0; step < steps; ++step, x += 2 * kTileBytes, weights += 2 * kTileBytes) {
    _tile_loadd(6, weights, kLine);
    _tile_loadd(4, x, kLine);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, weights + kTileBytes, kLine);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, x + kTileBytes, kLine);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, sums, kLine);
  _tile_stored(1, sums + 256, kLine);
  _tile_stored(2, sums + 512, kLine);
  _tile_stored(3, sums + 768, kLine);
}

// One panel over the steps [first, last): unpacked in chunks that stay in the first-level cache.
void multiply_steps(const PackedMatrix& matrix, int64_t panel, const BrainRows& x, int64_t first, int64_t last,
                    uint8_t* unpacked, float* sums) {
  const int64_t chunks = (last - first + kChunkSteps - 1) / kChunkSteps;
  for (int64_t chunk = 0, step = first; chunk < chunks; ++chunk) {
    const int64_t count = (last - step + chunks - chunk - 1) / (chunks - chunk);
    if (matrix.shape().bits == 4) {
      unpack_steps<4>(matrix, panel, step, count, unpacked);
    } else {
      unpack_steps<8>(matrix, panel, step, count, unpacked);
    }
    for (int64_t pair = 0; pair < x.pairs; ++pair) {
      const auto* rows = reinterpret_cast<const uint8_t*>(x.values) + (pair * x.steps + step) * 2 * kTileBytes;
      multiply_pair(rows, unpacked, count, step == 0, sums + pair * kTileBytes);
    }
    step += count;
  }
}

}  // namespace

void BrainRows::fill(const Shape& shape, int64_t row, const float* x) const {
  for (int64_t step = 0; step < steps; ++step) {
    const int64_t left = shape.k - step * kStep;
    fill_step(row, step, load(x + step * kStep, lanes(left)),
              load(x + step * kStep + 16, lanes(left - 16)));
  }
}

void BrainRows::fill_step(int64_t row, int64_t step, Floats low, Floats high) const {
  uint16_t* to = values + ((row / 32 * steps + step) * 32 + row % 32) * kStep;
  _mm512_store_si512(to, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low)));
}

void BrainRows::clear_from(int64_t rows) const {
  for (int64_t row = rows; row < pairs * 32; ++row) {
    for (int64_t step = 0; step < steps; ++step) fill_step(row, step, _mm512_setzero_ps(), _mm512_setzero_ps());
  }
}

bool single_slice(const BrainRows& x) { return slice_steps(x) == x.steps; }

void multiply_panels_bf16(const PackedMatrix& matrix, const int64_t* panels, int64_t count, const BrainRows& x,
                          uint8_t* unpacked, float* sums) {
  const int64_t slice = slice_steps(x);
  for (int64_t first = 0; first < x.steps; first += slice) {
    for (int64_t i = 0; i < count; ++i) {
      multiply_steps(matrix, panels[i], x, first, std::min(first + slice, x.steps), unpacked, sums + i * tiled_sums(x));
    }
  }
}

}  // namespace wicore
