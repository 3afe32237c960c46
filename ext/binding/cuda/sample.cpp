// Sampling and the step to the next token on CUDA: see ../../cuda/sample.h.
#include <climits>

#include "../../cuda/sample.h"
#include "library.h"

namespace exl {
namespace {

void sample_check(const char* name, const Tensor& t, ScalarType dtype, std::initializer_list<int64_t> shape,
                  const Tensor& like) {
  EXL_CHECK(t.scalar_type() == dtype && is_on_card(t) && t.get_device_index() == like.get_device_index() && t.is_contiguous(), "exl_cuda::sample: ", name,
            " must be a contiguous ", torch::headeronly::toString(dtype), " tensor beside the logits, got ",
            describe(t));
  check_shape("sample", name, t, shape);
}

void op_cuda_sample(const Tensor& logits, const Tensor& slots, const Tensor& reals, const Tensor& wholes,
                    const Tensor& bias, const Tensor& counts, const Tensor& history, const Tensor& x,
                    const std::optional<Tensor>& weights, const Tensor& work, const Tensor& out, bool draws) {
  sample_check("logits", logits, ScalarType::Float, {-1, -1}, logits);
  const int64_t rows = logits.size(0), vocab = logits.size(1);
  EXL_CHECK(vocab >= 1 && vocab <= kSampleVocab && rows <= 65535, "exl_cuda::sample: 1 to ", kSampleVocab,
            " tokens and up to 65535 rows, got ", describe(logits));
  sample_check("slots", slots, ScalarType::Int, {rows}, logits);
  sample_check("reals", reals, ScalarType::Double, {-1, kSampleReals}, logits);
  sample_check("wholes", wholes, ScalarType::Long, {reals.size(0), kSampleWholes}, logits);
  sample_check("bias", bias, ScalarType::Float, {-1, vocab}, logits);
  sample_check("counts", counts, ScalarType::Int, {-1, vocab}, logits);
  sample_check("history", history, ScalarType::Int, {reals.size(0), -1}, logits);
  sample_check("x", x, ScalarType::Float, {-1, vocab}, logits);
  sample_check("work", work, ScalarType::Long, {-1, sample_work(vocab)}, logits);
  sample_check("out", out, ScalarType::Long, {rows}, logits);
  EXL_CHECK(x.size(0) >= rows && work.size(0) >= rows, "exl_cuda::sample: room for ", rows, " rows, got ", describe(x),
            " and ", describe(work));
  uint64_t* heavy = nullptr;
  if (weights.has_value()) {
    sample_check("weights", *weights, ScalarType::Long, {-1, vocab}, logits);
    EXL_CHECK(weights->size(0) >= rows, "exl_cuda::sample: weights for ", rows, " rows, got ", describe(*weights));
    heavy = reinterpret_cast<uint64_t*>(weights->mutable_data_ptr<int64_t>());
  }
  const OnDevice on(logits);
  const SampleState state{reals.const_data_ptr<double>(),    wholes.mutable_data_ptr<int64_t>(),
                          bias.const_data_ptr<float>(),      counts.mutable_data_ptr<int32_t>(),
                          history.mutable_data_ptr<int32_t>(), history.size(1)};
  sample_cuda(logits.const_data_ptr<float>(), slots.const_data_ptr<int32_t>(), state, x.mutable_data_ptr<float>(),
              heavy, reinterpret_cast<uint64_t*>(work.mutable_data_ptr<int64_t>()), out.mutable_data_ptr<int64_t>(),
              rows, vocab, draws, heavy != nullptr, on.stream());
}

void op_cuda_advance(const Tensor& drawn, const Tensor& tokens, const Tensor& positions, const Tensor& slots,
                     const Tensor& kv_lengths, const Tensor& pages, int64_t page_size) {
  sample_check("drawn", drawn, ScalarType::Long, {-1}, drawn);
  const int64_t rows = drawn.size(0);
  sample_check("tokens", tokens, ScalarType::Long, {rows}, drawn);
  sample_check("positions", positions, ScalarType::Long, {rows}, drawn);
  sample_check("slots", slots, ScalarType::Long, {rows}, drawn);
  sample_check("kv_lengths", kv_lengths, ScalarType::Int, {rows}, drawn);
  sample_check("pages", pages, ScalarType::Int, {rows, -1}, drawn);
  EXL_CHECK(page_size > 0 && (rows == 0 || pages.size(1) > 0), "exl_cuda::advance: no pages: ", describe(pages));
  const OnDevice on(drawn);
  advance_cuda(drawn.const_data_ptr<int64_t>(), tokens.mutable_data_ptr<int64_t>(),
               positions.mutable_data_ptr<int64_t>(), slots.mutable_data_ptr<int64_t>(),
               kv_lengths.mutable_data_ptr<int32_t>(), pages.const_data_ptr<int32_t>(), rows, pages.size(1), page_size,
               on.stream());
}

}  // namespace
}  // namespace exl

EXL_CUDA_FRAGMENT(m) {
  m.def(
      "sample(Tensor logits, Tensor slots, Tensor reals, Tensor(a!) wholes, Tensor bias, Tensor(b!) counts, "
      "Tensor(c!) history, Tensor(d!) x, Tensor(e!)? weights, Tensor(f!) work, Tensor(g!) out, bool draws) -> ()");
  m.def(
      "advance(Tensor drawn, Tensor(a!) tokens, Tensor(b!) positions, Tensor(c!) slots, Tensor(d!) kv_lengths, Tensor "
      "pages, int page_size) -> ()");
}

EXL_CUDA_IMPL(m) {
  m.impl("sample", TORCH_BOX(&exl::op_cuda_sample));
  m.impl("advance", TORCH_BOX(&exl::op_cuda_advance));
}
