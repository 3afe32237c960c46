// A quantized matrix as the CPU kernels read it: one piece of memory that describes itself, made once when a model is
// loaded. EXL2 and GPTQ of every width and group size look alike here. No torch here.
//
// Positions are the order in which a kernel meets the inputs. They come in units of 32; consecutive units with one
// width and one group form a span of at most 4 units, and the input has one quantization scale per span. A tile is 32
// columns (outputs). All codes are unsigned; a unit of a tile is `bits` lines of 128 bytes. Byte 4 * n + j of a line
// belongs to column n of 32 and to j of the 4 positions of a quad; quad q is positions 4q .. 4q + 3. So a 32-bit lane
// of a line, masked, is four codes of one column, beside four 8-bit inputs. Lines, from bit 0 of a byte on, q.i being
// bit i of the code in quad q:
//
//   8 bits   line l: quad l
//   4 bits   line l: quad 2l | quad 2l + 1
//   2 bits   line l: quad 4l | 4l + 1 | 4l + 2 | 4l + 3
//   6 bits   quad 0 | 3.01    quad 1 | 3.23    quad 2 | 3.45    quad 4 | 7.01    quad 5 | 7.23    quad 6 | 7.45
//   5 bits   quad 0 | 5.012    quad 1 | 5.34 | 7.3    quad 2 | 6.012    quad 3 | 6.34 | 7.4    quad 4 | 7.012
//   3 bits   quad 0 | quad 1 | 6.01    quad 2 | quad 3 | 7.01    quad 4 | quad 5 | 6.2 | 7.2
//
// A panel is as many spans as make at most 32 units: as much input, with its tables of scales, as stays in the cache
// of first level while the tiles of the panel pass by, one after another in one stream. (With 64 units they do not, and
// groups of 32 lose a third of the speed.) A second stream would cost half of the speed of memory; that is why the 32
// columns that share a loaded input lie side by side.
//
//   memory   PackedHeader | spans | panels | rows | tables | tiles of panel 0 | tiles of panel 1 | ...
//   tile     the units of the panel in order; at its begin and before every 8th, 2nd or 4th group the scales of the
//            groups up to the next such
//   scales   exl2: 8 groups of 2 times 16 nibbles s - 1, lowest first: columns 0 2 4 ... 14 1 3 5 ... 15, then 16 18
//                  20 ... 30 17 19 21 ... 31; the scale is tables[group][s - 1]
//            symmetric: 2 groups of 32 halves; the zero-point is 2^(bits - 1), as for exl2
//            zeros: 4 groups of 32 halves, then 4 groups of 32 bytes; the zero-point is zero_base more than the byte
//
// W = (code - zero) * scale, unrounded: the formats round this product to half, which the kernels do not.
//
// Outputs may be packed in another order than they are stored in: the source says which.
//
// reference: QuantFormat.dequantize      test: tests/ops/test_linear_packed.py, tests/ops/test_packing.py
#pragma once

#include <cstdint>

namespace exl {

constexpr int64_t kTileColumns = 32;
constexpr int64_t kUnit = 32;        // positions
constexpr int64_t kLine = 128;       // bytes
constexpr int64_t kSpanUnits = 4;    // at most
constexpr int64_t kPanelUnits = 32;  // at most

// Groups count from 0 in the order of positions, and none is left out.
struct Span {
  int32_t bits;
  int32_t group;
  int32_t units;
  int32_t scales;  // bytes of scales before it: 0, or scale_bytes(kind)
};

struct Panel {
  int64_t span, spans;  // the first and their number
  int64_t unit;         // the first
  int64_t at;           // tile 0, in bytes from the header
  int64_t tile_bytes;
};

enum class ScaleKind : int64_t { exl2 = 0, symmetric = 1, zeros = 2 };

constexpr int32_t scale_groups(ScaleKind kind) {  // whose scales lie together
  return kind == ScaleKind::exl2 ? 8 : kind == ScaleKind::symmetric ? 2 : 4;
}
constexpr int32_t scale_bytes(ScaleKind kind) { return kind == ScaleKind::zeros ? 384 : 128; }

struct PackedHeader {
  uint64_t magic;
  uint64_t signature;  // equal for matrices that take the same quantized input: equal rows and lengths of spans
  int64_t inputs, outputs, positions, groups, spans, panels;
  ScaleKind kind;
  int64_t zero_base;
  int64_t spans_at, panels_at, rows_at, tables_at, tiles_at;  // bytes from the header; rows_at 0: inputs in order
  int64_t bytes;                                              // of everything
};

constexpr uint64_t kPackedMagic = 0x32656c6974786c65;  // the last byte is the version of the layout

// Points into the memory of one matrix.
struct Packed {
  const PackedHeader* header;

  const uint8_t* at(int64_t offset) const { return reinterpret_cast<const uint8_t*>(header) + offset; }
  const Span* spans() const { return reinterpret_cast<const Span*>(at(header->spans_at)); }
  const int32_t* rows() const {  // which input stands at a position, -1: none; null: inputs in order
    return header->rows_at ? reinterpret_cast<const int32_t*>(at(header->rows_at)) : nullptr;
  }
  const float* tables() const { return reinterpret_cast<const float*>(at(header->tables_at)); }
  const Panel& panel(int64_t p) const { return reinterpret_cast<const Panel*>(at(header->panels_at))[p]; }
  int64_t tiles() const { return (header->outputs + kTileColumns - 1) / kTileColumns; }
};

// What a matrix is made from.
struct TileSource {
  const int32_t* words;  // [word_rows][stride]: column n is the bit stream of output n, bitstream.h
  int64_t word_rows, stride;
  int64_t inputs, outputs, groups;
  const Span* spans;  // their `scales` are not read
  int64_t span_count, positions;
  const int32_t* order;  // the stored row at each position, -1: none; null: stored rows in their order
  const int32_t* rows;   // the input at each position, -1: none; null: inputs in order
  const int32_t* columns;  // which column becomes output n, [outputs]; null: columns in order
  ScaleKind kind;
  const uint32_t* scale_words;  // EXL2: [groups][scale_stride], nibble n % 8 of word n / 8 belongs to column n
  int64_t scale_stride;
  const float* tables;     // EXL2: [groups][16]
  const uint16_t* scales;  // GPTQ: halves [groups][outputs]
  const uint8_t* zeros;    // GPTQ: [groups][outputs], or null
  int64_t zero_base;
};

// The header that pack_tiles writes; its `bytes` say how much memory the matrix takes.
PackedHeader packed_header(const TileSource& source);

void pack_tiles(const TileSource& source, uint8_t* to);

}  // namespace exl
