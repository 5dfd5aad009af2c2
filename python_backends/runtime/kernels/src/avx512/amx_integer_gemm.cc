#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "avx512/amx_tiles.h"
#include "avx512/scaling.h"
#include "integer_gemm.h"


namespace wicore {
namespace {

constexpr int64_t kTileRows = 16;
constexpr int64_t kPrefetch = 4096;

// Weights of one block as AMX reads them: rows of four k by 16 columns, the two halves of the panel apart.
struct BlockView {
  const uint8_t* low;
  const uint8_t* high;
  int64_t stride;
};

// Unpacks 4-bit weights to `scratch` [2, block / 4, 64]; 8-bit weights are read where they are.
BlockView view_block(const Shape& shape, const uint8_t* record, uint8_t* scratch) {
  const uint8_t* line = record + kLine;
  const int64_t groups = shape.block / 4;
  for (int64_t i = 0; i <= shape.lines(); ++i) {
    _mm_prefetch(reinterpret_cast<const char*>(record + i * kLine + kPrefetch), _MM_HINT_T0);
  }
  if (shape.bits == 8) return {line, line + kLine, 2 * kLine};
  const __m512i nibble = _mm512_set1_epi8(15);
  for (int64_t group = 0; group < groups; ++group) {
    const __m512i both = _mm512_load_si512(line + group * kLine);
    _mm512_store_si512(scratch + group * kLine, _mm512_and_si512(both, nibble));
    _mm512_store_si512(scratch + (groups + group) * kLine, _mm512_and_si512(_mm512_srli_epi16(both, 4), nibble));
  }
  return {scratch, scratch + groups * kLine, kLine};
}

// dots [2, 16, 16]: the integer products of 16 rows with a block.
void multiply_block(const Shape& shape, const BlockView& view, const int8_t* values, int64_t padded_k, int32_t* dots) {
  const int64_t step = tile_k_bytes(shape);
  _tile_zero(0);
  _tile_zero(1);
  for (int64_t k = 0; k < shape.block; k += step) {
    _tile_loadd(4, values + k, padded_k);
    _tile_loadd(6, view.low + k / 4 * view.stride, view.stride);
    _tile_loadd(7, view.high + k / 4 * view.stride, view.stride);
    _tile_dpbsud(0, 4, 6);
    _tile_dpbsud(1, 4, 7);
  }
  _tile_stored(0, dots, kLine);
  _tile_stored(1, dots + kTileRows * 16, kLine);
}

}  // namespace

void multiply_panel_amx(const PackedMatrix& matrix, int64_t panel, const QuantizedRows& x, int64_t rows, float* out) {
  alignas(64) uint8_t scratch[kMaxBlock / 4 * 2 * kLine];
  alignas(64) int32_t dots[2 * kTileRows * 16];
  const Shape& shape = matrix.shape();
  std::memset(out, 0, rows * kPanel * sizeof(float));
  for (int64_t block = 0; block < x.blocks; ++block) {
    const uint8_t* record = matrix.panel(panel) + block * shape.record_bytes();
    const BlockView view = view_block(shape, record, scratch);
    const PanelScales scale(record);
    const uint8_t* zeros = matrix.has_zero_points() ? matrix.zero_points(panel) + block * kPanel : nullptr;
    for (int64_t first = 0; first < rows; first += kTileRows) {
      multiply_block(shape, view, x.values + first * x.padded_k + block * shape.block, x.padded_k, dots);
      for (int64_t i = 0; i < std::min(kTileRows, rows - first); ++i) {
        const int64_t at = (first + i) * x.blocks + block;
        const int32_t correction = x.corrections[at];
        const __m512 activation_scale = _mm512_set1_ps(x.scales[at]);
        const __m512i low = zeros ? zero_point_correction(correction, shape.middle(), zeros) : _mm512_set1_epi32(correction);
        const __m512i high =
            zeros ? zero_point_correction(correction, shape.middle(), zeros + 16) : _mm512_set1_epi32(correction);
        float* sum = out + (first + i) * kPanel;
        const int32_t* dot = dots + i * 16;
        _mm512_storeu_ps(sum, add_block(_mm512_loadu_ps(sum), _mm512_add_epi32(_mm512_load_si512(dot), low), scale.low,
                                        activation_scale));
        _mm512_storeu_ps(sum + 16, add_block(_mm512_loadu_ps(sum + 16),
                                             _mm512_add_epi32(_mm512_load_si512(dot + kTileRows * 16), high), scale.high,
                                             activation_scale));
      }
    }
  }
  const float* columns = matrix.column_scales(panel);
  for (int64_t row = 0; row < rows; ++row) {
    float* to = out + row * kPanel;
    _mm512_storeu_ps(to, _mm512_mul_ps(_mm512_loadu_ps(to), _mm512_loadu_ps(columns)));
    _mm512_storeu_ps(to + 16, _mm512_mul_ps(_mm512_loadu_ps(to + 16), _mm512_loadu_ps(columns + 16)));
  }
}

}  // namespace wicore
