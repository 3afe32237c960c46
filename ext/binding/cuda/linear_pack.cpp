// Making matrices for the CUDA kernels, and undoing it. Contracts: ../../cuda/tile.h, repack.h, dequant.h.
#include "../../cuda/dequant.h"
#include "../../cuda/repack.h"
#include "library.h"
#include "linear.h"

namespace exl {
namespace {

const int32_t* cuda_rows(const char* op, const char* name, const std::optional<Tensor>& t, int64_t positions,
                         const Tensor& like) {
  if (!t.has_value()) return nullptr;
  check_cuda(op, name, *t, ScalarType::Int);
  check_same_device(op, name, *t, like);
  check_shape(op, name, *t, {positions});
  return static_cast<const int32_t*>(t->data_ptr());
}

const UnitEntry* cuda_units(const char* op, const Tensor& units, const Tensor& like) {
  check_cuda(op, "units", units, ScalarType::Int);
  check_same_device(op, "units", units, like);
  check_shape(op, "units", units, {-1, 2});
  return static_cast<const UnitEntry*>(units.data_ptr());
}

// uint8 (columns, lines * 128): the tiles of all tile columns.
Tensor cuda_linear_repack(const Tensor& words, const std::optional<Tensor>& order, const Tensor& units, int64_t columns,
                          int64_t lines) {
  const char* op = "linear_repack";
  check_cuda(op, "words", words, ScalarType::Int);
  check_shape(op, "words", words, {-1, -1});
  EXL_CHECK(columns >= 0 && columns < 65536 && lines >= 0, "exl_cuda::", op, ": ", columns, " tile columns of ", lines,
            " lines; at most 65535 columns");
  RepackSource s{};
  s.words = static_cast<const uint32_t*>(words.data_ptr());
  s.word_rows = words.size(0);
  s.stride = words.size(1);
  s.units = cuda_units(op, units, words);
  s.unit_count = units.size(0);
  s.order = cuda_rows(op, "order", order, s.unit_count * kUnitRows, words);
  EXL_CHECK(s.order != nullptr || s.word_rows == lines, "exl_cuda::", op, ": units of ", lines,
            " word rows in order, got words ", describe(words));
  s.columns = columns;
  s.tile_stride = lines * kLineBytes;
  const OnDevice on(words);
  Tensor tiles = empty_cuda({columns, s.tile_stride}, ScalarType::Byte, words);
  repack_cuda(s, static_cast<uint8_t*>(tiles.data_ptr()), on.stream());
  return tiles;
}

// uint8 on the CPU: the addresses of a matrix, for the operators below and linear_plan. The tensors must outlive it.
Tensor cuda_linear_matrix(const Tensor& tiles, const Tensor& scales, const Tensor& units,
                          const std::optional<Tensor>& maxima, int64_t kind, int64_t zero_base, int64_t widest,
                          int64_t outputs) {
  const char* op = "linear_matrix";
  EXL_CHECK(kind >= 0 && kind <= 2, "exl_cuda::", op, ": kind is 0, 1 or 2, got ", kind);
  EXL_CHECK(widest >= 2 && widest <= 8 && widest != 7, "exl_cuda::", op, ": a width of ", widest, " bits");
  EXL_CHECK(zero_base >= 0 && zero_base <= 256, "exl_cuda::", op, ": zero_base ", zero_base, " of 0 to 256");
  CudaMatrix w{};
  w.kind = ScaleRecord(kind);
  w.record = record_bytes(w.kind);
  check_cuda(op, "tiles", tiles, ScalarType::Byte);
  check_cuda(op, "scales", scales, ScalarType::Byte);
  check_same_device(op, "scales", scales, tiles);
  const int64_t columns = (outputs + kTileColumns32 - 1) / kTileColumns32;
  check_shape(op, "tiles", tiles, {columns, -1});
  check_shape(op, "scales", scales, {columns, -1, w.record});
  check_aligned(op, "tiles", tiles, 16);
  check_aligned(op, "scales", scales, 16);
  w.tiles = static_cast<const uint8_t*>(tiles.data_ptr());
  w.scales = static_cast<const uint8_t*>(scales.data_ptr());
  w.units = cuda_units(op, units, tiles);
  w.tile_stride = tiles.size(1);
  w.unit_count = int32_t(units.size(0));
  w.groups = int32_t(scales.size(1));
  w.outputs = int32_t(outputs);
  w.widest = int32_t(widest);
  w.zero_base = int32_t(zero_base);
  EXL_CHECK((w.kind == ScaleRecord::exl2) == maxima.has_value(), "exl_cuda::", op, ": maxima belong to kind 0");
  if (maxima.has_value()) {
    check_cuda(op, "maxima", *maxima, ScalarType::Half);
    check_same_device(op, "maxima", *maxima, tiles);
    check_shape(op, "maxima", *maxima, {w.groups});
    w.maxima = static_cast<const uint16_t*>(maxima->data_ptr());
  }
  return linear_blob(LinearMatrixBlob{kLinearMatrixMagic, tiles.get_device_index(), w});
}

// out half (inputs, at least 32 * columns): its first 32 * columns numbers per row, rows 32 * columns apart.
void cuda_linear_dequant(const Tensor& matrix, const std::optional<Tensor>& rows, int64_t column, int64_t columns,
                         const Tensor& out) {
  const char* op = "linear_dequant";
  const CudaMatrix& w = linear_unblob<LinearMatrixBlob>(op, "matrix", matrix, kLinearMatrixMagic).matrix;
  check_cuda(op, "out", out, ScalarType::Half);
  check_shape(op, "out", out, {-1, columns * kTileColumns32});
  check_aligned(op, "out", out, 16);
  EXL_CHECK(column >= 0 && columns >= 0 && (column + columns - 1) * kTileColumns32 < w.outputs, "exl_cuda::", op,
            ": tile columns ", column, " to ", column + columns, " of ", w.outputs, " outputs");
  const int32_t* positions = cuda_rows(op, "rows", rows, int64_t(w.unit_count) * kUnitRows, out);
  EXL_CHECK(positions != nullptr || out.size(0) <= int64_t(w.unit_count) * kUnitRows, "exl_cuda::", op, ": ",
            w.unit_count, " units for out ", describe(out));
  const OnDevice on(out);
  dequant_cuda(w, positions, out.size(0), column, columns, out.data_ptr(), on.stream());
}

}  // namespace
}  // namespace exl

EXL_CUDA_FRAGMENT(m) {
  m.def("linear_repack(Tensor words, Tensor? order, Tensor units, int columns, int lines) -> Tensor");
  m.def(
      "linear_matrix(Tensor tiles, Tensor scales, Tensor units, Tensor? maxima, int kind, int zero_base, int widest, "
      "int outputs) -> Tensor");
  m.def("linear_dequant(Tensor matrix, Tensor? rows, int column, int columns, Tensor(a!) out) -> ()");
}

EXL_CUDA_IMPL(m) {
  m.impl("linear_repack", TORCH_BOX(&exl::cuda_linear_repack));
  m.impl("linear_matrix", TORCH_BOX(&exl::cuda_linear_matrix));
  m.impl("linear_dequant", TORCH_BOX(&exl::cuda_linear_dequant));
}
