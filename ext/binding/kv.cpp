// torch.ops.exl.append_kv: see ../cpu/kv_append.h
#include "../cpu/kv_append.h"
#include "checks.h"

namespace exl {
namespace {

Dtype check_new(const char* name, const Tensor& x, int64_t tokens, const Tensor& pages) {
  EXL_CHECK(x.is_cpu() && is_float_dtype(x.scalar_type()), "exl::append_kv: ", name,
            " must be a Float, Half or BFloat16 CPU tensor, got ", describe(x));
  check_shape("append_kv", name, x, {tokens, pages.size(2), pages.size(3)});
  EXL_CHECK(x.numel() == 0 || (x.stride(2) == 1 && (x.size(1) == 1 || x.stride(1) == x.size(2))), "exl::append_kv: ",
            name, " must hold the heads of a token contiguously, got ", describe(x));
  return x.scalar_type() == ScalarType::Float  ? Dtype::float32
         : x.scalar_type() == ScalarType::Half ? Dtype::float16
                                               : Dtype::bfloat16;
}

void op_append_kv(const Tensor& k, const Tensor& v, const Tensor& k_pages, const Tensor& v_pages, const Tensor& slots) {
  const Dtype k_to = check_cpu_float("append_kv", "k_pages", k_pages);
  const Dtype v_to = check_cpu_float("append_kv", "v_pages", v_pages);
  check_shape("append_kv", "k_pages", k_pages, {-1, -1, -1, -1});
  check_shape("append_kv", "v_pages", v_pages,
              {k_pages.size(0), k_pages.size(1), k_pages.size(2), k_pages.size(3)});
  check_cpu("append_kv", "slots", slots, ScalarType::Long);
  check_shape("append_kv", "slots", slots, {-1});
  const int64_t tokens = slots.size(0), width = k_pages.size(2) * k_pages.size(3);
  const Dtype k_from = check_new("k", k, tokens, k_pages), v_from = check_new("v", v, tokens, v_pages);
  const int64_t* slot = slots.const_data_ptr<int64_t>();
  const int64_t slot_count = k_pages.size(0) * k_pages.size(1);
  const int64_t bad = bad_slot(slot, tokens, slot_count);
  EXL_CHECK(bad < 0, "exl::append_kv: slots[", bad, "] is ", slot[bad < 0 ? 0 : bad], ", the pages have slots 0 to ",
            slot_count - 1);
  if (tokens == 0 || width == 0) return;
  kv_append(k.const_data_ptr(), k_from, k_pages.mutable_data_ptr(), k_to, slot, tokens, width, k.stride(0));
  kv_append(v.const_data_ptr(), v_from, v_pages.mutable_data_ptr(), v_to, slot, tokens, width, v.stride(0));
}

}  // namespace
}  // namespace exl

STABLE_TORCH_LIBRARY_FRAGMENT(exl, m) {
  m.def("append_kv(Tensor k, Tensor v, Tensor(a!) k_pages, Tensor(b!) v_pages, Tensor slots) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(exl, CPU, m) { m.impl("append_kv", TORCH_BOX(&exl::op_append_kv)); }
