#include "layer_op.h"

#include <algorithm>

#include "scratch.h"

namespace wicore {
namespace {

// Positions of the inputs; a matrix takes three.
constexpr size_t kStream = 0, kAttention = 1, kOutProjection = 2, kAttentionGamma = 5, kGateGamma = 6, kGateUp = 7,
                 kDown = 10, kDownGamma = 13, kNextGamma = 14, kNextProjection = 15, kCosine = 18, kSine = 19, kQueryGamma = 20, kKeyGamma = 21;

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
  float* packed;  // query, key and value

  Buffers(const DecoderLayer& layer, int64_t rows, Kernel kernel, Carver& carver)
      : attention(carve(carver, layer.out_projection_ ? *layer.out_projection_ : *layer.gate_up_, rows, kernel)),
        gate(carve(carver, *layer.gate_up_, rows, kernel)),
        hidden(carve(carver, *layer.down_, rows, kernel)),
        next(carve(carver, layer.next_projection_ ? *layer.next_projection_ : *layer.gate_up_, rows, kernel)),
        product(carver.floats(rows * layer.width_)),
        packed(layer.heads_.heads ? carver.floats(rows * layer.next_projection_->shape().n) : nullptr) {}
};

ort::ElementType DecoderLayer::input_type(size_t input) {
  for (const size_t matrix : {kOutProjection, kGateUp, kDown, kNextProjection}) {
    if (input == matrix || input == matrix + 2) return ort::kUint8;
  }
  return ort::kFloat;
}

DecoderLayer::DecoderLayer(const ort::Api& api, const ort::KernelInfo* info, bool to_heads) : api_(api) {
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
  if (!to_heads) return;
  heads_.heads = node.integer("heads");
  heads_.kv_heads = node.integer("kv_heads");
  heads_.dim = next_projection_->shape().n / (heads_.heads + 2 * heads_.kv_heads);
  heads_.epsilon = epsilon_;
  query_gamma_ = node.vector(kQueryGamma, heads_.dim);
  key_gamma_ = node.vector(kKeyGamma, heads_.dim);
  heads_.query_gamma = query_gamma_.data();
  heads_.key_gamma = key_gamma_.data();
}

DecoderLayer::Rows DecoderLayer::rows_of(ort::KernelContext* context) const {
  const ort::Value* stream = nullptr;
  check(api_.input(context, kStream, &stream));
  const std::vector<int64_t> dims = shape_of(api_, stream);
  if (dims.size() != 2 || dims[1] != width_) throw std::runtime_error("DecoderLayer: the stream is not [T, D]");
  ort::Value *out = nullptr, *next = nullptr;
  check(api_.output(context, 0, dims.data(), dims.size(), &out));
  Rows rows{data_of<const float>(api_, stream), nullptr, data_of<float>(api_, out), nullptr, heads_, dims[0]};
  if (out_projection_) {
    const ort::Value* attention = nullptr;
    check(api_.input(context, kAttention, &attention));
    if (shape_of(api_, attention) != std::vector<int64_t>{dims[0], out_projection_->shape().k}) {
      throw std::runtime_error("DecoderLayer: the attention is not [T, heads * head_dim]");
    }
    rows.attention = data_of<const float>(api_, attention);
  }
  if (heads_.heads) {
    rows.heads = heads_of(context, dims[0]);
  } else if (next_projection_) {
    const int64_t next_dims[] = {dims[0], next_projection_->shape().n};
    check(api_.output(context, 1, next_dims, 2, &next));
    rows.next = data_of<float>(api_, next);
  }
  return rows;
}

Heads DecoderLayer::heads_of(ort::KernelContext* context, int64_t tokens) const {
  const ort::Value *cosine = nullptr, *sine = nullptr;
  check(api_.input(context, kCosine, &cosine));
  check(api_.input(context, kSine, &sine));
  std::vector<int64_t> dims = shape_of(api_, cosine);
  if (dims.size() != 3 || dims[0] * dims[1] != tokens || dims[2] * 2 != heads_.dim || shape_of(api_, sine) != dims) {
    throw std::runtime_error("DecoderLayerToHeads: cosine and sine are not [B, S, head_dim / 2] of the stream's tokens");
  }
  Heads heads = heads_;
  heads.cosine = data_of<const float>(api_, cosine);
  heads.sine = data_of<const float>(api_, sine);
  const auto output = [&](size_t index, int64_t count) {
    dims[2] = count * heads_.dim;
    ort::Value* value = nullptr;
    check(api_.output(context, index, dims.data(), dims.size(), &value));
    return data_of<uint16_t>(api_, value);
  };
  heads.query = output(1, heads.heads);
  heads.key = output(2, heads.kv_heads);
  heads.value = output(3, heads.kv_heads);
  return heads;
}

DecoderLayer::Rows DecoderLayer::Rows::part(const DecoderLayer& layer, int64_t first, int64_t length) const {
  Rows rows = *this;
  rows.count = length;
  rows.stream += first * layer.width_;
  rows.out += first * layer.width_;
  if (attention) rows.attention += first * layer.out_projection_->shape().k;
  if (next) rows.next += first * layer.next_projection_->shape().n;
  if (heads.heads) {
    rows.heads.cosine += first * heads.dim / 2;
    rows.heads.sine += first * heads.dim / 2;
    rows.heads.query += first * heads.heads * heads.dim;
    rows.heads.key += first * heads.kv_heads * heads.dim;
    rows.heads.value += first * heads.kv_heads * heads.dim;
  }
  return rows;
}

void DecoderLayer::compute(ort::KernelContext* context) const {
  const Rows rows = rows_of(context);
  const Kernel kernel = kernel_for(rows.count);
  for (int64_t first = 0; first < rows.count; first += kRowsAtOnce) {
    const Rows part = rows.part(*this, first, std::min(kRowsAtOnce, rows.count - first));
    Carver measure(nullptr);
    Buffers(*this, part.count, kernel, measure);
    Carver carver(node_scratch().at_least(measure.used()));
    const Buffers buffers(*this, part.count, kernel, carver);
    Region region(threads_);
    add_phases(region, part, buffers);
    run(api_, context, region);
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
  if (!next_projection_) return;
  add_product(region, *next_projection_, buffers.next, nullptr, rows.heads.heads ? buffers.packed : rows.next);
  if (!rows.heads.heads) return;
  Heads heads = rows.heads;
  heads.packed = buffers.packed;
  add_heads(region, heads, rows.count);
}

}  // namespace wicore
