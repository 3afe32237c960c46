// torch.ops.exl.gated: see ../cpu/gated.h
#include "../cpu/gated.h"
#include "checks.h"
#include "shared.h"

namespace exl {
namespace {

// Rows of any number of dimensions, at one distance from each other: contiguous, or a slice of columns of such.
int64_t row_stride(const char* name, const Tensor& t) {
  const int64_t dims = t.dim(), cols = t.size(dims - 1);
  if (t.is_contiguous()) return cols;
  EXL_CHECK(t.stride(dims - 1) == 1, "exl::gated: the last dimension of ", name, " must be contiguous, got ",
            describe(t));
  int64_t stride = 0, expected = 0;  // dimensions of size 1 say nothing
  for (int64_t d = dims - 2; d >= 0; --d) {
    if (t.size(d) == 1) continue;
    if (stride == 0) stride = expected = t.stride(d);
    EXL_CHECK(t.stride(d) == expected, "exl::gated: the rows of ", name, " must be evenly spaced, got ", describe(t));
    expected = t.stride(d) * t.size(d);
  }
  return stride == 0 ? cols : stride;
}

Tensor op_gated(const Tensor& gate, const Tensor& up, const std::string& activation) {
  const ScalarType dtype = gate.scalar_type();
  EXL_CHECK(gate.is_cpu() && up.is_cpu() && is_float_dtype(dtype), "exl::gated: gate and up must be Float, Half or ",
            "BFloat16 CPU tensors, got ", describe(gate), " and ", describe(up));
  check_same_dtype("gated", "up", up, "gate", gate);
  bool same = gate.dim() == up.dim() && gate.dim() >= 1;
  for (int64_t d = 0; same && d < gate.dim(); ++d) same = gate.size(d) == up.size(d);
  EXL_CHECK(same, "exl::gated: gate and up must have the same shape, got ", describe(gate), " and ", describe(up));
  const Activation act = activation_of("gated", activation);
  Tensor out = empty_like_cpu(gate);
  const int64_t cols = gate.size(gate.dim() - 1), count = gate.numel();
  if (count == 0) return out;
  const Dtype kind = dtype == ScalarType::Float  ? Dtype::float32
                     : dtype == ScalarType::Half ? Dtype::float16
                                                 : Dtype::bfloat16;
  gated(gate.const_data_ptr(), up.const_data_ptr(), out.mutable_data_ptr(), kind, count / cols, cols,
        row_stride("gate", gate), row_stride("up", up), act);
  return out;
}

}  // namespace
}  // namespace exl

STABLE_TORCH_LIBRARY_FRAGMENT(exl, m) { m.def("gated(Tensor gate, Tensor up, str activation) -> Tensor"); }

STABLE_TORCH_LIBRARY_IMPL(exl, CPU, m) { m.impl("gated", TORCH_BOX(&exl::op_gated)); }
