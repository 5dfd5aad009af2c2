#include "attention_op.h"

#include <cstring>

namespace wicore {
namespace {

constexpr size_t kPastKey = 3;

}  // namespace

CachedAttention::CachedAttention(const ort::Api& api, const ort::KernelInfo* info) : api_(api) {
  const NodeInfo node(api, info);
  threads_ = static_cast<int>(node.integer("threads"));
  shape_.heads = node.integer("heads");
  shape_.kv_heads = node.integer("kv_heads");
  shape_.window = node.integer("window");
  shape_.scale = node.real("scale");
}

// The cache that is appended to: the output's memory, which begins as the input's.
uint16_t* CachedAttention::cache(ort::KernelContext* context, size_t input, size_t output) const {
  const ort::Value* past = nullptr;
  check(api_.input(context, input, &past));
  const std::vector<int64_t> dims = shape_of(api_, past);
  ort::Value* present = nullptr;
  check(api_.output(context, output, dims.data(), dims.size(), &present));
  const auto* from = data_of<const uint16_t>(api_, past);
  auto* to = data_of<uint16_t>(api_, present);
  if (from != to) std::memcpy(to, from, dims[0] * dims[1] * dims[2] * dims[3] * sizeof(uint16_t));
  return to;
}

void CachedAttention::compute(ort::KernelContext* context) const {
  const ort::Value* inputs[kInputs] = {};
  for (size_t i = 0; i < kInputs; ++i) check(api_.input(context, i, &inputs[i]));
  const std::vector<int64_t> query = shape_of(api_, inputs[0]), past = shape_of(api_, inputs[kPastKey]);
  Attention attention = shape_;
  if (query.size() != 3 || past.size() != 4 || past[0] != query[0] || past[1] != shape_.kv_heads) {
    throw std::runtime_error("CachedAttention: the query is not [B, S, heads * dim], or the past not [B, kv_heads, C, dim]");
  }
  attention.rows = query[0];
  attention.length = query[1];
  attention.capacity = past[2];
  attention.dim = past[3];
  const std::vector<int64_t> fresh = {query[0], query[1], shape_.kv_heads * attention.dim};
  if (query[2] != shape_.heads * attention.dim || attention.dim % 16 || shape_of(api_, inputs[1]) != fresh ||
      shape_of(api_, inputs[2]) != fresh || shape_of(api_, inputs[4]) != past) {
    throw std::runtime_error("CachedAttention: the shapes of query, key, value and past do not fit");
  }
  attention.query = data_of<const uint16_t>(api_, inputs[0]);
  attention.key = data_of<const uint16_t>(api_, inputs[1]);
  attention.value = data_of<const uint16_t>(api_, inputs[2]);
  attention.last = data_of<const int32_t>(api_, inputs[5]);
  attention.query_len = data_of<const int32_t>(api_, inputs[6]);
  for (int64_t row = 0; row < attention.rows; ++row) {
    const int64_t count = attention.query_len[row], total = attention.last[row] + 1;
    if (count < 0 || count > attention.length || (count && total < count) || (!shape_.window && total > past[2])) {
      throw std::runtime_error("CachedAttention: a row holds more tokens than the chunk or the cache");
    }
  }
  ort::Value* out = nullptr;
  check(api_.output(context, 0, query.data(), query.size(), &out));
  attention.out = data_of<float>(api_, out);
  attention.key_cache = cache(context, kPastKey, 1);
  attention.value_cache = cache(context, kPastKey + 1, 2);
  Region region(threads_);
  add_attention(region, attention);
  run(api_, context, region);
}

}  // namespace wicore
