// Rearranges the codes of a quantized matrix for the kernels of linear.h, once, when a model is loaded. No torch here.
//
// reference and test: tests/ops/test_linear_cpu.py
#pragma once

#include <cstdint>

namespace exl {

// One region: positions of one width.
//
//   words   the codes as stored, int32 [word_rows][stride], column n being the bit stream of output n
//   order   the row of the stored matrix that comes to each position, -1: code 0; null: rows stay in their order
//   tiles   the region's place in tile 0 of GroupedWeights::codes; the next tile's lies tile_bytes further
struct TileRegion {
  const int32_t* words;
  int64_t word_rows;
  int64_t stride;
  int64_t outputs;
  int bits;
  const int32_t* order;
  int64_t positions;  // multiple of 16; without `order` word_rows * 32 / bits
  uint8_t* tiles;
  int64_t tile_bytes;
};

void fill_tiles(const TileRegion& region);

}  // namespace exl
