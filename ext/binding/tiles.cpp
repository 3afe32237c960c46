// torch.ops.exl.fill_tiles: see ../cpu/tiles.h and exl_runtime/ops/linear/tiles.py
#include "../cpu/tiles.h"

#include "../common/bitstream.h"
#include "../cpu/linear.h"
#include "checks.h"

namespace exl {
namespace {

// words int32 (rows, columns >= outputs); order int32 (positions,) or none; codes uint8, the whole padded buffer, of
// which bytes [filled, filled + this region) of every tile are written.
void op_fill_tiles(const Tensor& words, const std::optional<Tensor>& order, const Tensor& codes, int64_t bits,
                   int64_t outputs, int64_t filled) {
  const char* op = "fill_tiles";
  check_cpu(op, "words", words, ScalarType::Int);
  check_shape(op, "words", words, {-1, -1});
  check_cpu(op, "codes", codes, ScalarType::Byte);
  EXL_CHECK(bits >= 2 && bits <= 8 && legal_width(int(bits)), "exl::fill_tiles: no codes have ", bits, " bits");
  EXL_CHECK(outputs >= 0 && outputs <= words.size(1), "exl::fill_tiles: ", outputs, " outputs of ", describe(words));
  TileRegion r{};
  r.words = static_cast<const int32_t*>(words.data_ptr());
  r.word_rows = words.size(0);
  r.stride = words.size(1);
  r.outputs = outputs;
  r.bits = int(bits);
  const int64_t rows = r.word_rows * 32 / bits;
  EXL_CHECK(r.word_rows * 32 % (8 * bits) == 0, "exl::fill_tiles: ", r.word_rows, " words are not whole codes");
  r.positions = rows;
  if (order.has_value()) {
    check_cpu(op, "order", *order, ScalarType::Int);
    check_shape(op, "order", *order, {-1});
    r.order = static_cast<const int32_t*>(order->data_ptr());
    r.positions = order->size(0);
    for (int64_t i = 0; i < r.positions; ++i) {
      EXL_CHECK(r.order[i] >= -1 && r.order[i] < rows, "exl::fill_tiles: order[", i, "] is ", r.order[i], " of ", rows);
    }
  }
  EXL_CHECK(r.positions % kStepCodes == 0, "exl::fill_tiles: ", r.positions, " positions are not whole steps");
  const int64_t tiles = (outputs + kTileColumns - 1) / kTileColumns, size = codes.numel() - 2 * kCodePadding;
  if (tiles == 0 || r.positions == 0) return;
  r.tile_bytes = size / tiles;
  const int64_t end = filled + r.positions / kStepCodes * kTileColumns * step_bytes(int(bits));
  EXL_CHECK(size >= 0 && size % tiles == 0 && filled >= 0 && end <= r.tile_bytes, "exl::fill_tiles: bytes ", filled,
            " to ", end, " of each of ", tiles, " tiles do not fit ", describe(codes));
  r.tiles = static_cast<uint8_t*>(codes.data_ptr()) + kCodePadding + filled;
  fill_tiles(r);
}

}  // namespace
}  // namespace exl

STABLE_TORCH_LIBRARY_FRAGMENT(exl, m) {
  m.def("fill_tiles(Tensor words, Tensor? order, Tensor(a!) codes, int bits, int outputs, int filled) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(exl, CPU, m) { m.impl("fill_tiles", TORCH_BOX(&exl::op_fill_tiles)); }
