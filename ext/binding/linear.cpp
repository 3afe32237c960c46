// Matrix products with EXL2, GPTQ and dense weights. Contracts: cpu/linear.h; layouts: exl_runtime/ops/linear/tiles.py.
#include "../cpu/linear.h"

#include "../common/bitstream.h"
#include "checks.h"

namespace exl {
namespace {

void check_input(const char* op, const Tensor& x, int64_t inputs) {
  check_cpu(op, "x", x, ScalarType::Float);
  check_shape(op, "x", x, {-1, inputs});
}

// Fills everything but the scales. The tables are read on every call: they are a few hundred numbers, and a wrong one
// would read outside the weights.
GroupedWeights check_grouped(const char* op, const Tensor& x, const Tensor& codes, const Tensor& spans,
                             const Tensor& rows, int64_t groups, int64_t outputs) {
  check_cpu(op, "codes", codes, ScalarType::Byte);
  check_cpu(op, "spans", spans, ScalarType::Int);
  check_cpu(op, "rows", rows, ScalarType::Int);
  check_shape(op, "spans", spans, {-1, 3});
  check_shape(op, "rows", rows, {-1});
  check_shape(op, "x", x, {-1, -1});
  check_input(op, x, x.size(1));
  EXL_CHECK(outputs >= 0, "exl::", op, ": outputs must not be negative, got ", outputs);

  GroupedWeights w{};
  w.spans = static_cast<const Span*>(spans.data_ptr());
  w.span_count = spans.size(0);
  w.rows = static_cast<const int32_t*>(rows.data_ptr());
  w.positions = rows.size(0);
  w.groups = groups;
  w.inputs = x.size(1);
  w.outputs = outputs;

  int64_t position = 0;
  for (int64_t i = 0; i < w.span_count; ++i) {
    const Span& s = w.spans[i];
    EXL_CHECK(legal_width(s.bits) && s.group >= 0 && s.group < groups && s.steps > 0, "exl::", op, ": span ", i,
              " is (", s.bits, " bits, group ", s.group, ", ", s.steps, " steps); ", groups, " groups");
    const int64_t end = position + int64_t(s.steps) * kStepCodes;
    EXL_CHECK(position / kBlock == (end - 1) / kBlock, "exl::", op, ": span ", i, " crosses a block of ", kBlock);
    w.tile_bytes += int64_t(s.steps) * kTileColumns * step_bytes(s.bits);
    position = end;
  }
  EXL_CHECK(position == w.positions, "exl::", op, ": spans cover ", position, " positions, rows has ", w.positions);
  uint32_t beyond = 0;
  for (int64_t i = 0; i < w.positions; ++i) beyond |= uint32_t(w.rows[i] + 1 > w.inputs) | uint32_t(w.rows[i] < -1);
  EXL_CHECK(beyond == 0, "exl::", op, ": rows holds a number outside -1 .. ", w.inputs - 1);

  const int64_t tiles = (outputs + kTileColumns - 1) / kTileColumns;
  const int64_t wanted = tiles * w.tile_bytes + 2 * kCodePadding;
  EXL_CHECK(codes.numel() == wanted, "exl::", op, ": codes must have ", wanted, " bytes, got ", describe(codes));
  w.codes = static_cast<const uint8_t*>(codes.data_ptr()) + kCodePadding;
  return w;
}

Tensor op_linear_exl2(const Tensor& x, const Tensor& codes, const Tensor& scales, const Tensor& maxima,
                      const Tensor& spans, const Tensor& rows, int64_t outputs) {
  const char* op = "linear_exl2";
  const int64_t tiles = (outputs + kTileColumns - 1) / kTileColumns;
  check_cpu(op, "scales", scales, ScalarType::Short);
  check_shape(op, "scales", scales, {tiles, -1});
  const int64_t groups = scales.size(1);
  check_cpu(op, "maxima", maxima, ScalarType::Float);
  check_shape(op, "maxima", maxima, {(groups + 3) * kTileColumns});
  GroupedWeights w = check_grouped(op, x, codes, spans, rows, groups, outputs);
  w.scale_codes = static_cast<const uint16_t*>(scales.data_ptr());
  w.maxima = static_cast<const float*>(maxima.data_ptr());
  Tensor y = empty_cpu({x.size(0), outputs}, ScalarType::Float);
  linear_grouped_cpu(w, static_cast<const float*>(x.data_ptr()), static_cast<float*>(y.data_ptr()), x.size(0));
  return y;
}

Tensor op_linear_gptq(const Tensor& x, const Tensor& codes, const Tensor& scales, const std::optional<Tensor>& zeros,
                      const Tensor& spans, const Tensor& rows, int64_t outputs) {
  const char* op = "linear_gptq";
  const int64_t tiles = (outputs + kTileColumns - 1) / kTileColumns;
  check_cpu(op, "scales", scales, ScalarType::Half);
  check_shape(op, "scales", scales, {tiles, -1, kTileColumns});
  const int64_t groups = scales.size(1);
  GroupedWeights w = check_grouped(op, x, codes, spans, rows, groups, outputs);
  w.scales = static_cast<const uint16_t*>(scales.data_ptr());
  if (zeros.has_value()) {
    check_cpu(op, "zeros", *zeros, ScalarType::Half);
    check_shape(op, "zeros", *zeros, {tiles, groups, kTileColumns});
    w.zeros = static_cast<const uint16_t*>(zeros->data_ptr());
  }
  Tensor y = empty_cpu({x.size(0), outputs}, ScalarType::Float);
  linear_grouped_cpu(w, static_cast<const float*>(x.data_ptr()), static_cast<float*>(y.data_ptr()), x.size(0));
  return y;
}

Tensor op_linear_dense(const Tensor& x, const Tensor& weight) {
  const char* op = "linear_dense";
  const Dtype dtype = check_cpu_float(op, "weight", weight);
  check_shape(op, "weight", weight, {-1, -1});
  check_input(op, x, weight.size(1));
  const DenseWeights w{weight.data_ptr(), dtype, weight.size(1), weight.size(0)};
  Tensor y = empty_cpu({x.size(0), weight.size(0)}, ScalarType::Float);
  linear_dense_cpu(w, static_cast<const float*>(x.data_ptr()), static_cast<float*>(y.data_ptr()), x.size(0));
  return y;
}

}  // namespace
}  // namespace exl

STABLE_TORCH_LIBRARY_FRAGMENT(exl, m) {
  m.def(
      "linear_exl2(Tensor x, Tensor codes, Tensor scales, Tensor maxima, Tensor spans, Tensor rows, int outputs) "
      "-> Tensor");
  m.def(
      "linear_gptq(Tensor x, Tensor codes, Tensor scales, Tensor? zeros, Tensor spans, Tensor rows, int outputs) "
      "-> Tensor");
  m.def("linear_dense(Tensor x, Tensor weight) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(exl, CPU, m) {
  m.impl("linear_exl2", TORCH_BOX(&exl::op_linear_exl2));
  m.impl("linear_gptq", TORCH_BOX(&exl::op_linear_gptq));
  m.impl("linear_dense", TORCH_BOX(&exl::op_linear_dense));
}
