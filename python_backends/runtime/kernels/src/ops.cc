// The custom ops as ONNX Runtime sees them.

#include "attention_op.h"
#include "kernel_info.h"
#include "layer_op.h"
#include "matmul_op.h"
#include "ort_abi.h"

namespace wicore {
namespace {

using ort::CustomOp;

// The description of an op whose kernel is `Kernel`.
template <typename Kernel>
CustomOp describe() {
  CustomOp op;
  op.name = [](const CustomOp*) { return Kernel::kName; };
  op.execution_provider = [](const CustomOp*) -> const char* { return nullptr; };
  op.input_count = [](const CustomOp*) -> size_t { return Kernel::kInputs; };
  op.input_type = [](const CustomOp*, size_t index) -> int { return Kernel::input_type(index); };
  op.input_characteristic = [](const CustomOp*, size_t index) -> int {
    return Kernel::is_required_input(index) ? ort::kRequired : ort::kOptional;
  };
  op.output_count = [](const CustomOp*) -> size_t { return Kernel::kOutputs; };
  op.output_type = [](const CustomOp*, size_t index) -> int { return Kernel::output_type(index); };
  op.output_characteristic = [](const CustomOp*, size_t index) -> int {
    return index == 0 ? ort::kRequired : ort::kOptional;
  };
  op.input_memory_type = [](const CustomOp*, size_t) -> int { return 0; };
  op.start_version = [](const CustomOp*) { return 1; };
  op.end_version = [](const CustomOp*) { return 1; };
  op.create_kernel_v2 = [](const CustomOp*, const ort::Api* api, const ort::KernelInfo* info, void** kernel) {
    return guarded(*api, [&] { *kernel = new Kernel(*api, info); });
  };
  op.compute_v2 = [](void* kernel, ort::KernelContext* context) {
    const auto* self = static_cast<Kernel*>(kernel);
    return guarded(self->api(), [&] { self->compute(context); });
  };
  op.destroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  return op;
}

}  // namespace
}  // namespace wicore

// Found by name by ONNX Runtime's register_custom_ops_library.
extern "C" __attribute__((visibility("default"))) wicore::ort::Status* RegisterCustomOps(
    wicore::ort::SessionOptions* options, const wicore::ort::ApiBase* base) {
  using namespace wicore;
  const ort::Api* api = base->get_api(ort::kApiVersion);
  static const ort::CustomOp ops[] = {describe<QuantizedMatMul>(), describe<DecoderLayer>(),
                                      describe<DecoderLayerToHeads>(), describe<CachedAttention>()};
  static ort::CustomOpDomain* domain = nullptr;  // lives as long as the library: sessions refer to it
  return guarded(*api, [&] {
    if (!domain) {
      ort::CustomOpDomain* created = nullptr;
      check(api->create_domain("wicore", &created));
      for (const ort::CustomOp& op : ops) check(api->add_op(created, &op));
      domain = created;
    }
    check(api->add_domain(options, domain));
  });
}
