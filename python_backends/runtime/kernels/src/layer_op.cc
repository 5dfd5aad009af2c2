#include "layer_op.h"

#include <algorithm>

#include "scratch.h"

namespace wicore {
namespace {

// Positions of the inputs; a matrix takes three.
constexpr size_t kStream = 0, kAttention = 1, kOutProjection = 2, kAttentionGamma = 5, kGateGamma = 6, kGateUp = 7,
                 kDown = 10, kDownGamma = 13, kNextGamma = 14, kNextProjection = 15;

// Hands out parts of one piece of memory, or measures it while there is none.
class Carver {
 public:
  explicit Carver(uint8_t* memory) : memory_(memory) {}

  uint8_t* take(int64_t bytes) {
    uint8_t* part = memory_ ? memory_ + used_ : nullptr;
    used_ += (bytes + kLine - 1) / kLine * kLine;
    return part;
  }
  float* floats(int64_t count) { return reinterpret_cast<float*>(take(count * static_cast<int64_t>(sizeof(float)))); }
  int64_t used() const { return used_; }

 private:
  uint8_t* memory_;
  int64_t used_ = 0;
};

Operand carve(Carver& carver, const PackedMatrix& matrix, int64_t rows, Kernel kernel) {
  return Operand(matrix.shape(), rows, kernel, carver.take(Operand::bytes(matrix.shape(), rows, kernel)));
}

}  // namespace

// What a call needs beside its outputs. `product` is first the output projection's, then that of down.
struct DecoderLayer::Buffers {
  Operand attention, gate, hidden, next;
  float* product;

  Buffers(const DecoderLayer& layer, int64_t rows, Kernel kernel, Carver& carver)
      : attention(carve(carver, layer.out_projection_ ? *layer.out_projection_ : *layer.gate_up_, rows, kernel)),
        gate(carve(carver, *layer.gate_up_, rows, kernel)),
        hidden(carve(carver, *layer.down_, rows, kernel)),
        next(carve(carver, layer.next_projection_ ? *layer.next_projection_ : *layer.gate_up_, rows, kernel)),
        product(carver.floats(rows * layer.width_)) {}
};

bool DecoderLayer::is_uint8(size_t input) {
  for (const size_t matrix : {kOutProjection, kGateUp, kDown, kNextProjection}) {
    if (input == matrix || input == matrix + 2) return true;
  }
  return false;
}

DecoderLayer::DecoderLayer(const ort::Api& api, const ort::KernelInfo* info) : api_(api) {
  const NodeInfo node(api, info);
  threads_ = static_cast<int>(node.integer("threads"));
  epsilon_ = node.real("epsilon");
  gate_up_ = node.matrix(kGateUp, "gate_", threads_, PanelOrder::kPairs);
  down_ = node.matrix(kDown, "down_", threads_);
  if (node.integer("out_N")) out_projection_ = node.matrix(kOutProjection, "out_", threads_);
  if (node.integer("next_N")) next_projection_ = node.matrix(kNextProjection, "next_", threads_);
  width_ = gate_up_->shape().k;
  attention_gamma_ = node.vector(kAttentionGamma, width_);
  gate_gamma_ = node.vector(kGateGamma, width_);
  down_gamma_ = node.vector(kDownGamma, width_);
  next_gamma_ = node.vector(kNextGamma, width_);
  if (!can_gate(gate_up_->shape(), down_->shape()) || down_->shape().n != width_) {
    throw std::runtime_error("DecoderLayer: the sizes of gate_up and down do not fit");
  }
}

void DecoderLayer::compute(ort::KernelContext* context) const {
  const ort::Value *stream = nullptr, *attention = nullptr;
  check(api_.input(context, kStream, &stream));
  std::vector<int64_t> dims = shape_of(api_, stream);
  if (dims.size() != 2 || dims[1] != width_) throw std::runtime_error("DecoderLayer: the stream is not [T, D]");
  ort::Value *out = nullptr, *next = nullptr;
  check(api_.output(context, 0, dims.data(), dims.size(), &out));
  Rows rows{data_of<const float>(api_, stream), nullptr, data_of<float>(api_, out), nullptr, 0};
  if (out_projection_) {
    check(api_.input(context, kAttention, &attention));
    if (shape_of(api_, attention) != std::vector<int64_t>{dims[0], out_projection_->shape().k}) {
      throw std::runtime_error("DecoderLayer: the attention is not [T, heads * head_dim]");
    }
    rows.attention = data_of<const float>(api_, attention);
  }
  if (next_projection_) {
    const int64_t next_dims[] = {dims[0], next_projection_->shape().n};
    check(api_.output(context, 1, next_dims, 2, &next));
    rows.next = data_of<float>(api_, next);
  }
  const Kernel kernel = kernel_for(dims[0]);
  for (int64_t first = 0; first < dims[0]; first += kRowsAtOnce) {
    rows.count = std::min(kRowsAtOnce, dims[0] - first);
    Carver measure(nullptr);
    Buffers(*this, rows.count, kernel, measure);
    Carver carver(node_scratch().at_least(measure.used()));
    const Buffers buffers(*this, rows.count, kernel, carver);
    Region region(threads_);
    add_phases(region, rows, buffers);
    run(api_, context, region);
    rows.stream += rows.count * width_;
    rows.out += rows.count * width_;
    if (rows.attention) rows.attention += rows.count * out_projection_->shape().k;
    if (rows.next) rows.next += rows.count * next_projection_->shape().n;
  }
}

void DecoderLayer::add_phases(Region& region, const Rows& rows, const Buffers& buffers) const {
  const float* stream = rows.stream;
  const float* addend = nullptr;
  if (out_projection_) {
    add_fill(region, buffers.attention, rows.attention);
    add_product(region, *out_projection_, buffers.attention, nullptr, buffers.product);
    addend = buffers.product;
  }
  add_residual(region,
               Residual{stream, addend, attention_gamma_.data(), rows.out, gate_gamma_.data(), &buffers.gate, width_,
                        epsilon_},
               rows.count);
  if (out_projection_) stream = rows.out;
  add_gated_product(region, *gate_up_, buffers.gate, buffers.hidden);
  add_product(region, *down_, buffers.hidden, nullptr, buffers.product);
  add_residual(region,
               Residual{stream, buffers.product, down_gamma_.data(), rows.out, next_gamma_.data(),
                        next_projection_ ? &buffers.next : nullptr, width_, epsilon_},
               rows.count);
  if (next_projection_) add_product(region, *next_projection_, buffers.next, nullptr, rows.next);
}

}  // namespace wicore
