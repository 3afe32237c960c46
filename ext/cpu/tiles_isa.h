// What tiles.cpp asks of an instruction set: one function per tiles_<isa>.cpp. No threads here.
#pragma once

#include "tiles.h"

namespace exl {

// Fills tiles [begin, end) of every panel. `to` holds the header, the spans and the panels already.
using PackTiles = void (*)(const TileSource& source, uint8_t* to, int64_t begin, int64_t end);

void pack_tiles_portable(const TileSource& source, uint8_t* to, int64_t begin, int64_t end);
void pack_tiles_avx2(const TileSource& source, uint8_t* to, int64_t begin, int64_t end);
void pack_tiles_avx512(const TileSource& source, uint8_t* to, int64_t begin, int64_t end);

}  // namespace exl
