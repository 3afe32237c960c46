// See planted.h. The shape of a real kernel: a cp.async ring per warp, mma on 4-bit weights, split K, the last block to
// arrive adds the parts in order.
#include "planted.h"

#include "../../../ext/cuda/ptx.h"

int planted_bug = kNone;

namespace {

constexpr int kWarps = 4, kStages = 4, kGroup = 64;  // a group is two tiles of 32 rows
constexpr int kRows = 8;                             // of x, the N side of the mma

__device__ __forceinline__ uint32_t subtract_pairs(uint32_t a, uint32_t b) {
  __half2 x, y;
  memcpy(&x, &a, 4);
  memcpy(&y, &b, 4);
  const __half2 r = __hsub2(x, y);
  uint32_t bits;
  memcpy(&bits, &r, 4);
  return bits;
}

__global__ void __launch_bounds__(kWarps * 32)
    matmul(const uint4* __restrict__ weights, const __half* __restrict__ scale, const uint8_t* __restrict__ zero,
           const __half* __restrict__ x, float* __restrict__ part, int* __restrict__ ticket, __half* __restrict__ y,
           int m, int k, int n, int bug) {
  const int lane = int(threadIdx.x & 31), warp = int(threadIdx.x >> 5), g = lane >> 2, t = (lane & 3) * 2;
  const int tile = int(blockIdx.x), split = int(blockIdx.y), splits = int(gridDim.y);
  const int blocks = k / 32, groups = k / kGroup;
  const int per_split = (groups + splits - 1) / splits;
  const int first = min(split * per_split, groups), last_group = min(first + per_split, groups);
  const int steps = (last_group - first) * (kGroup / 16);

  EXL_DYN_SMEM(uint2, staged);  // [steps][32 lanes], in the order of B fragments
  EXL_SHARED(uint4, ring, [kWarps][kStages][32]);
  EXL_SHARED(float, sums, [kWarps][32][kRows]);
  EXL_SHARED(int, is_last, [1]);

  if (bug == kWarpReturnsEarly && warp >= last_group - first) return;
  for (int i = int(threadIdx.x); i < steps * 32; i += kWarps * 32) {
    const int l = i & 31, row = l >> 2, at = first * kGroup + (i >> 5) * 16 + (l & 3) * 2;
    uint2 v = {0u, 0u};
    if (row < (bug == kNoRowGuard ? kRows : m)) {
      const __half* p = x + size_t(row) * k + at;
      memcpy(&v.x, p, 4);
      memcpy(&v.y, p + (bug == kWrongHalfOfK ? 6 : 8), 4);
    }
    staged[i] = v;
  }
  if (bug == kBarrierInBranch) {
    if (last_group > first + warp) __syncthreads();
  } else if (bug != kNoBarrierAfterStaging) {
    __syncthreads();
  }

  const int per_warp = (last_group - first + kWarps - 1) / kWarps;
  const int from = min(first + warp * per_warp, last_group), to = min(from + per_warp, last_group);
  const int first_block = from * (kGroup / 32), count = (to - from) * (kGroup / 32);
  const uint4* source = weights + (size_t(tile) * blocks + first_block) * 32;
  const auto issue = [&](int b) {
    if (b < count || (bug == kOneTileTooMany && b == count)) {
      const int stage = b % kStages + (bug == kRingIndexOffByOne ? 1 : 0);
      ptx::cp_async16(&ring[warp][0][0] + stage * 32 + lane, source + size_t(b) * 32 + lane);
    }
    ptx::cp_async_commit();
  };
  for (int s = 0; s < kStages - 1; ++s) issue(s);

  float total[2][4] = {}, partial[2][4] = {};
  for (int b = 0; b < count; ++b) {
    if (bug == kOneGroupTooFew) {
      ptx::cp_async_wait<kStages - 1>();
    } else if (bug != kNoWaitForCopies) {
      ptx::cp_async_wait<kStages - 2>();
    }
    if (bug != kNoSyncwarpAroundRing) __syncwarp();
    // each lane reads another lane's copy, as a layout with reads across lanes would
    const uint4 packed = ring[warp][b % kStages][lane ^ 1];
    if (bug != kNoSyncwarpAroundRing) __syncwarp();
    issue(b + kStages - 1);
    const uint32_t w[4] = {packed.x, packed.y, packed.z, packed.w};
    const size_t at = (size_t(tile) * groups + from + b / (kGroup / 32)) * 32;
#pragma unroll
    for (int half = 0; half < 2; ++half) {  // 16 columns each
      const uint32_t low = 0x64006400u + zero[at + half * 16 + g] * 0x00010001u;
      const uint32_t high = 0x64006400u + zero[at + half * 16 + g + 8] * 0x00010001u;
#pragma unroll
      for (int step = 0; step < 2; ++step) {
        uint32_t a[4];
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          const uint32_t codes = ptx::lop3<0xEA>(w[half * 2 + step] >> (4 * r), 0x000f000fu, 0x64006400u);
          a[r] = subtract_pairs(codes, r & 1 ? high : low);
        }
        const uint2 v = staged[((first_block + b - first * (kGroup / 32)) * 2 + step) * 32 + lane];
        const uint32_t fragment[2] = {v.x, v.y};
        ptx::mma_m16n8k16_f16(partial[half], a, fragment, partial[half]);
      }
    }
    if (b % (kGroup / 32) != kGroup / 32 - 1) continue;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float s0 = __half2float(scale[at + half * 16 + g + (bug == kScaleOfNeighbour ? 1 : 0)]);
      const float s1 = __half2float(scale[at + half * 16 + g + 8]);
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        total[half][r] = fmaf(r < 2 ? s0 : s1, partial[half][r], total[half][r]);
        partial[half][r] = 0.0f;
      }
    }
  }
  for (int half = 0; half < 2; ++half) {
    for (int r = 0; r < 4; ++r) sums[warp][half * 16 + g + (r >> 1) * 8][t + (r & 1)] = total[half][r];
  }
  if (bug != kNoBarrierBeforeReduction) __syncthreads();

  for (int i = int(threadIdx.x); i < 32 * kRows; i += kWarps * 32) {
    float s = 0;
    for (int w = 0; w < kWarps; ++w) s += sums[w][i / kRows][i % kRows];
    part[(size_t(tile) * splits + split) * 32 * kRows + i] = s;
  }
  if (bug != kNoFenceBeforeTicket) __threadfence();
  if (bug != kNoBarrierBeforeTicket) __syncthreads();
  if (threadIdx.x == 0) {
    is_last[0] = atomicAdd(&ticket[tile], 1) == splits - 1;
    if (bug != kNoFenceAfterTicket) __threadfence();
  }
  __syncthreads();
  if (!is_last[0]) return;
  for (int i = int(threadIdx.x); i < 32 * kRows; i += kWarps * 32) {
    float s = 0;
    for (int p = 0; p < splits; ++p) s += part[(size_t(tile) * splits + p) * 32 * kRows + i];
    const int column = tile * 32 + i / kRows, row = i % kRows;
    if (row < m && (column < n || bug == kNoTailGuard)) y[size_t(row) * n + column] = __float2half(s);
  }
  if (bug != kTicketNotPutBack && threadIdx.x == 0) atomicExch(&ticket[tile], 0);
}

}  // namespace

void planted_matmul(const void* weights, const uint16_t* scale, const uint8_t* zero, const uint16_t* x, float* part,
                    int* ticket, uint16_t* y, int m, int k, int n, int splits, cudaStream_t stream) {
  const int per_split = (k / kGroup + splits - 1) / splits;
  const size_t wanted = size_t(per_split) * (kGroup / 16) * 32 * 8;
  EXL_LAUNCH(matmul, dim3(unsigned(n + 31) / 32, unsigned(splits)), dim3(kWarps * 32),
             wanted - (planted_bug == kTooLittleSharedMemory ? 64 : 0), stream, static_cast<const uint4*>(weights),
             reinterpret_cast<const __half*>(scale), zero, reinterpret_cast<const __half*>(x), part, ticket,
             reinterpret_cast<__half*>(y), m, k, n, planted_bug);
}
