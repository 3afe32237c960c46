// torch.ops.exl.pack_tiles: see ../cpu/tiles.h and exl_runtime/ops/linear/tiles.py. What packed files need beside it.
#include "../cpu/tiles.h"

#include "../common/bitstream.h"
#include "../cpu/checksum.h"
#include "checks.h"

namespace exl {
namespace {

const int32_t* int32_pointer(const char* name, const Tensor& t, std::initializer_list<int64_t> shape) {
  check_cpu("pack_tiles", name, t, ScalarType::Int);
  check_shape("pack_tiles", name, t, shape);
  return static_cast<const int32_t*>(t.data_ptr());
}

// All entries in least .. limit - 1.
void check_range(const char* name, const int32_t* values, int64_t count, int64_t limit, int32_t least = -1) {
  for (int64_t i = 0; i < count; ++i) {
    EXL_CHECK(values[i] >= least && values[i] < limit, "exl::pack_tiles: ", name, "[", i, "] is ", values[i], " of ",
              limit);
  }
}

std::vector<Span> read_spans(const Tensor& table, int64_t groups) {
  const int32_t* row = int32_pointer("spans", table, {-1, 3});
  std::vector<Span> spans;
  for (int64_t i = 0; i < table.size(0); ++i, row += 3) {
    const Span s{row[0], row[1], row[2], 0};
    const int32_t last = spans.empty() ? -1 : spans.back().group;
    EXL_CHECK(legal_width(s.bits) && s.units >= 1 && s.units <= kSpanUnits && s.group <= last + 1 && s.group >= last &&
                  s.group >= 0 && s.group < groups,
              "exl::pack_tiles: span ", i, " is (", s.bits, " bits, group ", s.group, " after ", last, ", ", s.units,
              " units); ", groups, " groups");
    spans.push_back(s);
  }
  return spans;
}

// Fills `out`, uint8 (bytes,), if it is given. Returns the bytes that it must have.
int64_t op_pack_tiles(const Tensor& words, const Tensor& spans, const std::optional<Tensor>& order,
                      const std::optional<Tensor>& rows, const Tensor& scales, const std::optional<Tensor>& tables,
                      const std::optional<Tensor>& zeros, int64_t zero_base, int64_t inputs, int64_t outputs,
                      const std::optional<Tensor>& out, const std::optional<Tensor>& columns) {
  const char* op = "pack_tiles";
  TileSource s{};
  s.words = int32_pointer("words", words, {-1, -1});
  s.word_rows = words.size(0);
  s.stride = words.size(1);
  s.inputs = inputs;
  s.outputs = outputs;
  EXL_CHECK(outputs >= 0 && outputs <= s.stride && inputs >= 0, "exl::pack_tiles: ", inputs, " x ", outputs, " of ",
            describe(words));
  check_shape(op, "scales", scales, {-1, -1});
  s.groups = scales.size(0);
  const std::vector<Span> list = read_spans(spans, s.groups);
  s.spans = list.data();
  s.span_count = int64_t(list.size());
  int64_t bits = 0;
  for (const Span& span : list) {
    s.positions += span.units * kUnit;
    bits += span.units * kUnit * span.bits;
    EXL_CHECK(!order.has_value() || span.bits == list[0].bits, "exl::pack_tiles: order is for matrices of one width");
  }
  if (order.has_value()) {
    s.order = int32_pointer("order", *order, {s.positions});
    check_range("order", s.order, s.positions, list.empty() ? 0 : s.word_rows * 32 / list[0].bits);
  } else {
    EXL_CHECK(bits == s.word_rows * 32, "exl::pack_tiles: spans hold ", bits, " bits of ", s.word_rows * 32);
  }
  if (rows.has_value()) {
    s.rows = int32_pointer("rows", *rows, {s.positions});
    check_range("rows", s.rows, s.positions, inputs);
  } else {
    EXL_CHECK(s.positions == inputs, "exl::pack_tiles: ", s.positions, " positions for ", inputs, " inputs in order");
  }
  if (columns.has_value()) {
    s.columns = int32_pointer("columns", *columns, {outputs});
    check_range("columns", s.columns, outputs, outputs, 0);
  }
  if (tables.has_value()) {
    s.kind = ScaleKind::exl2;
    s.scale_words = reinterpret_cast<const uint32_t*>(int32_pointer("scales", scales, {-1, -1}));
    s.scale_stride = scales.size(1);
    EXL_CHECK(s.scale_stride * 8 >= outputs, "exl::pack_tiles: ", outputs, " outputs, scales ", describe(scales));
    check_cpu(op, "tables", *tables, ScalarType::Float);
    check_shape(op, "tables", *tables, {s.groups, 16});
    s.tables = static_cast<const float*>(tables->data_ptr());
  } else {
    s.kind = zeros.has_value() ? ScaleKind::zeros : ScaleKind::symmetric;
    check_cpu(op, "scales", scales, ScalarType::Half);
    check_shape(op, "scales", scales, {s.groups, outputs});
    s.scales = static_cast<const uint16_t*>(scales.data_ptr());
  }
  if (zeros.has_value()) {
    check_cpu(op, "zeros", *zeros, ScalarType::Byte);
    check_shape(op, "zeros", *zeros, {s.groups, outputs});
    s.zeros = static_cast<const uint8_t*>(zeros->data_ptr());
    s.zero_base = zero_base;
  }
  const int64_t bytes = packed_header(s).bytes;
  if (out.has_value()) {
    check_cpu(op, "out", *out, ScalarType::Byte);
    check_shape(op, "out", *out, {bytes});
    pack_tiles(s, static_cast<uint8_t*>(out->data_ptr()));
  }
  return bytes;
}

// The version of the layout of what pack_tiles makes.
int64_t op_packed_layout() { return int64_t(kPackedMagic); }

// bytes uint8 (N,) -> ../cpu/checksum.h, the same bits as a signed number.
int64_t op_checksum(const Tensor& bytes) {
  check_cpu("checksum", "bytes", bytes, ScalarType::Byte);
  check_shape("checksum", "bytes", bytes, {-1});
  return int64_t(checksum_cpu(static_cast<const uint8_t*>(bytes.data_ptr()), bytes.numel()));
}

}  // namespace
}  // namespace exl

STABLE_TORCH_LIBRARY_FRAGMENT(exl, m) {
  m.def(
      "pack_tiles(Tensor words, Tensor spans, Tensor? order, Tensor? rows, Tensor scales, Tensor? tables, "
      "Tensor? zeros, int zero_base, int inputs, int outputs, Tensor(a!)? out, Tensor? columns=None) -> int");
  m.def("packed_layout() -> int");
  m.def("checksum(Tensor bytes) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(exl, CPU, m) {
  m.impl("pack_tiles", TORCH_BOX(&exl::op_pack_tiles));
  m.impl("checksum", TORCH_BOX(&exl::op_checksum));
}

STABLE_TORCH_LIBRARY_IMPL(exl, CompositeExplicitAutograd, m) {
  m.impl("packed_layout", TORCH_BOX(&exl::op_packed_layout));
}
