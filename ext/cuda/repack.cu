#include "repack.h"

#include "exl_cuda.h"

namespace exl {
namespace {

constexpr int kWarps = 4;

__device__ __forceinline__ uint32_t code_at(const RepackSource& s, int64_t word_row, int bit, int bits, int64_t n) {
  const uint32_t low = s.words[word_row * s.stride + n];
  const uint32_t high = bit + bits > 32 ? s.words[(word_row + 1) * s.stride + n] : 0u;
  return __funnelshift_r(low, high, unsigned(bit)) & ((1u << bits) - 1);
}

// One warp makes one tile. grid (ceil(unit_count / 4), tile columns).
__global__ void __launch_bounds__(kWarps * 32) repack(RepackSource s, uint8_t* tiles) {
  const int lane = int(threadIdx.x) & 31, g = lane >> 2, t = lane & 3;
  const int64_t unit = int64_t(blockIdx.x) * kWarps + (threadIdx.x >> 5);
  if (unit >= s.unit_count) return;
  const UnitEntry entry = s.units[unit];
  const int bits = int(entry.bits_group & 255u);
  const int high = bits >= 4 ? 4 : 0;  // bits below the 2-bit plane
  uint32_t four[4] = {}, eight[4] = {}, two[2] = {}, one = 0;
#pragma unroll
  for (int f = 0; f < 4; ++f) {
#pragma unroll
    for (int re = 0; re < 8; ++re) {
      const int r = re >> 1, e = re & 1;
      const int64_t n = int64_t(blockIdx.y) * kTileColumns32 + 16 * (f >> 1) + 8 * (r & 1) + g;
      const int k = 16 * (f & 1) + 8 * (r >> 1) + 2 * t + e;
      uint32_t code = 1u << (bits - 1);
      if (n < s.stride) {
        if (s.order == nullptr) {
          code = code_at(s, int64_t(entry.line) + k * bits / 32, k * bits % 32, bits, n);
        } else if (const int64_t row = s.order[unit * kUnitRows + k]; row >= 0) {
          code = code_at(s, row * bits / 32, int(row * bits % 32), bits, n);
        }
      }
      four[f] |= (code & 15u) << (4 * r + 16 * e);
      eight[f] |= (code >> 4) << (4 * r + 16 * e);
      two[f >> 1] |= (code >> high & 3u) << (8 * (f & 1) + 2 * r + 16 * e);
      one |= (code >> (bits - 1)) << (4 * f + r + 16 * e);
    }
  }
  unsigned char* tile = tiles + int64_t(blockIdx.y) * s.tile_stride + int64_t(entry.line) * kLineBytes;
  if (bits >= 4) {
    reinterpret_cast<uint4*>(tile)[lane] = make_uint4(four[0], four[1], four[2], four[3]);
    tile += 4 * kLineBytes;
  }
  if (bits == 8) reinterpret_cast<uint4*>(tile)[lane] = make_uint4(eight[0], eight[1], eight[2], eight[3]);
  if (bits & 2) {
    reinterpret_cast<uint2*>(tile)[lane] = make_uint2(two[0], two[1]);
    tile += 2 * kLineBytes;
  }
  if (bits & 1) reinterpret_cast<uint32_t*>(tile)[lane] = one;
}

}  // namespace

void repack_cuda(const RepackSource& source, uint8_t* tiles, cudaStream_t stream) {
  if (source.unit_count == 0 || source.columns == 0) return;
  const dim3 grid(unsigned((source.unit_count + kWarps - 1) / kWarps), unsigned(source.columns));
  EXL_LAUNCH((repack), grid, dim3(kWarps * 32), 0, stream, source, tiles);
}

}  // namespace exl
