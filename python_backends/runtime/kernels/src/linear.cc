#include "linear.h"

#include <algorithm>
#include <vector>

#include "norm.h"
#include "scratch.h"
#include "vectors.h"

namespace wicore {
namespace {

constexpr int64_t kTaskBytes = 1 << 16;  // weights of a task: some microseconds at a core's bandwidth
constexpr int64_t kTaskRows = 16;        // rows of a task between the products of a prompt

// Panels of one task, a multiple of `unit`, of `panels` in all.
int64_t panels_per_task(const Operand& x, int64_t panels, int64_t unit, int threads) {
  const Shape& shape = x.shape();
  int64_t wanted = kTaskBytes / shape.panel_bytes();
  if (x.together()) wanted = (panels + threads - 1) / threads;
  return std::max<int64_t>(1, (wanted + unit - 1) / unit) * unit;
}

int64_t tasks_of(int64_t items, int64_t per_task) { return (items + per_task - 1) / per_task; }

void write_panel(const Shape& shape, int64_t panel, const PanelSums& sums, int64_t rows, const float* bias, float* out) {
  const int64_t column = panel * kPanel;
  const Lanes low = lanes(shape.n - column), high = lanes(shape.n - column - kLanes);
  const Floats low_bias = bias ? load(bias + column, low) : zeros();
  const Floats high_bias = bias ? load(bias + column + kLanes, high) : zeros();
  for (int64_t row = 0; row < rows; ++row) {
    float* to = out + row * shape.n + column;
    store(to, add(load(sums.low(row)), low_bias), low);
    store(to + kLanes, add(load(sums.high(row)), high_bias), high);
  }
}

// gelu(gate) * up of the panels of one block of the hidden layer; gate and up take turns in `sums`.
void write_gated(const Operand& hidden, int64_t block, const PanelSums* sums) {
  const int64_t panels = hidden.shape().block / kPanel;
  alignas(64) float values[kMaxBlock];
  for (int64_t row = 0; row < hidden.rows(); ++row) {
    for (int64_t i = 0; i < panels; ++i) {
      const PanelSums &gate = sums[2 * i], &up = sums[2 * i + 1];
      store(values + i * kPanel, mul(gelu_tanh(load(gate.low(row))), load(up.low(row))));
      store(values + i * kPanel + kLanes, mul(gelu_tanh(load(gate.high(row))), load(up.high(row))));
    }
    hidden.fill_block(row, block, values);
  }
}

// out = x * factor * gamma, plus `base` where there is one.
void scale_row(const float* x, float factor, const float* gamma, const float* base, float* out, int64_t width) {
  for (int64_t i = 0; i < width; i += kLanes) {
    const Lanes which = lanes(width - i);
    Floats value = mul(mul(load(x + i, which), splat(factor)), load(gamma + i, which));
    if (base) value = add(value, load(base + i, which));
    store(out + i, value, which);
  }
}

}  // namespace

void add_fill(Region& region, const Operand& operand, const float* x) {
  const int64_t per_task = operand.kernel() == Kernel::kAmxBf16 ? kTaskRows : 1;
  region.add(tasks_of(operand.rows(), per_task), [=](int64_t task) {
    const int64_t last = std::min(operand.rows(), (task + 1) * per_task);
    for (int64_t row = task * per_task; row < last; ++row) operand.fill(row, x + row * operand.shape().k);
  });
}

void add_product(Region& region, const PackedMatrix& matrix, const Operand& x, const float* bias, float* out) {
  const Shape& shape = matrix.shape();
  const int64_t per_task = panels_per_task(x, shape.panels(), 1, region.threads());
  region.add(tasks_of(shape.panels(), per_task), [=, &matrix, &shape](int64_t task) {
    const int64_t last = std::min(shape.panels(), (task + 1) * per_task);
    const int64_t at_once = x.together() ? per_task : 1;
    std::vector<int64_t> panels(at_once);
    std::vector<PanelSums> sums(at_once);
    for (int64_t first = task * per_task; first < last; first += at_once) {
      const int64_t count = std::min(at_once, last - first);
      for (int64_t i = 0; i < count; ++i) panels[i] = first + i;
      multiply_panels(matrix, panels.data(), count, x, sums.data());
      for (int64_t i = 0; i < count; ++i) write_panel(shape, first + i, sums[i], x.rows(), bias, out);
    }
  });
}

bool can_gate(const Shape& gate_up, const Shape& down) {
  return gate_up.n == 2 * down.k && down.k % kPanel == 0 && down.k % down.block == 0;
}

void add_gated_product(Region& region, const PackedMatrix& matrix, const Operand& x, const Operand& hidden) {
  const int64_t branch = matrix.shape().panels() / 2, unit = hidden.shape().block / kPanel;
  // Two panels for every one counted: half as many of them make a task.
  const int64_t per_task = std::max(unit, panels_per_task(x, branch, 2 * unit, region.threads()) / 2);
  region.add(tasks_of(branch, per_task), [=, &matrix](int64_t task) {
    const int64_t last = std::min(branch, (task + 1) * per_task);
    const int64_t at_once = x.together() ? per_task : unit;
    std::vector<int64_t> panels(2 * at_once);
    std::vector<PanelSums> sums(2 * at_once);
    for (int64_t first = task * per_task; first < last; first += at_once) {
      const int64_t count = std::min(at_once, last - first);
      for (int64_t i = 0; i < count; ++i) {
        panels[2 * i] = first + i;
        panels[2 * i + 1] = branch + first + i;
      }
      multiply_panels(matrix, panels.data(), 2 * count, x, sums.data());
      for (int64_t i = 0; i < count; i += unit) write_gated(hidden, (first + i) / unit, &sums[2 * i]);
    }
    if (last == branch) hidden.clear_padding();
  });
}

void add_residual(Region& region, const Residual& residual, int64_t rows) {
  const int64_t per_task = rows > kIntegerRows ? kTaskRows : 1;
  region.add(tasks_of(rows, per_task), [=](int64_t task) {
    const int64_t width = residual.width;
    auto* normed = reinterpret_cast<float*>(task_scratch().at_least(width * static_cast<int64_t>(sizeof(float))));
    for (int64_t row = task * per_task; row < std::min(rows, (task + 1) * per_task); ++row) {
      const float* stream = residual.stream + row * width;
      if (residual.addend) {
        const float* addend = residual.addend + row * width;
        float* out = residual.out + row * width;
        scale_row(addend, inverse_rms(addend, width, residual.epsilon), residual.addend_gamma, stream, out, width);
        stream = out;
      }
      if (!residual.next) continue;
      scale_row(stream, inverse_rms(stream, width, residual.epsilon), residual.next_gamma, nullptr, normed, width);
      residual.next->fill(row, normed);
    }
  });
}

}  // namespace wicore
