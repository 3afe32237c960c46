// torch.ops.exl.rms_norm: see ../cpu/rms_norm.h
#include "../cpu/rms_norm.h"
#include "checks.h"

namespace exl {
namespace {

Tensor op_rms_norm(const Tensor& x, const Tensor& weight, double eps, double weight_offset) {
  const Dtype dtype = check_cpu_float("rms_norm", "x", x);
  check_cpu("rms_norm", "weight", weight, ScalarType::Float);
  EXL_CHECK(x.dim() >= 1, "exl::rms_norm: x must have at least one dimension");
  const int64_t cols = x.size(x.dim() - 1);
  check_shape("rms_norm", "weight", weight, {cols});
  Tensor y = empty_like_cpu(x);
  const int64_t rows = cols == 0 ? 0 : x.numel() / cols;
  rms_norm(x.const_data_ptr(), weight.const_data_ptr<float>(), y.mutable_data_ptr(), dtype, rows, cols, float(eps),
           float(weight_offset));
  return y;
}

}  // namespace
}  // namespace exl

STABLE_TORCH_LIBRARY_FRAGMENT(exl, m) {
  m.def("rms_norm(Tensor x, Tensor weight, float eps, float weight_offset) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(exl, CPU, m) { m.impl("rms_norm", TORCH_BOX(&exl::op_rms_norm)); }
