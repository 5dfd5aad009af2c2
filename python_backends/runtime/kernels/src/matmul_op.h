#pragma once

#include <memory>
#include <vector>

#include "kernel_info.h"

namespace wicore {

// wicore.QuantizedMatMul: com.microsoft.MatMulNBits with the same weights and attributes K, N, bits and block_size.
// inputs: A float32 [..., K]; B uint8, scales float32 and zero_points uint8 (optional), constants; bias float32 [N]
// (optional, constant). output: float32 [..., N]. attribute threads: intra-op threads of the session.
class QuantizedMatMul {
 public:
  static constexpr const char* kName = "QuantizedMatMul";
  static constexpr size_t kInputs = 5, kOutputs = 1;
  static ort::ElementType input_type(size_t input) { return input == 1 || input == 3 ? ort::kUint8 : ort::kFloat; }
  static ort::ElementType output_type(size_t) { return ort::kFloat; }
  static bool is_required_input(size_t input) { return input < 3; }

  QuantizedMatMul(const ort::Api& api, const ort::KernelInfo* info);
  void compute(ort::KernelContext* context) const;
  const ort::Api& api() const { return api_; }

 private:
  const ort::Api& api_;
  int threads_;
  std::unique_ptr<PackedMatrix> matrix_;
  std::vector<float> bias_;
};

}  // namespace wicore
