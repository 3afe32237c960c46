// What encode.cpp asks of an instruction set: a table of functions, one table per encode_<isa>.cpp. No threads here.
#pragma once

#include <cstdint>

namespace exl {

constexpr int64_t kEncodeColumns = 32;  // of a tile: two AVX-512 registers; EXL2 pads to a multiple of it

// A group's rows of kEncodeColumns columns, packed: element (r, column) at [r * kEncodeColumns + column].
// A column's `moves` are what its rows pass on: row i > r is changed by matrix[r,i] * moves[r].
struct EncodeTile {
  int64_t rows;
  int bits;
  const float* matrix;  // (rows, rows): u of the feedback, h of the descent
  const float* start;   // w of the feedback, the gradient of the descent; not changed
  const float* q;       // descent: the values before the sweep
  const float* scales;  // (kEncodeColumns)
  float* moves;         // out: -e of the feedback, delta of the descent
  float* codes;         // out, unless null
  float* values;        // out, unless `codes` is null
  float* loss;          // out (kEncodeColumns), of the feedback, unless null
};

struct EncodeIsa {
  // scales: the 16 scales of codes 1 .. 16.  w packed as above  ->  codes, loss (kEncodeColumns)
  void (*search)(const float* w, const float* row_weights, const float* scales, int64_t rows, int bits, float* codes,
                 float* loss);
  void (*feedback)(const EncodeTile& tile);
  void (*descend)(const EncodeTile& tile);
};

const EncodeIsa& encode_portable();
const EncodeIsa& encode_avx2();
const EncodeIsa& encode_avx512();

}  // namespace exl
