// The packing of tiles, compiled for AVX2.
#include "tiles_kernel.h"

namespace exl {

void pack_tiles_avx2(const TileSource& source, uint8_t* to, int64_t begin, int64_t end) {
  pack_range(source, to, begin, end);
}

}  // namespace exl
