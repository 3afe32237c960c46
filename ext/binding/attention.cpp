// Attention over the paged cache. Contract: cpu/attention.h.
#include "../cpu/attention.h"

#include "../common/kv_rows.h"

#include <cmath>
#include <limits>

#include "checks.h"
#include "shared.h"

namespace exl {
namespace {

constexpr const char* kOp = "paged_attention";

Tensor op_paged_attention(const Tensor& q, const Tensor& k_pages, const Tensor& v_pages, const Tensor& q_starts,
                          const Tensor& kv_lengths, const Tensor& pages, double scale, std::optional<int64_t> window,
                          std::optional<double> softcap) {
  AttentionArgs a{};
  check_cpu(kOp, "q", q, ScalarType::Float);
  check_shape(kOp, "q", q, {-1, -1, -1});
  const bool quantized = k_pages.scalar_type() == ScalarType::Byte;
  const int64_t wide = quantized ? -1 : q.size(2);
  if (quantized) {
    check_cpu(kOp, "k_pages", k_pages, ScalarType::Byte);
  } else {
    a.dtype = check_cpu_float(kOp, "k_pages", k_pages);
  }
  check_cpu(kOp, "v_pages", v_pages, k_pages.scalar_type());
  check_shape(kOp, "k_pages", k_pages, {-1, -1, -1, wide});
  check_shape(kOp, "v_pages", v_pages, {k_pages.size(0), k_pages.size(1), k_pages.size(2), wide});
  check_cpu(kOp, "q_starts", q_starts, ScalarType::Int);
  check_cpu(kOp, "kv_lengths", kv_lengths, ScalarType::Int);
  check_cpu(kOp, "pages", pages, ScalarType::Int);
  check_shape(kOp, "kv_lengths", kv_lengths, {-1});
  const int64_t sequences = kv_lengths.size(0);
  check_shape(kOp, "q_starts", q_starts, {sequences + 1});
  check_shape(kOp, "pages", pages, {sequences, -1});

  a.heads = q.size(1);
  a.head_dim = q.size(2);
  a.page_size = k_pages.size(1);
  a.kv_heads = k_pages.size(2);
  EXL_CHECK(a.heads > 0 && a.kv_heads > 0 && a.heads % a.kv_heads == 0, "exl::", kOp, ": ", a.heads,
            " query heads are not a multiple of ", a.kv_heads, " key/value heads");
  EXL_CHECK(a.head_dim > 0 && a.page_size > 0, "exl::", kOp, ": empty heads or pages, got ", describe(k_pages));
  if (quantized) {
    a.key_bits = kv_bits(k_pages.size(3), a.head_dim);
    a.value_bits = kv_bits(v_pages.size(3), a.head_dim);
    EXL_CHECK(a.key_bits > 0 && a.value_bits > 0, "exl::", kOp, ": rows of ", k_pages.size(3), " and ",
              v_pages.size(3), " bytes hold no quantized heads of ", a.head_dim, " values");
  }
  a.window = window.value_or(std::numeric_limits<int64_t>::max());
  EXL_CHECK(a.window > 0, "exl::", kOp, ": window must be positive or None, got ", a.window);
  a.softcap = float(softcap.value_or(0.0));
  EXL_CHECK(!softcap.has_value() || (std::isfinite(a.softcap) && a.softcap > 0), "exl::", kOp,
            ": softcap must be positive or None, got ", *softcap);
  a.scale = float(scale);
  a.sequences = sequences;
  a.table_width = pages.size(1);
  a.q_starts = static_cast<const int32_t*>(q_starts.data_ptr());
  a.kv_lengths = static_cast<const int32_t*>(kv_lengths.data_ptr());
  a.page_table = static_cast<const int32_t*>(pages.data_ptr());
  check_tables(kOp, a, q.size(0), k_pages.size(0));
  a.q = static_cast<const float*>(q.data_ptr());
  a.k_pages = k_pages.data_ptr();
  a.v_pages = v_pages.data_ptr();
  Tensor out = empty_like_cpu(q);
  a.out = static_cast<float*>(out.data_ptr());
  paged_attention_cpu(a);
  return out;
}

}  // namespace
}  // namespace exl

STABLE_TORCH_LIBRARY_FRAGMENT(exl, m) {
  m.def(
      "paged_attention(Tensor q, Tensor k_pages, Tensor v_pages, Tensor q_starts, Tensor kv_lengths, Tensor pages, "
      "float scale, int? window, float? softcap) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(exl, CPU, m) { m.impl("paged_attention", TORCH_BOX(&exl::op_paged_attention)); }
