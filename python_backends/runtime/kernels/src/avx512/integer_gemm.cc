#include "integer_gemm.h"

#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "avx512/scaling.h"

namespace wicore {
namespace {

// Ahead of the reads, in bytes: the hardware prefetchers stop at the ends of pages.
constexpr int64_t kPrefetch = 4096;
constexpr int kMaxRows = 8;  // rows per pass: their integer sums fill half of the registers

struct Pass {
  const PackedMatrix& matrix;
  int64_t panel;
  const QuantizedRows& x;
  int64_t row;
  float* out;
};

// _mm512_dpbusd_epi32, for which GCC 12 moves every sum to another register and back.
inline void add_dot(__m512i& sum, __m512i weights, __m512i x) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(weights), "v"(x));
}

template <int Rows, int Bits, bool ZeroPoints>
void multiply(const Pass& pass) {
  const Shape& shape = pass.matrix.shape();
  const int64_t blocks = shape.blocks(), padded_k = pass.x.padded_k, groups = shape.block / 4;
  const __m512i nibble = _mm512_set1_epi8(15);
  const uint8_t* record = pass.matrix.panel(pass.panel);
  const uint8_t* zeros = ZeroPoints ? pass.matrix.zero_points(pass.panel) : nullptr;
  const int8_t* values = pass.x.values + pass.row * padded_k;
  const float* scales = pass.x.scales + pass.row * blocks;
  const int32_t* corrections = pass.x.corrections + pass.row * blocks;
  __m512 low_sum[Rows], high_sum[Rows];
  for (int m = 0; m < Rows; ++m) low_sum[m] = high_sum[m] = _mm512_setzero_ps();

  for (int64_t block = 0; block < blocks; ++block) {
    __m512i low[Rows], high[Rows];
    for (int m = 0; m < Rows; ++m) {
      const int32_t correction = corrections[m * blocks + block];
      if constexpr (ZeroPoints) {
        low[m] = zero_point_correction(correction, shape.middle(), zeros + block * kPanel);
        high[m] = zero_point_correction(correction, shape.middle(), zeros + block * kPanel + 16);
      } else {
        low[m] = high[m] = _mm512_set1_epi32(correction);
      }
    }
    const uint8_t* line = record + kLine;
    _mm_prefetch(reinterpret_cast<const char*>(record + kPrefetch), _MM_HINT_T0);
    for (int64_t group = 0; group < groups; ++group) {
      __m512i first, second;
      _mm_prefetch(reinterpret_cast<const char*>(line + kPrefetch), _MM_HINT_T0);
      if constexpr (Bits == 4) {
        const __m512i both = _mm512_load_si512(line);
        first = _mm512_and_si512(both, nibble);
        second = _mm512_and_si512(_mm512_srli_epi16(both, 4), nibble);
        line += kLine;
      } else {
        _mm_prefetch(reinterpret_cast<const char*>(line + kPrefetch + kLine), _MM_HINT_T0);
        first = _mm512_load_si512(line);
        second = _mm512_load_si512(line + kLine);
        line += 2 * kLine;
      }
      for (int m = 0; m < Rows; ++m) {
        int32_t four;
        std::memcpy(&four, values + m * padded_k + 4 * group, 4);
        const __m512i x = _mm512_set1_epi32(four);
        add_dot(low[m], first, x);
        add_dot(high[m], second, x);
      }
    }
    const PanelScales scale(record);
    for (int m = 0; m < Rows; ++m) {
      const __m512 activation_scale = _mm512_set1_ps(scales[m * blocks + block]);
      low_sum[m] = add_block(low_sum[m], low[m], scale.low, activation_scale);
      high_sum[m] = add_block(high_sum[m], high[m], scale.high, activation_scale);
    }
    record += shape.record_bytes();
    values += shape.block;
  }
  const float* columns = pass.matrix.column_scales(pass.panel);
  for (int m = 0; m < Rows; ++m) {
    float* to = pass.out + (pass.row + m) * kPanel;
    _mm512_storeu_ps(to, _mm512_mul_ps(low_sum[m], _mm512_loadu_ps(columns)));
    _mm512_storeu_ps(to + 16, _mm512_mul_ps(high_sum[m], _mm512_loadu_ps(columns + 16)));
  }
}

template <int Rows>
void multiply_rows(const Pass& pass) {
  const bool zero_points = pass.matrix.has_zero_points();
  if (pass.matrix.shape().bits == 4) {
    zero_points ? multiply<Rows, 4, true>(pass) : multiply<Rows, 4, false>(pass);
  } else {
    zero_points ? multiply<Rows, 8, true>(pass) : multiply<Rows, 8, false>(pass);
  }
}

using RowsFunction = void (*)(const Pass&);
constexpr RowsFunction kByRows[kMaxRows] = {multiply_rows<1>, multiply_rows<2>, multiply_rows<3>, multiply_rows<4>,
                                            multiply_rows<5>, multiply_rows<6>, multiply_rows<7>, multiply_rows<8>};

}  // namespace

void multiply_panel_vector(const PackedMatrix& matrix, int64_t panel, const QuantizedRows& x, int64_t rows, float* out) {
  // The passes are of equal size where possible: each reads the panel again, from the second-level cache.
  const int64_t passes = (rows + kMaxRows - 1) / kMaxRows;
  for (int64_t pass = 0, row = 0; pass < passes; ++pass) {
    const int64_t count = (rows - row + passes - pass - 1) / (passes - pass);
    kByRows[count - 1](Pass{matrix, panel, x, row, out});
    row += count;
  }
}

}  // namespace wicore
