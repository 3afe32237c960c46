// torch.ops.exl.route: see ../cpu/route.h
#include "../cpu/route.h"

#include "checks.h"

namespace exl {
namespace {

std::tuple<Tensor, Tensor> op_route(const Tensor& logits, int64_t chosen, bool normalize) {
  check_cpu("route", "logits", logits, ScalarType::Float);
  check_shape("route", "logits", logits, {-1, -1});
  const int64_t rows = logits.size(0), experts = logits.size(1);
  EXL_CHECK(chosen >= 1 && chosen <= experts, "exl::route: ", chosen, " experts of ", experts, " for every token");
  Tensor weights = empty_cpu({rows, chosen}, ScalarType::Float), kinds = empty_cpu({rows, chosen}, ScalarType::Int);
  route(logits.const_data_ptr<float>(), rows, experts, chosen, normalize, weights.mutable_data_ptr<float>(),
        kinds.mutable_data_ptr<int32_t>());
  return {weights, kinds};
}

}  // namespace
}  // namespace exl

STABLE_TORCH_LIBRARY_FRAGMENT(exl, m) {
  m.def("route(Tensor logits, int chosen, bool normalize) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(exl, CPU, m) { m.impl("route", TORCH_BOX(&exl::op_route)); }
