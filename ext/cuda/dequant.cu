#include "dequant.h"

#include "tile.cuh"

namespace exl {
namespace {

constexpr int kWarps = 4, kPitch = 40;  // halves of a row in shared memory: rows stay aligned to 16 bytes

template <int BITS, int F, int R>
__device__ __forceinline__ void put(const tile::Codes<BITS>& codes, const tile::GroupScales& scales,
                                    __half (*to)[kPitch], int g, int t) {
  constexpr int entry = 2 * (F >> 1) + (R & 1);
  const __half2 scale = __half2half2(scales.scale(entry));
  const __half2 w = __hmul2(tile::as_half2(codes.template code<F, R>(scales.zero[entry])), scale);
  const int k = 16 * (F & 1) + 8 * (R >> 1) + 2 * t, n = 8 * entry + g;
  to[k][n] = __low2half(w);
  to[k + 1][n] = __high2half(w);
}

template <int BITS, int F>
__device__ __forceinline__ void put_fragment(const tile::Codes<BITS>& codes, const tile::GroupScales& scales,
                                             __half (*to)[kPitch], int g, int t) {
  put<BITS, F, 0>(codes, scales, to, g, t);
  put<BITS, F, 1>(codes, scales, to, g, t);
  put<BITS, F, 2>(codes, scales, to, g, t);
  put<BITS, F, 3>(codes, scales, to, g, t);
}

template <int BITS>
__device__ __forceinline__ void put_tile(const unsigned char* from, const tile::GroupScales& scales,
                                         __half (*to)[kPitch], int lane) {
  tile::Codes<BITS> codes;
  codes.load(from, lane);
  put_fragment<BITS, 0>(codes, scales, to, lane >> 2, lane & 3);
  put_fragment<BITS, 1>(codes, scales, to, lane >> 2, lane & 3);
  put_fragment<BITS, 2>(codes, scales, to, lane >> 2, lane & 3);
  put_fragment<BITS, 3>(codes, scales, to, lane >> 2, lane & 3);
}

// One warp, one tile, through shared memory so that rows are written in pieces of 64 bytes. grid (units / 4, columns).
__global__ void __launch_bounds__(kWarps * 32)
    dequant(CudaMatrix w, const int32_t* rows, int64_t inputs, int64_t column, uint4* out) {
  EXL_SHARED(__half, shared, [kWarps][kUnitRows][kPitch]);
  const int lane = int(threadIdx.x) & 31, warp = int(threadIdx.x) >> 5;
  const int unit = int(blockIdx.x) * kWarps + warp;
  if (unit >= w.unit_count) return;
  const UnitEntry entry = w.units[unit];
  const int bits = int(entry.bits_group & 255u), group = int(entry.bits_group >> 8);
  const int64_t tile_column = column + blockIdx.y;
  const unsigned char* from = w.tiles + tile_column * w.tile_stride + int64_t(entry.line) * kLineBytes;
  tile::GroupScales scales;
  scales.load(w, w.scales + (tile_column * w.groups + group) * w.record, bits, group, lane >> 2);
  __half(*to)[kPitch] = shared[warp];
  switch (bits) {
    case 2: put_tile<2>(from, scales, to, lane); break;
    case 3: put_tile<3>(from, scales, to, lane); break;
    case 4: put_tile<4>(from, scales, to, lane); break;
    case 5: put_tile<5>(from, scales, to, lane); break;
    case 6: put_tile<6>(from, scales, to, lane); break;
    default: put_tile<8>(from, scales, to, lane); break;
  }
  __syncwarp();
  const int64_t row_pieces = int64_t(gridDim.y) * 4;  // of 16 bytes
#pragma unroll
  for (int i = lane; i < kUnitRows * 4; i += 32) {
    const int position = unit * kUnitRows + i / 4;
    const int64_t k = rows == nullptr ? position : rows[position];
    if (k < 0 || k >= inputs) continue;
    out[k * row_pieces + blockIdx.y * 4 + i % 4] = *reinterpret_cast<const uint4*>(&to[i / 4][i % 4 * 8]);
  }
}

}  // namespace

void dequant_cuda(const CudaMatrix& w, const int32_t* rows, int64_t inputs, int64_t column, int64_t columns, void* out,
                  cudaStream_t stream) {
  if (w.unit_count == 0 || columns == 0) return;
  const dim3 grid(unsigned((w.unit_count + kWarps - 1) / kWarps), unsigned(columns));
  EXL_LAUNCH((dequant), grid, dim3(kWarps * 32), 0, stream, w, rows, inputs, column, static_cast<uint4*>(out));
}

}  // namespace exl
