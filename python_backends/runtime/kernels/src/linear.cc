#include "linear.h"

#include <immintrin.h>

#include <algorithm>

#include "activations.h"
#include "amx_tiles.h"
#include "float_gemm.h"
#include "integer_gemm.h"
#include "scratch.h"

namespace wicore {
namespace {

constexpr int64_t kTaskBytes = 1 << 16;  // weights of a task, some microseconds at a core's bandwidth

int64_t padded_rows(int64_t rows) { return (rows + 15) / 16 * 16; }

bool integer(int64_t rows) { return rows <= kIntegerRows || !amx_available(); }

void write_rows(const Shape& shape, int64_t panel, const float* sums, int64_t rows, const float* bias, float* out) {
  const int64_t first = panel * kPanel, count = std::min(kPanel, shape.n - first);
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t i = 0; i < count; ++i) {
      out[row * shape.n + first + i] = sums[row * kPanel + i] + (bias ? bias[first + i] : 0.0f);
    }
  }
}

void add_integer(Region& region, const PackedMatrix& matrix, const float* x, int64_t rows, const float* bias, float* out,
                 uint8_t* memory) {
  const Shape& shape = matrix.shape();
  const QuantizedRows quantized(shape, padded_rows(rows), memory);
  region.add(rows, [=, &shape](int64_t row) { quantized.fill(shape, row, x + row * shape.k); });
  const int64_t per_task = std::max<int64_t>(1, kTaskBytes / shape.panel_bytes());
  const bool tiles = amx_available() && rows >= kAmxFromRows;
  region.add((shape.panels() + per_task - 1) / per_task, [=, &matrix, &shape](int64_t task) {
    auto* sums = reinterpret_cast<float*>(task_scratch().at_least(rows * kPanel * sizeof(float)));
    const int64_t last = std::min(shape.panels(), (task + 1) * per_task);
    const auto multiply = [&](auto function) {
      for (int64_t panel = task * per_task; panel < last; ++panel) {
        function(matrix, panel, quantized, rows, sums);
        write_rows(shape, panel, sums, rows, bias, out);
      }
    };
    if (tiles) {
      const AmxTiles held(tile_k_bytes(shape));
      multiply(multiply_panel_amx);
    } else {
      multiply(multiply_panel_vnni);
    }
  });
}

void add_bf16(Region& region, const PackedMatrix& matrix, const float* x, int64_t rows, const float* bias, float* out,
              int threads, uint8_t* memory) {
  const Shape& shape = matrix.shape();
  const BrainRows brain(shape, rows, memory);
  region.add(brain.pairs, [=, &shape](int64_t pair) { brain.fill(shape, pair, x, rows); });
  const int64_t per_task = single_slice_bf16(brain) ? 4 : (shape.panels() + threads - 1) / threads;
  region.add((shape.panels() + per_task - 1) / per_task, [=, &matrix, &shape](int64_t task) {
    const int64_t panels = std::min(per_task, shape.panels() - task * per_task);
    uint8_t* scratch = task_scratch().at_least(scratch_bytes_bf16(brain, panels));
    const AmxTiles held(64);
    multiply_panels_bf16(matrix, task * per_task, panels, brain, rows, bias, out, shape.n, scratch);
  });
}

}  // namespace

int64_t linear_bytes(const PackedMatrix& matrix, int64_t rows) {
  const int64_t at_once = std::min(rows, kRowsAtOnce);
  if (integer(rows)) return QuantizedRows::bytes(matrix.shape(), padded_rows(at_once));
  return BrainRows::bytes(matrix.shape(), at_once);
}

void add_linear(Region& region, const PackedMatrix& matrix, const float* x, int64_t rows, const float* bias, float* out,
                int threads, uint8_t* memory) {
  const Shape& shape = matrix.shape();
  for (int64_t first = 0; first < rows; first += kRowsAtOnce) {
    const int64_t count = std::min(kRowsAtOnce, rows - first);
    const float* from = x + first * shape.k;
    float* to = out + first * shape.n;
    if (integer(rows)) {
      add_integer(region, matrix, from, count, bias, to, memory);
    } else {
      add_bf16(region, matrix, from, count, bias, to, threads, memory);
    }
  }
}

}  // namespace wicore
