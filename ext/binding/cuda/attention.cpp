// torch.ops.exl_cuda.{paged_attention, decode_workspace}: see ../../cuda/attention.h
#include "../../cuda/attention.h"

#include <cmath>
#include <limits>

#include "../../common/kv_rows.h"
#include "library.h"

namespace exl {
namespace {

constexpr const char* kAttention = "paged_attention";

// The numbers of a launch that come from shapes.
CudaAttention attention_shape(const Tensor& q, const Tensor& k_pages, const Tensor& pages,
                              std::optional<int64_t> window) {
  check_shape(kAttention, "q", q, {-1, -1, -1});
  check_shape(kAttention, "k_pages", k_pages, {-1, -1, -1, -1});
  check_shape(kAttention, "pages", pages, {-1, -1});
  constexpr int64_t most = std::numeric_limits<int32_t>::max();
  CudaAttention a{};
  a.heads = int(q.size(1)), a.head_dim = int(q.size(2));
  a.page_size = int(k_pages.size(1)), a.kv_heads = int(k_pages.size(2));
  EXL_CHECK(a.heads > 0 && a.kv_heads > 0 && a.heads % a.kv_heads == 0, "exl_cuda::", kAttention, ": ", a.heads,
            " query heads are not a multiple of ", a.kv_heads, " key/value heads");
  EXL_CHECK(attention_head_dim(a.head_dim), "exl_cuda::", kAttention, ": no kernel for heads of ", a.head_dim,
            " values");
  EXL_CHECK(a.page_size >= 16 && (a.page_size & (a.page_size - 1)) == 0, "exl_cuda::", kAttention,
            ": pages must hold a power of two of tokens, at least 16, got ", a.page_size);
  EXL_CHECK(q.size(0) <= most && pages.size(1) * a.page_size <= most, "exl_cuda::", kAttention, ": ", q.size(0),
            " queries over ", pages.size(1), " pages of a sequence are more than the kernels count");
  a.tokens = int(q.size(0)), a.sequences = int(pages.size(0)), a.table_width = int(pages.size(1));
  EXL_CHECK(!window.has_value() || *window > 0, "exl_cuda::", kAttention, ": window must be positive or None, got ",
            window.value_or(0));
  a.window = int(window.value_or(most) < most ? window.value_or(most) : most);
  return a;
}

std::tuple<int64_t, int64_t> cuda_decode_workspace(const Tensor& q, const Tensor& k_pages, const Tensor& pages,
                                                   std::optional<int64_t> window) {
  const DecodeWorkspace space = decode_workspace(attention_shape(q, k_pages, pages, window));
  return {space.floats, space.tickets};
}

void cuda_paged_attention(const Tensor& q, const Tensor& k_pages, const Tensor& v_pages, const Tensor& q_starts,
                          const Tensor& kv_lengths, const Tensor& pages, double scale, std::optional<int64_t> window,
                          std::optional<double> softcap, const Tensor& partial, const Tensor& tickets,
                          const Tensor& out, bool decode, bool prefill) {
  CudaAttention a = attention_shape(q, k_pages, pages, window);
  check_cuda(kAttention, "q", q, ScalarType::Half);
  check_cuda(kAttention, "out", out, ScalarType::Half);
  check_shape(kAttention, "out", out, {q.size(0), q.size(1), q.size(2)});
  const ScalarType held = k_pages.scalar_type();
  EXL_CHECK(held == ScalarType::Half || held == ScalarType::BFloat16 || held == ScalarType::Byte, "exl_cuda::",
            kAttention, ": k_pages must be Half, BFloat16 or Byte, got ", describe(k_pages));
  a.kind = held == ScalarType::Half       ? PageKind::float16
           : held == ScalarType::BFloat16 ? PageKind::bfloat16
                                          : PageKind::codes;
  check_cuda(kAttention, "k_pages", k_pages, held);
  check_cuda(kAttention, "v_pages", v_pages, held);
  const int64_t wide = a.kind == PageKind::codes ? -1 : a.head_dim;
  check_shape(kAttention, "k_pages", k_pages, {-1, -1, -1, wide});
  check_shape(kAttention, "v_pages", v_pages, {k_pages.size(0), k_pages.size(1), k_pages.size(2), wide});
  check_aligned(kAttention, "k_pages", k_pages, 16);
  check_aligned(kAttention, "v_pages", v_pages, 16);
  if (a.kind == PageKind::codes) {
    a.key_bits = kv_bits(k_pages.size(3), a.head_dim);
    a.value_bits = kv_bits(v_pages.size(3), a.head_dim);
    EXL_CHECK(a.key_bits > 0 && a.value_bits > 0, "exl_cuda::", kAttention, ": rows of ", k_pages.size(3), " and ",
              v_pages.size(3), " bytes hold no quantized heads of ", a.head_dim, " values");
  }
  check_cuda(kAttention, "q_starts", q_starts, ScalarType::Int);
  check_cuda(kAttention, "kv_lengths", kv_lengths, ScalarType::Int);
  check_cuda(kAttention, "pages", pages, ScalarType::Int);
  check_shape(kAttention, "kv_lengths", kv_lengths, {a.sequences});
  check_shape(kAttention, "q_starts", q_starts, {a.sequences + 1});
  check_cuda(kAttention, "partial", partial, ScalarType::Float);
  check_cuda(kAttention, "tickets", tickets, ScalarType::Int);
  for (const Tensor* t : {&k_pages, &v_pages, &q_starts, &kv_lengths, &pages, &partial, &tickets, &out}) {
    check_same_device(kAttention, "every tensor", *t, q);
  }
  const DecodeWorkspace space = decode_workspace(a);
  EXL_CHECK(!decode || (partial.numel() >= space.floats && tickets.numel() >= space.tickets), "exl_cuda::", kAttention,
            ": the workspace holds ", partial.numel(), " floats and ", tickets.numel(), " tickets, wanted ",
            space.floats, " and ", space.tickets);
  EXL_CHECK(!softcap.has_value() || (std::isfinite(*softcap) && *softcap > 0), "exl_cuda::", kAttention,
            ": softcap must be positive or None, got ", softcap.value_or(0.0));
  a.softcap = float(softcap.value_or(0.0));
  a.scale = float(scale);
  a.q = q.const_data_ptr(), a.k_pages = k_pages.const_data_ptr(), a.v_pages = v_pages.const_data_ptr();
  a.q_starts = q_starts.const_data_ptr<int32_t>();
  a.kv_lengths = kv_lengths.const_data_ptr<int32_t>();
  a.page_table = pages.const_data_ptr<int32_t>();
  a.out = out.mutable_data_ptr();
  a.partial = partial.mutable_data_ptr<float>();
  a.tickets = tickets.mutable_data_ptr<int32_t>();
  const OnDevice on(q);
  if (decode) attention_decode_cuda(a, on.stream());
  if (prefill) attention_prefill_cuda(a, on.stream());
}

}  // namespace
}  // namespace exl

EXL_CUDA_FRAGMENT(m) {
  m.def("decode_workspace(Tensor q, Tensor k_pages, Tensor pages, int? window) -> (int, int)");
  m.def(
      "paged_attention(Tensor q, Tensor k_pages, Tensor v_pages, Tensor q_starts, Tensor kv_lengths, Tensor pages, "
      "float scale, int? window, float? softcap, Tensor(a!) partial, Tensor(b!) tickets, Tensor(c!) out, bool decode, "
      "bool prefill) -> ()");
}

EXL_CUDA_IMPL(m) {
  m.impl("decode_workspace", TORCH_BOX(&exl::cuda_decode_workspace));
  m.impl("paged_attention", TORCH_BOX(&exl::cuda_paged_attention));
}
