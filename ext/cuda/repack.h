// Brings the codes of a matrix into the tiles of tile.h, on the device. Run once per matrix, when a model is loaded.
//
//   words    uint32 (word_rows, stride): column n is the bit stream of output n (formats/exl2.md 3.1)
//   order    null: position k of unit u is code k of the stream that begins at word row units[u].line (EXL2 in its
//            stored order; a unit of `bits` bits is `bits` word rows). Otherwise int32 (unit_count * 32): the stored
//            row at each position, -1 for none, all units having the same width (GPTQ).
//   units    tile.h, on the device
//   columns  tile columns to make; outputs at or past `stride`, and positions without a row, get the code 2^(bits - 1)
//   tiles    columns * tile_stride bytes
//
// test: tests/cuda/test_repack.py
#pragma once

#include "stream.h"
#include "tile.h"

namespace exl {

struct RepackSource {
  const uint32_t* words;
  int64_t word_rows, stride;
  const int32_t* order;
  const UnitEntry* units;
  int64_t unit_count, columns, tile_stride;
};

void repack_cuda(const RepackSource& source, uint8_t* tiles, cudaStream_t stream);

}  // namespace exl
