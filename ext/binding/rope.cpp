// torch.ops.exl.rope_: see ../cpu/rope.h
#include "../cpu/rope.h"

#include "checks.h"

namespace exl {
namespace {

// Heads of a token contiguous, tokens any distance apart: q and k may be slices of one fused projection.
Dtype check_heads(const char* name, const Tensor& x, int64_t tokens, int64_t rotary_dim) {
  EXL_CHECK(x.is_cpu() && is_float_dtype(x.scalar_type()) && x.dim() == 3, "exl::rope_: ", name,
            " must be a Float, Half or BFloat16 CPU tensor (tokens, heads, head_dim), got ", describe(x));
  EXL_CHECK(x.size(0) == tokens, "exl::rope_: ", name, " must have as many tokens as cos (", tokens, "), got ",
            describe(x));
  EXL_CHECK(x.size(2) >= rotary_dim, "exl::rope_: the head_dim of ", name, " must be at least ", rotary_dim,
            ", twice the columns of cos, got ", describe(x));
  EXL_CHECK(x.numel() == 0 || (x.stride(2) == 1 && (x.size(1) == 1 || x.stride(1) == x.size(2))), "exl::rope_: ", name,
            " must hold the heads of a token contiguously, got ", describe(x));
  return x.scalar_type() == ScalarType::Float  ? Dtype::float32
         : x.scalar_type() == ScalarType::Half ? Dtype::float16
                                               : Dtype::bfloat16;
}

void op_rope(const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin) {
  check_cpu("rope_", "cos", cos, ScalarType::Float);
  check_cpu("rope_", "sin", sin, ScalarType::Float);
  check_shape("rope_", "cos", cos, {-1, -1});
  check_shape("rope_", "sin", sin, {cos.size(0), cos.size(1)});
  const int64_t tokens = cos.size(0), rotary_dim = 2 * cos.size(1);
  const Dtype q_dtype = check_heads("q", q, tokens, rotary_dim), k_dtype = check_heads("k", k, tokens, rotary_dim);
  const float *c = cos.const_data_ptr<float>(), *s = sin.const_data_ptr<float>();
  rope(q.mutable_data_ptr(), q_dtype, tokens, q.size(1), q.size(2), q.stride(0), rotary_dim, c, s);
  rope(k.mutable_data_ptr(), k_dtype, tokens, k.size(1), k.size(2), k.stride(0), rotary_dim, c, s);
}

}  // namespace
}  // namespace exl

STABLE_TORCH_LIBRARY_FRAGMENT(exl, m) {
  m.def("rope_(Tensor(a!) q, Tensor(b!) k, Tensor cos, Tensor sin) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(exl, CPU, m) { m.impl("rope_", TORCH_BOX(&exl::op_rope)); }
