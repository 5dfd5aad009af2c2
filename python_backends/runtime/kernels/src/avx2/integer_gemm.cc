#include "integer_gemm.h"

#include <immintrin.h>

#include <algorithm>
#include <cstring>

namespace wicore {
namespace {

// Ahead of the reads, in bytes: the hardware prefetchers stop at the ends of pages.
constexpr int64_t kPrefetch = 4096;
constexpr int64_t kMaxRows = 6;             // rows per pass: their sums fill twelve of sixteen registers
constexpr int64_t kStep = 32;               // k whose products fit into sums of 16 bits: 8 * 2 * 15 * 127 < 2^15
constexpr int64_t kSliceBytes = 18 << 10;   // of a panel: stays in the first-level cache while all rows pass

// The products of some rows with the blocks [first, last) of a panel, added to `out` where the blocks are not the first.
struct Pass {
  const PackedMatrix& matrix;
  int64_t panel;
  const QuantizedRows& x;
  float* out;
  int64_t first, last;
  int64_t row;
};

__m256i load(const void* from) { return _mm256_load_si256(static_cast<const __m256i*>(from)); }

int32_t four_values(const int8_t* from) {
  int32_t four;
  std::memcpy(&four, from, sizeof(four));
  return four;
}

// lower[row] and upper[row], 16 sums of 16 bits each: the products of `kStep` values of every row with the lower and the
// upper halves of the bytes of weights, two neighbouring k added. VPMADDUBSW takes unsigned bytes and signed ones; with
// four bits on one side its sums of pairs do not saturate, and eight of them do not either.
template <int Rows>
inline __attribute__((always_inline)) void multiply_halves(const uint8_t* weights, int64_t stride, const int8_t* values,
                                                           int64_t padded_k, __m256i* lower, __m256i* upper) {
  const __m256i nibble = _mm256_set1_epi8(15);
#pragma GCC unroll 8
  for (int64_t group = 0; group < kStep / 4; ++group) {
    const __m256i both = load(weights + group * stride);
    const __m256i low = _mm256_and_si256(both, nibble), high = _mm256_and_si256(_mm256_srli_epi16(both, 4), nibble);
#pragma GCC unroll 6
    for (int m = 0; m < Rows; ++m) {
      const __m256i x = _mm256_set1_epi32(four_values(values + m * padded_k + 4 * group));
      const __m256i first = _mm256_maddubs_epi16(low, x), second = _mm256_maddubs_epi16(high, x);
      lower[m] = group ? _mm256_add_epi16(lower[m], first) : first;
      upper[m] = group ? _mm256_add_epi16(upper[m], second) : second;
    }
  }
}

// dots [Rows][4 of 8 columns] += the products of one step of k. Four bits: a byte holds columns c and c + 16. Eight bits:
// both halves are of one column, and the upper one counts sixteen times.
template <int Rows, int Bits>
inline __attribute__((always_inline)) void multiply_step(const uint8_t* line, const int8_t* values, int64_t padded_k,
                                                         __m256i (*dots)[4]) {
  constexpr int64_t kStride = Bits == 4 ? kLine : 2 * kLine;
  const __m256i one = _mm256_set1_epi16(1), sixteen = _mm256_set1_epi16(16);
  for (int part = 0; part < kStride / 32; ++part) {
    __m256i lower[Rows], upper[Rows];
    multiply_halves<Rows>(line + part * 32, kStride, values, padded_k, lower, upper);
    for (int m = 0; m < Rows; ++m) {
      const __m256i low = _mm256_madd_epi16(lower[m], one);
      const __m256i high = _mm256_madd_epi16(upper[m], Bits == 4 ? one : sixteen);
      if constexpr (Bits == 4) {
        dots[m][part] = _mm256_add_epi32(dots[m][part], low);
        dots[m][part + 2] = _mm256_add_epi32(dots[m][part + 2], high);
      } else {
        dots[m][part] = _mm256_add_epi32(dots[m][part], _mm256_add_epi32(low, high));
      }
    }
  }
}

// What the sums of q * x lack to be those of (q - zero point) * x.
template <int Rows, bool ZeroPoints>
void start_dots(const Pass& pass, int64_t block, __m256i (*dots)[4]) {
  const int32_t middle = pass.matrix.shape().middle();
  const int32_t* corrections = pass.x.corrections + pass.row * pass.x.blocks + block;
  for (int m = 0; m < Rows; ++m) {
    const int32_t correction = corrections[m * pass.x.blocks];
    for (int i = 0; i < 4; ++i) {
      if constexpr (ZeroPoints) {
        const uint8_t* zeros = pass.matrix.zero_points(pass.panel) + block * kPanel + i * 8;
        const __m256i points = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(zeros)));
        dots[m][i] = _mm256_mullo_epi32(points, _mm256_set1_epi32(correction / middle));
      } else {
        dots[m][i] = _mm256_set1_epi32(correction);
      }
    }
  }
}

