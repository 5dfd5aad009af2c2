// The custom ops as ONNX Runtime sees them.
//
// wicore.QuantizedMatMul: com.microsoft.MatMulNBits with the same weights and attributes K, N, bits and block_size.
//   inputs: A float32 [..., K]; B uint8, scales float32 and zero_points uint8 (optional), constants; bias float32 [N]
//   (optional, constant). output: float32 [..., N]. attribute threads: intra-op threads of the session.

#include <exception>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "linear.h"
#include "ort_abi.h"
#include "panels.h"
#include "region.h"
#include "scratch.h"

namespace wicore {
namespace {

using ort::Api;
using ort::CustomOp;
using ort::KernelContext;
using ort::KernelInfo;
using ort::Status;
using ort::Value;

// A status of ONNX Runtime on its way through our code.
struct StatusError {
  Status* status;
};

void check(Status* status) {
  if (status) throw StatusError{status};
}

template <typename Function>
Status* guarded(const Api& api, Function function) {
  try {
    function();
    return nullptr;
  } catch (const StatusError& error) {
    return error.status;
  } catch (const std::exception& error) {
    return api.create_status(ort::kFail, error.what());
  }
}

int64_t attribute(const Api& api, const KernelInfo* info, const char* name) {
  int64_t value = 0;
  check(api.int_attribute(info, name, &value));
  return value;
}

template <typename Element>
const Element* data_of(const Api& api, const Value* value) {
  void* data = nullptr;
  check(api.tensor_data(value, &data));
  return static_cast<const Element*>(data);
}

// The data of a constant input; null where the node leaves it out.
template <typename Element>
const Element* constant(const Api& api, const KernelInfo* info, size_t index) {
  int is_constant = 0;
  const Value* value = nullptr;
  check(api.constant_input(info, index, &is_constant, &value));
  return is_constant && value ? data_of<Element>(api, value) : nullptr;
}

std::vector<int64_t> shape_of(const Api& api, const Value* value) {
  ort::ShapeInfo* info = nullptr;
  check(api.shape(value, &info));
  size_t rank = 0;
  Status* status = api.rank(info, &rank);
  std::vector<int64_t> dims(rank);
  if (!status) status = api.dimensions(info, dims.data(), rank);
  api.release_shape(info);
  check(status);
  return dims;
}

void run(const Api& api, const KernelContext* context, Region& region, int threads) {
  if (threads < 2 || !region.parallel()) return region.run();
  const auto work = [](void* data, size_t) { static_cast<Region*>(data)->run(); };
  check(api.parallel_for(context, work, static_cast<size_t>(threads), &region));
}

class QuantizedMatMul {
 public:
  QuantizedMatMul(const Api& api, const KernelInfo* info) : api_(api), threads_(attribute(api, info, "threads")) {
    Shape shape;
    shape.n = attribute(api, info, "N");
    shape.k = attribute(api, info, "K");
    shape.bits = attribute(api, info, "bits");
    shape.block = attribute(api, info, "block_size");
    const auto* weights = constant<uint8_t>(api, info, 1);
    const auto* scales = constant<float>(api, info, 2);
    if (!weights || !scales) throw std::runtime_error("QuantizedMatMul: the weights must be constants");
    if (const auto* bias = constant<float>(api, info, 4)) bias_.assign(bias, bias + shape.n);
    matrix_ = std::make_unique<PackedMatrix>(shape, weights, scales, constant<uint8_t>(api, info, 3), threads_);
  }

  void compute(KernelContext* context) const {
    const Value* input = nullptr;
    check(api_.input(context, 0, &input));
    std::vector<int64_t> dims = shape_of(api_, input);
    const Shape& shape = matrix_->shape();
    if (dims.empty() || dims.back() != shape.k) {
      throw std::runtime_error("QuantizedMatMul: the last dimension of A is not K = " + std::to_string(shape.k));
    }
    int64_t rows = 1;
    for (size_t i = 0; i + 1 < dims.size(); ++i) rows *= dims[i];
    dims.back() = shape.n;
    Value* output = nullptr;
    check(api_.output(context, 0, dims.data(), dims.size(), &output));
    if (rows == 0) return;
    Region region;
    add_linear(region, *matrix_, data_of<float>(api_, input), rows, bias_.empty() ? nullptr : bias_.data(),
               const_cast<float*>(data_of<float>(api_, output)), threads_,
               node_scratch().at_least(linear_bytes(*matrix_, rows)));
    run(api_, context, region, threads_);
  }

  const Api& api() const { return api_; }

 private:
  const Api& api_;
  int threads_;
  std::unique_ptr<PackedMatrix> matrix_;
  std::vector<float> bias_;
};

CustomOp quantized_matmul() {
  CustomOp op;
  op.name = [](const CustomOp*) { return "QuantizedMatMul"; };
  op.execution_provider = [](const CustomOp*) -> const char* { return nullptr; };
  op.input_count = [](const CustomOp*) -> size_t { return 5; };
  op.input_type = [](const CustomOp*, size_t index) -> int {
    return index == 1 || index == 3 ? ort::kUint8 : ort::kFloat;
  };
  op.input_characteristic = [](const CustomOp*, size_t index) -> int {
    return index < 3 ? ort::kRequired : ort::kOptional;
  };
  op.output_count = [](const CustomOp*) -> size_t { return 1; };
  op.output_type = [](const CustomOp*, size_t) -> int { return ort::kFloat; };
  op.output_characteristic = [](const CustomOp*, size_t) -> int { return ort::kRequired; };
  op.input_memory_type = [](const CustomOp*, size_t) -> int { return 0; };
  op.start_version = [](const CustomOp*) { return 1; };
  op.end_version = [](const CustomOp*) { return 1; };
  op.create_kernel_v2 = [](const CustomOp*, const Api* api, const KernelInfo* info, void** kernel) {
    return guarded(*api, [&] { *kernel = new QuantizedMatMul(*api, info); });
  };
  op.compute_v2 = [](void* kernel, KernelContext* context) {
    const auto* self = static_cast<QuantizedMatMul*>(kernel);
    return guarded(self->api(), [&] { self->compute(context); });
  };
  op.destroy = [](void* kernel) { delete static_cast<QuantizedMatMul*>(kernel); };
  return op;
}

}  // namespace
}  // namespace wicore

// Found by name by ONNX Runtime's register_custom_ops_library.
extern "C" __attribute__((visibility("default"))) wicore::ort::Status* RegisterCustomOps(
    wicore::ort::SessionOptions* options, const wicore::ort::ApiBase* base) {
  using namespace wicore;
  const ort::Api* api = base->get_api(ort::kApiVersion);
  static const ort::CustomOp op = quantized_matmul();
  static ort::CustomOpDomain* domain = nullptr;  // lives as long as the library: sessions refer to it
  return guarded(*api, [&] {
    if (!domain) {
      ort::CustomOpDomain* created = nullptr;
      check(api->create_domain("wicore", &created));
      check(api->add_op(created, &op));
      domain = created;
    }
    check(api->add_domain(options, domain));
  });
}
