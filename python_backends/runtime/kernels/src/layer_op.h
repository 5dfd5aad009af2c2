#pragma once

#include <memory>
#include <vector>

#include "heads.h"
#include "kernel_info.h"
#include "linear.h"

namespace wicore {

// wicore.DecoderLayer: all that lies between the attention of one layer of Gemma-3 and that of the next, in one parallel
// region.
//   stream += rms_norm(attention · out_projection) * attention_gamma                      where there is an attention
//   gated   = rms_norm(stream) * gate_gamma · gate_up, halved; gelu(first half) * second half
//   stream += rms_norm(gated · down) * down_gamma
//   next    = rms_norm(stream) * next_gamma · next projection                         where there is a next projection
// inputs (constants but for the first two): stream float32 [T, D]; attention float32 [T, heads · head_dim] (optional);
// then data, scales and zero points (optional) of a matrix and a gamma [D]: out_projection and attention_gamma (optional);
// gate_gamma, gate_up; down, down_gamma; next_gamma, next projection (optional).
// outputs: stream float32 [T, D]; next float32 [T, N] (optional).
// attributes: K, N, bits and block_size of every matrix behind out_, gate_, down_, next_, N = 0 for one that is not there;
// epsilon; threads.
class DecoderLayer {
 public:
  static constexpr const char* kName = "DecoderLayer";
  static constexpr size_t kInputs = 18, kOutputs = 2;
  static ort::ElementType input_type(size_t input);
  static ort::ElementType output_type(size_t) { return ort::kFloat; }
  static bool is_required_input(size_t input) { return input == 0; }

  DecoderLayer(const ort::Api& api, const ort::KernelInfo* info) : DecoderLayer(api, info, false) {}
  void compute(ort::KernelContext* context) const;
  const ort::Api& api() const { return api_; }

 private:
  struct Buffers;

  // The tokens of a call, or those of them that are computed at once. What a node leaves out is null.
  struct Rows {
    const float* stream;
    const float* attention;
    float* out;
    float* next;
    Heads heads;
    int64_t count;

    Rows part(const DecoderLayer& layer, int64_t first, int64_t length) const;
  };

  Rows rows_of(ort::KernelContext* context) const;
  Heads heads_of(ort::KernelContext* context, int64_t tokens) const;
  void add_phases(Region& region, const Rows& rows, const Buffers& buffers) const;

  const ort::Api& api_;
  int threads_;
  float epsilon_;
  int64_t width_;
  std::unique_ptr<PackedMatrix> out_projection_, gate_up_, down_, next_projection_;
  std::vector<float> attention_gamma_, gate_gamma_, down_gamma_, next_gamma_, query_gamma_, key_gamma_;
  Heads heads_{};  // with 0 heads the next projection is an output as it is

 protected:
  DecoderLayer(const ort::Api& api, const ort::KernelInfo* info, bool to_heads);
};

// wicore.DecoderLayerToHeads: the same, and the next projection is cut into query, key and value, which are normed,
// rotated and rounded to float16 (`Heads`).
// more inputs: cosine and sine float32 [B, S, head_dim / 2] with B * S = T; query_gamma and key_gamma [head_dim], constants.
// outputs: stream float32 [T, D]; query float16 [B, S, heads * head_dim]; key and value float16 [B, S, kv_heads * head_dim].
// more attributes: heads, kv_heads.
class DecoderLayerToHeads : public DecoderLayer {
 public:
  static constexpr const char* kName = "DecoderLayerToHeads";
  static constexpr size_t kInputs = 22, kOutputs = 4;
  static ort::ElementType output_type(size_t output) { return output ? ort::kFloat16 : ort::kFloat; }

  DecoderLayerToHeads(const ort::Api& api, const ort::KernelInfo* info) : DecoderLayer(api, info, true) {}
};

}  // namespace wicore
