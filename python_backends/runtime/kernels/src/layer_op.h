#pragma once

#include <memory>
#include <vector>

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
  static bool is_uint8(size_t input);
  static bool is_required_input(size_t input) { return input == 0; }

  DecoderLayer(const ort::Api& api, const ort::KernelInfo* info);
  void compute(ort::KernelContext* context) const;
  const ort::Api& api() const { return api_; }

 private:
  struct Buffers;
  struct Rows {
    const float* stream;
    const float* attention;
    float* out;
    float* next;
    int64_t count;
  };

  void add_phases(Region& region, const Rows& rows, const Buffers& buffers) const;

  const ort::Api& api_;
  int threads_;
  float epsilon_;
  int64_t width_;
  std::unique_ptr<PackedMatrix> out_projection_, gate_up_, down_, next_projection_;
  std::vector<float> attention_gamma_, gate_gamma_, down_gamma_, next_gamma_;
};

}  // namespace wicore
