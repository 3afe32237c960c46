// torch.ops.exl.append_kv: see ../cpu/kv_append.h
#include "../common/kv_rows.h"
#include "../cpu/kv_append.h"
#include "checks.h"

namespace exl {
namespace {

Dtype check_new(const char* name, const Tensor& x, int64_t tokens, int64_t kv_heads, int64_t head_dim) {
  EXL_CHECK(x.is_cpu() && is_float_dtype(x.scalar_type()), "exl::append_kv: ", name,
            " must be a Float, Half or BFloat16 CPU tensor, got ", describe(x));
  check_shape("append_kv", name, x, {tokens, kv_heads, head_dim});
  EXL_CHECK(x.numel() == 0 || (x.stride(2) == 1 && (x.size(1) == 1 || x.stride(1) == x.size(2))), "exl::append_kv: ",
            name, " must hold the heads of a token contiguously, got ", describe(x));
  return x.scalar_type() == ScalarType::Float  ? Dtype::float32
         : x.scalar_type() == ScalarType::Half ? Dtype::float16
                                               : Dtype::bfloat16;
}

// The pages of keys or of values: elements of a float dtype, or rows of codes of `bits` bits.
struct Pages {
  Dtype dtype;
  int bits;  // 0: elements
};

Pages check_pages(const char* name, const Tensor& pages, int64_t head_dim) {
  if (pages.scalar_type() != ScalarType::Byte) {
    const Dtype dtype = check_cpu_float("append_kv", name, pages);
    check_shape("append_kv", name, pages, {-1, -1, -1, head_dim});
    return {dtype, 0};
  }
  check_cpu("append_kv", name, pages, ScalarType::Byte);
  const int bits = kv_bits(pages.size(3), head_dim);
  EXL_CHECK(bits > 0, "exl::append_kv: rows of ", pages.size(3), " bytes in ", name, " hold no quantized head of ",
            head_dim, " values");
  return {Dtype::float32, bits};
}

void op_append_kv(const Tensor& k, const Tensor& v, const Tensor& k_pages, const Tensor& v_pages, const Tensor& slots) {
  check_shape("append_kv", "k_pages", k_pages, {-1, -1, -1, -1});
  check_shape("append_kv", "v_pages", v_pages, {k_pages.size(0), k_pages.size(1), k_pages.size(2), -1});
  const bool quantized = k_pages.scalar_type() == ScalarType::Byte;
  if (quantized) check_shape("append_kv", "k", k, {-1, -1, -1});
  const int64_t head_dim = quantized ? k.size(2) : k_pages.size(3);
  const Pages k_to = check_pages("k_pages", k_pages, head_dim), v_to = check_pages("v_pages", v_pages, head_dim);
  const int64_t kv_heads = k_pages.size(2), slot_count = k_pages.size(0) * k_pages.size(1);
  check_cpu("append_kv", "slots", slots, ScalarType::Long);
  check_shape("append_kv", "slots", slots, {-1});
  const int64_t tokens = slots.size(0);
  const Dtype k_from = check_new("k", k, tokens, kv_heads, head_dim);
  const Dtype v_from = check_new("v", v, tokens, kv_heads, head_dim);
  const int64_t* slot = slots.const_data_ptr<int64_t>();
  const int64_t bad = bad_slot(slot, tokens, slot_count);
  EXL_CHECK(bad < 0, "exl::append_kv: slots[", bad, "] is ", slot[bad < 0 ? 0 : bad], ", the pages have slots 0 to ",
            slot_count - 1);
  if (tokens == 0 || kv_heads * head_dim == 0) return;
  const auto append = [&](const Tensor& x, Dtype from, const Tensor& pages, Pages to) {
    if (to.bits == 0) {
      kv_append(x.const_data_ptr(), from, pages.mutable_data_ptr(), to.dtype, slot, tokens, kv_heads * head_dim,
                x.stride(0));
    } else {
      kv_append_codes(x.const_data_ptr(), from, static_cast<uint8_t*>(pages.mutable_data_ptr()), to.bits, slot, tokens,
                      kv_heads, head_dim, x.stride(0));
    }
  };
  append(k, k_from, k_pages, k_to);
  append(v, v_from, v_pages, v_to);
}

}  // namespace
}  // namespace exl

STABLE_TORCH_LIBRARY_FRAGMENT(exl, m) {
  m.def("append_kv(Tensor k, Tensor v, Tensor(a!) k_pages, Tensor(b!) v_pages, Tensor slots) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(exl, CPU, m) { m.impl("append_kv", TORCH_BOX(&exl::op_append_kv)); }
