#pragma once

#include "attention.h"
#include "kernel_info.h"

namespace wicore {

// wicore.CachedAttention: com.microsoft.GroupQueryAttention over float16 caches that past and present share, without
// rotation, bias or sinks; with a window, over caches in the layout of its sliding_window_cache.
// inputs: query float16 [B, S, heads * dim]; key, value float16 [B, S, kv_heads * dim]; past_key, past_value float16
// [B, kv_heads, C, dim]; last int32 [B], tokens in the cache behind the chunk, less one; query_len int32 [B].
// outputs: attention float32 [B, S, heads * dim]; present_key, present_value as the past, and the same memory where the
// caller binds it.
// attributes: heads, kv_heads, window (0: none), scale, threads.
class CachedAttention {
 public:
  static constexpr const char* kName = "CachedAttention";
  static constexpr size_t kInputs = 7, kOutputs = 3;
  static ort::ElementType input_type(size_t input) { return input < 5 ? ort::kFloat16 : ort::kInt32; }
  static ort::ElementType output_type(size_t output) { return output ? ort::kFloat16 : ort::kFloat; }
  static bool is_required_input(size_t) { return true; }

  CachedAttention(const ort::Api& api, const ort::KernelInfo* info);
  void compute(ort::KernelContext* context) const;
  const ort::Api& api() const { return api_; }

 private:
  uint16_t* cache(ort::KernelContext* context, size_t input, size_t output) const;

  const ort::Api& api_;
  int threads_;
  Attention shape_{};
};

}  // namespace wicore
