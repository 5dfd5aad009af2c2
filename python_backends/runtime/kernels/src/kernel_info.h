// Reading of nodes and tensors, with exceptions in place of statuses.
#pragma once

#include <exception>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "ort_abi.h"
#include "panels.h"
#include "region.h"

namespace wicore {

// A status of ONNX Runtime on its way through our code.
struct StatusError {
  ort::Status* status;
};

inline void check(ort::Status* status) {
  if (status) throw StatusError{status};
}

// Runs `function` and turns what it throws into a status.
template <typename Function>
ort::Status* guarded(const ort::Api& api, Function function) {
  try {
    function();
    return nullptr;
  } catch (const StatusError& error) {
    return error.status;
  } catch (const std::exception& error) {
    return api.create_status(ort::kFail, error.what());
  }
}

template <typename Element>
Element* data_of(const ort::Api& api, const ort::Value* value) {
  void* data = nullptr;
  check(api.tensor_data(value, &data));
  return static_cast<Element*>(data);
}

inline std::vector<int64_t> shape_of(const ort::Api& api, const ort::Value* value) {
  ort::ShapeInfo* info = nullptr;
  check(api.shape(value, &info));
  size_t rank = 0;
  ort::Status* status = api.rank(info, &rank);
  std::vector<int64_t> dims(rank);
  if (!status) status = api.dimensions(info, dims.data(), rank);
  api.release_shape(info);
  check(status);
  return dims;
}

// What a node says of itself when its kernel is made.
class NodeInfo {
 public:
  NodeInfo(const ort::Api& api, const ort::KernelInfo* info) : api_(api), info_(info) {}

  int64_t integer(const std::string& name) const {
    int64_t value = 0;
    check(api_.int_attribute(info_, name.c_str(), &value));
    return value;
  }

  float real(const std::string& name) const {
    float value = 0;
    check(api_.float_attribute(info_, name.c_str(), &value));
    return value;
  }

  // The data of a constant input; null where the node leaves it out.
  template <typename Element>
  const Element* constant(size_t index) const {
    int is_constant = 0;
    const ort::Value* value = nullptr;
    check(api_.constant_input(info_, index, &is_constant, &value));
    return is_constant && value ? data_of<Element>(api_, value) : nullptr;
  }

  std::vector<float> vector(size_t index, int64_t count) const {
    const auto* data = constant<float>(index);
    return data ? std::vector<float>(data, data + count) : std::vector<float>();
  }

  // The matrix whose data, scales and zero points (optional) are the inputs from `index` on and whose attributes K, N,
  // bits and block_size begin with `prefix`.
  std::unique_ptr<PackedMatrix> matrix(size_t index, const std::string& prefix, int threads,
                                       PanelOrder order = PanelOrder::kPlain) const {
    Shape shape;
    shape.n = integer(prefix + "N");
    shape.k = integer(prefix + "K");
    shape.bits = integer(prefix + "bits");
    shape.block = integer(prefix + "block_size");
    const auto* weights = constant<uint8_t>(index);
    const auto* scales = constant<float>(index + 1);
    if (!weights || !scales) throw std::runtime_error("the weights of a quantized product must be constants");
    return std::make_unique<PackedMatrix>(shape, weights, scales, constant<uint8_t>(index + 2), threads, order);
  }

 private:
  const ort::Api& api_;
  const ort::KernelInfo* info_;
};

// Runs a region on the session's threads.
inline void run(const ort::Api& api, const ort::KernelContext* context, Region& region) {
  if (!region.parallel()) return region.run();
  const auto work = [](void* data, size_t) { static_cast<Region*>(data)->run(); };
  check(api.parallel_for(context, work, static_cast<size_t>(region.threads()), &region));
}

}  // namespace wicore
