// torch.ops.exl_cuda.{rope_, append_kv, rope_append_}: see ../../cuda/kv_append.h
#include "../../cuda/kv_append.h"

#include "../../common/kv_rows.h"
#include "library.h"

namespace exl {
namespace {

// (tokens, heads, head_dim), the heads of a token contiguous, tokens any distance apart: slices of a fused projection.
Dtype check_cuda_heads(const char* op, const char* name, const Tensor& x, int64_t tokens, int64_t heads,
                       int64_t head_dim) {
  EXL_CHECK(is_on_card(x) && is_float_dtype(x.scalar_type()), "exl_cuda::", op, ": ", name,
            " must be a Float, Half or BFloat16 CUDA tensor, got ", describe(x));
  check_shape(op, name, x, {tokens, heads, head_dim});
  EXL_CHECK(x.numel() == 0 || (x.stride(2) == 1 && (x.size(1) == 1 || x.stride(1) == x.size(2))), "exl_cuda::", op,
            ": ", name, " must hold the heads of a token contiguously, got ", describe(x));
  EXL_CHECK(x.size(2) <= kMostHeadDim, "exl_cuda::", op, ": heads of ", name, " may have up to ", kMostHeadDim,
            " values, got ", x.size(2));
  return x.scalar_type() == ScalarType::Float  ? Dtype::float32
         : x.scalar_type() == ScalarType::Half ? Dtype::float16
                                               : Dtype::bfloat16;
}

void take_rotation(const char* op, const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin,
                   KvAppend& a) {
  check_cuda(op, "cos", cos, ScalarType::Float);
  check_cuda(op, "sin", sin, ScalarType::Float);
  check_shape(op, "cos", cos, {-1, -1});
  check_shape(op, "sin", sin, {cos.size(0), cos.size(1)});
  check_shape(op, "q", q, {cos.size(0), -1, -1});
  a.q_dtype = check_cuda_heads(op, "q", q, cos.size(0), -1, -1);
  a.k_dtype = check_cuda_heads(op, "k", k, cos.size(0), -1, q.size(2));
  a.tokens = cos.size(0);
  a.heads = int(q.size(1)), a.kv_heads = int(k.size(1)), a.head_dim = int(q.size(2));
  a.rotary_dim = int(2 * cos.size(1));
  EXL_CHECK(a.rotary_dim <= a.head_dim, "exl_cuda::", op, ": the head_dim of q must be at least ", a.rotary_dim,
            ", twice the columns of cos, got ", describe(q));
  for (const Tensor* t : {&k, &cos, &sin}) check_same_device(op, "k, cos or sin", *t, q);
  a.q = q.mutable_data_ptr(), a.q_stride = q.stride(0);
  a.k = k.mutable_data_ptr(), a.k_stride = k.stride(0);
  a.cos = cos.const_data_ptr<float>(), a.sin = sin.const_data_ptr<float>();
}

// The width of the codes in pages; 0: elements, of a.page_dtype.
int check_cuda_pages(const char* op, const char* name, const Tensor& pages, KvAppend& a) {
  if (pages.scalar_type() != ScalarType::Byte) {
    a.page_dtype = check_cuda_float(op, name, pages);
    check_shape(op, name, pages, {-1, -1, a.kv_heads, a.head_dim});
    return 0;
  }
  check_cuda(op, name, pages, ScalarType::Byte);
  const int bits = kv_bits(pages.size(3), a.head_dim);
  EXL_CHECK(bits > 0, "exl_cuda::", op, ": rows of ", pages.size(3), " bytes in ", name, " hold no quantized head of ",
            a.head_dim, " values");
  return bits;
}

void take_pages(const char* op, const Tensor& k, const Tensor& v, const Tensor& k_pages, const Tensor& v_pages,
                const Tensor& slots, KvAppend& a) {
  check_cuda(op, "slots", slots, ScalarType::Long);
  check_shape(op, "slots", slots, {-1});
  check_shape(op, "k", k, {slots.size(0), -1, -1});
  a.tokens = slots.size(0), a.kv_heads = int(k.size(1)), a.head_dim = int(k.size(2));
  a.k_dtype = check_cuda_heads(op, "k", k, a.tokens, a.kv_heads, a.head_dim);
  a.v_dtype = check_cuda_heads(op, "v", v, a.tokens, a.kv_heads, a.head_dim);
  check_shape(op, "k_pages", k_pages, {-1, -1, a.kv_heads, -1});
  check_shape(op, "v_pages", v_pages, {k_pages.size(0), k_pages.size(1), a.kv_heads, -1});
  check_same_dtype(op, "v_pages", v_pages, "k_pages", k_pages);
  a.key_bits = check_cuda_pages(op, "k_pages", k_pages, a);
  a.value_bits = check_cuda_pages(op, "v_pages", v_pages, a);
  for (const Tensor* t : {&v, &k_pages, &v_pages, &slots}) check_same_device(op, "v, pages or slots", *t, k);
  a.k = k.mutable_data_ptr(), a.k_stride = k.stride(0);
  a.v = v.const_data_ptr(), a.v_stride = v.stride(0);
  a.k_pages = k_pages.mutable_data_ptr(), a.v_pages = v_pages.mutable_data_ptr();
  a.slots = slots.const_data_ptr<int64_t>(), a.slot_count = k_pages.size(0) * k_pages.size(1);
}

void cuda_rope(const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin) {
  KvAppend a{};
  take_rotation("rope_", q, k, cos, sin, a);
  const OnDevice on(q);
  kv_append_cuda(a, on.stream());
}

void cuda_append_kv(const Tensor& k, const Tensor& v, const Tensor& k_pages, const Tensor& v_pages,
                    const Tensor& slots) {
  KvAppend a{};
  take_pages("append_kv", k, v, k_pages, v_pages, slots, a);
  const OnDevice on(k);
  kv_append_cuda(a, on.stream());
}

void cuda_rope_append(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cos, const Tensor& sin,
                      const Tensor& k_pages, const Tensor& v_pages, const Tensor& slots) {
  KvAppend a{};
  take_rotation("rope_append_", q, k, cos, sin, a);
  EXL_CHECK(slots.numel() == a.tokens, "exl_cuda::rope_append_: ", a.tokens, " tokens but ", slots.numel(), " slots");
  take_pages("rope_append_", k, v, k_pages, v_pages, slots, a);
  const OnDevice on(q);
  kv_append_cuda(a, on.stream());
}

}  // namespace
}  // namespace exl

EXL_CUDA_FRAGMENT(m) {
  m.def("rope_(Tensor(a!) q, Tensor(b!) k, Tensor cos, Tensor sin) -> ()");
  m.def("append_kv(Tensor k, Tensor v, Tensor(a!) k_pages, Tensor(b!) v_pages, Tensor slots) -> ()");
  m.def(
      "rope_append_(Tensor(a!) q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor(b!) k_pages, Tensor(c!) v_pages, "
      "Tensor slots) -> ()");
}

EXL_CUDA_IMPL(m) {
  m.impl("rope_", TORCH_BOX(&exl::cuda_rope));
  m.impl("append_kv", TORCH_BOX(&exl::cuda_append_kv));
  m.impl("rope_append_", TORCH_BOX(&exl::cuda_rope_append));
}
