// What the drivers, linear_packed.cpp and linear_groups.cpp, ask of an instruction set: one table per
// linear_packed_<isa>.cpp. No threads here.
#pragma once

#include <cstdint>

#include "tiles.h"

namespace exl {

// What a row knows about the positions of a span. Without the residual an input is main * scale and `minus` the sum of
// main, negated; with it an input is (256 * main + rest) * scale, and `minus` the sum of that, negated.
struct InputSpan {
  float scale;
  int32_t minus;
};

// Quantized rows, `stride` bytes apart. A row: units of 32 bytes main, each followed by 32 bytes rest if `residual`;
// then, `spans_at` bytes from its begin, an InputSpan per span.
struct QuantizedRows {
  uint8_t* data;
  int64_t stride;
  int64_t spans_at;
  bool residual;
};

// The layout of the input of `w`, without its place.
QuantizedRows quantized_layout(const Packed& w, bool residual);

// How drivers cut the work.
constexpr int64_t kChunkBytes = 192 << 10;  // of tiles that many rows pass by: part of a second-level cache
constexpr int64_t kGrainBytes = 64 << 10;   // of one thread below which a region costs more than it saves
constexpr int64_t kFewRows = 16;            // up to here a tile passes by once

struct PackedIsa {
  // One row of x.
  void (*quantize)(const Packed& w, const float* x, bool residual, uint8_t* row, InputSpan* spans);
  // Rows [0, rows) of panel `panel` times the columns of tiles [begin, end): written to y (rows, outputs) for panel 0,
  // added to it for the others.
  void (*multiply)(const Packed& w, int64_t panel, int64_t begin, int64_t end, const QuantizedRows& x, int64_t rows,
                   float* y);
};

// The one in use.
const PackedIsa& linear_packed_isa();

const PackedIsa& linear_packed_portable();
const PackedIsa& linear_packed_avx2();
const PackedIsa& linear_packed_avxvnni();
const PackedIsa& linear_packed_avx512vnni();

}  // namespace exl
