// torch.ops.exl.argmax of rows, best and draw of one, and sample_min_p: see ../cpu/sample.h
#include "../cpu/sample.h"

#include "../cpu/threads.h"
#include "checks.h"
#include "shared.h"

namespace exl {
namespace {

Tensor op_argmax(const Tensor& logits) {
  check_cpu("argmax", "logits", logits, ScalarType::Float);
  check_shape("argmax", "logits", logits, {-1, -1});
  const int64_t rows = logits.size(0), cols = logits.size(1);
  Tensor out = empty_cpu({rows}, ScalarType::Long);
  const float* from = logits.const_data_ptr<float>();
  int64_t* to = out.mutable_data_ptr<int64_t>();
  parallel_for(rows, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) to[r] = argmax(from + r * cols, cols);
  });
  return out;
}

// float32 (n,) of any stride, as one piece.
const float* one_row(const char* op, const Tensor& logits) {
  EXL_CHECK(logits.is_cpu() && logits.scalar_type() == ScalarType::Float && logits.dim() == 1, "exl::", op,
            ": logits must be a CPU tensor of dtype Float and shape (*), got ", describe(logits));
  const float* from = logits.const_data_ptr<float>();
  const int64_t stride = logits.stride(0), count = logits.size(0);
  if (stride == 1 || count < 2) return from;
  static thread_local std::vector<float> row;
  row.resize(size_t(count));
  for (int64_t i = 0; i < count; ++i) row[size_t(i)] = from[i * stride];
  return row.data();
}

int64_t op_best(const Tensor& logits) { return argmax(one_row("best", logits), logits.size(0)); }

int64_t op_sample_min_p(const Tensor& logits, double temperature, double min_p, double u) {
  const float* row = one_row("sample_min_p", logits);
  check_draw("sample_min_p", {temperature, min_p, u, {nullptr, 0}}, logits.size(0));
  EXL_CHECK(temperature > 0, "exl::sample_min_p: wanted temperature > 0");
  return sample_min_p(row, logits.size(0), temperature, min_p, u);
}

int64_t op_draw(const Tensor& logits, double temperature, double min_p, double u, std::vector<int64_t> banned) {
  const float* row = one_row("draw", logits);
  const Draw how{temperature, min_p, u, {banned.data(), int64_t(banned.size())}};
  check_draw("draw", how, logits.size(0));
  return draw(row, logits.size(0), how);
}

}  // namespace
}  // namespace exl

STABLE_TORCH_LIBRARY_FRAGMENT(exl, m) {
  m.def("argmax(Tensor logits) -> Tensor");
  m.def("best(Tensor logits) -> int");
  m.def("draw(Tensor logits, float temperature, float min_p, float u, int[] banned) -> int");
  m.def("sample_min_p(Tensor logits, float temperature, float min_p, float u) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(exl, CPU, m) {
  m.impl("argmax", TORCH_BOX(&exl::op_argmax));
  m.impl("best", TORCH_BOX(&exl::op_best));
  m.impl("draw", TORCH_BOX(&exl::op_draw));
  m.impl("sample_min_p", TORCH_BOX(&exl::op_sample_min_p));
}
