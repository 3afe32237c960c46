// The packing of tiles, compiled for the baseline of the architecture.
#include "tiles_kernel.h"

namespace exl {

void pack_tiles_portable(const TileSource& source, uint8_t* to, int64_t begin, int64_t end) {
  pack_range(source, to, begin, end);
}

}  // namespace exl
