#include "matmul_op.h"

#include <algorithm>

#include "linear.h"
#include "scratch.h"

namespace wicore {

QuantizedMatMul::QuantizedMatMul(const ort::Api& api, const ort::KernelInfo* info) : api_(api) {
  const NodeInfo node(api, info);
  threads_ = static_cast<int>(node.integer("threads"));
  matrix_ = node.matrix(1, "", threads_);
  bias_ = node.vector(4, matrix_->shape().n);
}

void QuantizedMatMul::compute(ort::KernelContext* context) const {
  const ort::Value* input = nullptr;
  check(api_.input(context, 0, &input));
  std::vector<int64_t> dims = shape_of(api_, input);
  const Shape& shape = matrix_->shape();
  if (dims.empty() || dims.back() != shape.k) {
    throw std::runtime_error("QuantizedMatMul: the last dimension of A is not K = " + std::to_string(shape.k));
  }
  int64_t rows = 1;
  for (size_t i = 0; i + 1 < dims.size(); ++i) rows *= dims[i];
  dims.back() = shape.n;
  ort::Value* output = nullptr;
  check(api_.output(context, 0, dims.data(), dims.size(), &output));
  const auto* x = data_of<float>(api_, input);
  auto* out = data_of<float>(api_, output);
  const Kernel kernel = kernel_for(rows);
  for (int64_t first = 0; first < rows; first += kRowsAtOnce) {
    const int64_t count = std::min(kRowsAtOnce, rows - first);
    const Operand operand(shape, count, kernel, node_scratch().at_least(Operand::bytes(shape, count, kernel)));
    Region region(threads_);
    add_fill(region, operand, x + first * shape.k);
    add_product(region, *matrix_, operand, bias_.empty() ? nullptr : bias_.data(), out + first * shape.n);
    run(api_, context, region);
  }
}

}  // namespace wicore
