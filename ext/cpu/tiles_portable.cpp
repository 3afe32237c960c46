// The packing of tiles, compiled for the baseline of the architecture.
#include "tiles_kernel.h"

namespace exl {

void pack_tiles_portable(const TileSource& source, const TileWords& words, uint8_t* to, int64_t begin, int64_t end) {
  pack_range(source, words, to, begin, end);
}

}  // namespace exl
