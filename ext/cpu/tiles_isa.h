// What tiles.cpp asks of an instruction set: one function per tiles_<isa>.cpp. No threads here.
#pragma once

#include "tiles.h"

namespace exl {

// The words of some outputs, in their order: output n of them at words[row * stride + n].
struct TileWords {
  const int32_t* words;
  int64_t stride;
  int64_t columns;  // that exist; others count as zero
};

// Fills tiles [begin, end) of every panel; `words` begin with the first output of tile `begin`. `to` holds the header,
// the spans and the panels already.
using PackTiles = void (*)(const TileSource& source, const TileWords& words, uint8_t* to, int64_t begin, int64_t end);

void pack_tiles_portable(const TileSource& source, const TileWords& words, uint8_t* to, int64_t begin, int64_t end);
void pack_tiles_avx2(const TileSource& source, const TileWords& words, uint8_t* to, int64_t begin, int64_t end);
void pack_tiles_avx512(const TileSource& source, const TileWords& words, uint8_t* to, int64_t begin, int64_t end);

}  // namespace exl