template <int Rows, int Bits, bool ZeroPoints>
void multiply(const Pass& pass) {
  const Shape& shape = pass.matrix.shape();
  constexpr int64_t kStepBytes = kStep * kPanel * Bits / 8;
  const int64_t padded_k = pass.x.padded_k;
  float* out = pass.out + pass.row * kPanel;
  if (pass.first == 0) std::memset(out, 0, Rows * kPanel * sizeof(float));
  for (int64_t block = pass.first; block < pass.last; ++block) {
    const uint8_t* record = pass.matrix.panel(pass.panel) + block * shape.record_bytes();
    const int8_t* values = pass.x.values + pass.row * padded_k + block * shape.block;
    __m256i dots[Rows][4];
    start_dots<Rows, ZeroPoints>(pass, block, dots);
    for (int64_t step = 0; step < shape.block / kStep; ++step) {
      const uint8_t* line = record + kLine + step * kStepBytes;
      for (int64_t i = 0; i < kStepBytes; i += kLine) {
        _mm_prefetch(reinterpret_cast<const char*>(line + i + kPrefetch), _MM_HINT_T0);
      }
      multiply_step<Rows, Bits>(line, values + step * kStep, padded_k, dots);
    }
    _mm_prefetch(reinterpret_cast<const char*>(record + kPrefetch), _MM_HINT_T0);
    const float* scales = pass.x.scales + pass.row * pass.x.blocks + block;
    for (int i = 0; i < 4; ++i) {
      const __m256 scale = _mm256_cvtph_ps(_mm_load_si128(reinterpret_cast<const __m128i*>(record + i * 16)));
      for (int m = 0; m < Rows; ++m) {
        const __m256 product = _mm256_mul_ps(scale, _mm256_broadcast_ss(scales + m * pass.x.blocks));
        float* sum = out + m * kPanel + i * 8;
        _mm256_storeu_ps(sum, _mm256_fmadd_ps(_mm256_cvtepi32_ps(dots[m][i]), product, _mm256_loadu_ps(sum)));
      }
    }
  }
  if (pass.last < shape.blocks()) return;
  const float* columns = pass.matrix.column_scales(pass.panel);
  for (int64_t i = 0; i < Rows * kPanel; i += 8) {
    _mm256_storeu_ps(out + i, _mm256_mul_ps(_mm256_loadu_ps(out + i), _mm256_loadu_ps(columns + i % kPanel)));
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
constexpr RowsFunction kByRows[kMaxRows] = {multiply_rows<1>, multiply_rows<2>, multiply_rows<3>,
                                            multiply_rows<4>, multiply_rows<5>, multiply_rows<6>};

}  // namespace

void multiply_panel_vector(const PackedMatrix& matrix, int64_t panel, const QuantizedRows& x, int64_t rows, float* out) {
  const Shape& shape = matrix.shape();
  const int64_t passes = (rows + kMaxRows - 1) / kMaxRows;
  // One pass reads the panel from front to back. Several share slices of it.
  const int64_t slice = passes == 1 ? x.blocks : std::max<int64_t>(1, kSliceBytes / shape.record_bytes());
  for (int64_t first = 0; first < x.blocks; first += slice) {
    for (int64_t pass = 0, row = 0; pass < passes; ++pass) {
      const int64_t count = (rows - row + passes - pass - 1) / (passes - pass);
      kByRows[count - 1](Pass{matrix, panel, x, out, first, std::min(first + slice, x.blocks), row});
      row += count;
    }
  }
}

}  // namespace wicore
