// torch.ops.exl.argmax of rows, best of one, and sample_min_p: see ../cpu/sample.h
#include "../cpu/sample.h"

#include "../cpu/threads.h"
#include "checks.h"

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

int64_t op_best(const Tensor& logits) {
  check_cpu("best", "logits", logits, ScalarType::Float);
  check_shape("best", "logits", logits, {-1});
  return argmax(logits.const_data_ptr<float>(), logits.size(0));
}

int64_t op_sample_min_p(const Tensor& logits, double temperature, double min_p, double u) {
  check_cpu("sample_min_p", "logits", logits, ScalarType::Float);
  check_shape("sample_min_p", "logits", logits, {-1});
  EXL_CHECK(temperature > 0 && min_p >= 0 && min_p <= 1 && u >= 0 && u < 1,
            "exl::sample_min_p: wanted temperature > 0, 0 <= min_p <= 1 and 0 <= u < 1, got ", temperature, ", ", min_p,
            " and ", u);
  return sample_min_p(logits.const_data_ptr<float>(), logits.size(0), temperature, min_p, u);
}

}  // namespace
}  // namespace exl

STABLE_TORCH_LIBRARY_FRAGMENT(exl, m) {
  m.def("argmax(Tensor logits) -> Tensor");
  m.def("best(Tensor logits) -> int");
  m.def("sample_min_p(Tensor logits, float temperature, float min_p, float u) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(exl, CPU, m) {
  m.impl("argmax", TORCH_BOX(&exl::op_argmax));
  m.impl("best", TORCH_BOX(&exl::op_best));
  m.impl("sample_min_p", TORCH_BOX(&exl::op_sample_min_p));
}
