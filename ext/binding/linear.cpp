// Matrix products with packed and with dense weights. Contracts: cpu/linear_packed.h, cpu/linear_dense.h.
#include "../cpu/linear_dense.h"
#include "../cpu/linear_packed.h"
#include "checks.h"
#include "shared.h"

namespace exl {
namespace {

const float* check_input(const char* op, const Tensor& x, int64_t inputs) {
  check_cpu(op, "x", x, ScalarType::Float);
  check_shape(op, "x", x, {-1, inputs});
  return static_cast<const float*>(x.data_ptr());
}

std::vector<Tensor> multiply(const char* op, const Tensor& x, const std::vector<Tensor>& weights,
                             int64_t residual_rows) {
  EXL_CHECK(!weights.empty() && weights.size() <= size_t(kMostTogether), "exl::", op, ": 1 to ", kMostTogether,
            " weights, got ", weights.size());
  Product products[kMostTogether];
  std::vector<Tensor> results;
  const float* input = nullptr;
  for (size_t i = 0; i < weights.size(); ++i) {
    const Packed w = check_packed(op, weights[i]);
    input = check_input(op, x, w.header->inputs);
    results.push_back(empty_cpu({x.size(0), w.header->outputs}, ScalarType::Float));
    products[i] = {w, static_cast<float*>(results.back().data_ptr())};
  }
  linear_packed_cpu(products, int(weights.size()), input, x.size(0), residual_rows);
  return results;
}

Tensor op_linear_packed(const Tensor& x, const Tensor& weight, int64_t residual_rows) {
  const char* op = "linear_packed";
  const Packed w = check_packed(op, weight);
  const float* input = check_input(op, x, w.header->inputs);
  Tensor y = empty_cpu({x.size(0), w.header->outputs}, ScalarType::Float);
  const Product product{w, static_cast<float*>(y.data_ptr())};
  linear_packed_cpu(&product, 1, input, x.size(0), residual_rows);
  return y;
}

std::vector<Tensor> op_linear_packed_many(const Tensor& x, std::vector<Tensor> weights, int64_t residual_rows) {
  return multiply("linear_packed_many", x, weights, residual_rows);
}

Tensor op_linear_dense(const Tensor& x, const Tensor& weight) {
  const char* op = "linear_dense";
  const Dtype dtype = check_cpu_float(op, "weight", weight);
  check_shape(op, "weight", weight, {-1, -1});
  const float* input = check_input(op, x, weight.size(1));
  const DenseWeights w{weight.data_ptr(), dtype, weight.size(1), weight.size(0)};
  Tensor y = empty_cpu({x.size(0), weight.size(0)}, ScalarType::Float);
  linear_dense_cpu(w, input, static_cast<float*>(y.data_ptr()), x.size(0));
  return y;
}

}  // namespace
}  // namespace exl

STABLE_TORCH_LIBRARY_FRAGMENT(exl, m) {
  m.def("linear_packed(Tensor x, Tensor weight, int residual_rows) -> Tensor");
  m.def("linear_packed_many(Tensor x, Tensor[] weights, int residual_rows) -> Tensor[]");
  m.def("linear_dense(Tensor x, Tensor weight) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(exl, CPU, m) {
  m.impl("linear_packed", TORCH_BOX(&exl::op_linear_packed));
  m.impl("linear_packed_many", TORCH_BOX(&exl::op_linear_packed_many));
  m.impl("linear_dense", TORCH_BOX(&exl::op_linear_dense));
}
