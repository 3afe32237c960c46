// The decode kernel itself and its launch; see attention_decode.cuh.
#pragma once

#include <climits>
#include <type_traits>

#include "attention_decode.cuh"

namespace exl {
namespace {

// One warp's running softmax. Columns 8 n + 2 t + e, e = 0, 1; dimensions 16 m + g and + 8.
template <int kDim, int kTiles>
struct DecodeState {
  float most[kTiles][2];   // largest score so far, the same in every lane of a column
  float sum[kTiles][2];    // of weights, of this lane's keys only
  float mixed[kDim / 16][kTiles][4];
};

// Scores (16 keys x kTiles * 8 columns, times log2 e, -inf where hidden) -> weights as B fragments; updates the state.
template <int kDim, int kTiles>
__device__ inline void take_scores(const float (&scores)[kTiles][4], DecodeState<kDim, kTiles>& state,
                                   uint32_t (&weights)[kTiles][2]) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    float keep[2];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float most = fmaxf(scores[n][e], scores[n][e + 2]);
      most = fmaxf(most, __shfl_xor_sync(~0u, most, 4));
      most = fmaxf(most, __shfl_xor_sync(~0u, most, 8));
      most = fmaxf(most, __shfl_xor_sync(~0u, most, 16));
      most = fmaxf(most, state.most[n][e]);
      keep[e] = rescale(state.most[n][e], most);
      state.most[n][e] = most;
    }
    const float top0 = state.most[n][0] == -INFINITY ? 0.0f : state.most[n][0];
    const float top1 = state.most[n][1] == -INFINITY ? 0.0f : state.most[n][1];
    float w[4];
#pragma unroll
    for (int r = 0; r < 4; ++r) w[r] = ptx::exp2_approx(scores[n][r] - (r % 2 == 0 ? top0 : top1));
    const __half2 low = __floats2half2_rn(w[0], w[1]), high = __floats2half2_rn(w[2], w[3]);
    // The sum is of the rounded weights: then the result is an exact mean of the values, whatever the rounding.
    state.sum[n][0] = fmaf(state.sum[n][0], keep[0], __low2float(low) + __low2float(high));
    state.sum[n][1] = fmaf(state.sum[n][1], keep[1], __high2float(low) + __high2float(high));
    weights[n][0] = ptx::movmatrix_trans(half2_bits(low));
    weights[n][1] = ptx::movmatrix_trans(half2_bits(high));
    if (__any_sync(~0u, keep[0] != 1.0f || keep[1] != 1.0f)) {
#pragma unroll
      for (int m = 0; m < kDim / 16; ++m) {
        state.mixed[m][n][0] = __fmul_rn(state.mixed[m][n][0], keep[0]);
        state.mixed[m][n][1] = __fmul_rn(state.mixed[m][n][1], keep[1]);
        state.mixed[m][n][2] = __fmul_rn(state.mixed[m][n][2], keep[0]);
        state.mixed[m][n][3] = __fmul_rn(state.mixed[m][n][3], keep[1]);
      }
    }
  }
}

// The warps' states, merged in order: sums[d * (kColumns + 1) + column], most and sum per column.
template <int kDim, int kTiles>
__device__ void merge_warps(DecodeState<kDim, kTiles>& state, float* sums, float (*most)[8 * kTiles],
                            float (*sum)[8 * kTiles]) {
  constexpr int kColumns = 8 * kTiles;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float total = state.sum[n][e];
      total += __shfl_xor_sync(~0u, total, 4);
      total += __shfl_xor_sync(~0u, total, 8);
      total += __shfl_xor_sync(~0u, total, 16);
      if (g == 0) {
        most[warp][8 * n + 2 * t + e] = state.most[n][e];
        sum[warp][8 * n + 2 * t + e] = total;
      }
    }
  }
  __syncthreads();
  float factor[kTiles][2];
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int column = 8 * n + 2 * t + e;
      const float larger = fmaxf(fmaxf(most[0][column], most[1][column]), fmaxf(most[2][column], most[3][column]));
      factor[n][e] = rescale(state.most[n][e], larger);
    }
  }
  for (int turn = 0; turn < kDecodeWarps; ++turn) {
    if (turn == warp) {
#pragma unroll
      for (int m = 0; m < kDim / 16; ++m) {
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            float* to = sums + (16 * m + g + i / 2 * 8) * (kColumns + 1) + 8 * n + 2 * t + i % 2;
            *to = fmaf(state.mixed[m][n][i], factor[n][i % 2], turn == 0 ? 0.0f : *to);
          }
        }
      }
    }
    __syncthreads();
  }
  for (int column = threadIdx.x; column < kColumns; column += 32 * kDecodeWarps) {
    const float larger = fmaxf(fmaxf(most[0][column], most[1][column]), fmaxf(most[2][column], most[3][column]));
    float total = 0.0f;
    for (int w = 0; w < kDecodeWarps; ++w) total = fmaf(sum[w][column], rescale(most[w][column], larger), total);
    sum[0][column] = total;
    most[0][column] = larger;
  }
  __syncthreads();
}

// sums / sum -> out, values turned back if they are stored turned.
template <int kDim, bool kCodes, int kTiles>
__device__ void write_out(const CudaAttention& a, const Columns& block, int kv_head, const float* sums,
                          const float* sum) {
  constexpr int kGroups = (kDim + 31) / 32;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  __half* out = static_cast<__half*>(a.out);
  for (int unit = warp; unit < block.count * kGroups; unit += kDecodeWarps) {
    const int column = unit / kGroups, first = unit % kGroups * 32, d = first + lane;
    float v = d < kDim ? __fdiv_rn(sums[d * (8 * kTiles + 1) + column], sum[column]) : 0.0f;
    if constexpr (kCodes) v = rotate_group(v, kDim - first < 32 ? kDim - first : 32, lane);
    if (d < kDim) out[column_offset(a, block, kv_head, column) + d] = __float2half_rn(v);
  }
}

// Partial sums of one chunk in memory: most [kColumns], sum [kColumns], sums [kDim][kColumns].
template <int kDim, int kTiles>
constexpr int kPartFloats = 8 * kTiles * (kDim + 2);

// grid (kv_heads, chunks, blocks of columns), 128 threads
template <int kDim, bool kCodes, int kTiles>
__global__ void __launch_bounds__(32 * kDecodeWarps, 1)
    decode_kernel(const CudaAttention a, const DecodeLayout layout, const float scale) {
  ptx::grid_launch_dependents();  // as in norm.cu: all blocks have their place by then
  constexpr int kColumns = 8 * kTiles, kThreads = 32 * kDecodeWarps, kRing = kSlots<kDim, kCodes>;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
  const int kv_head = blockIdx.x;
  const Columns block = find_columns(a, blockIdx.z, kColumns, 1, kDecodeRows);
  if (block.sequence < 0) return;
  const int oldest = oldest_key(a, block.start + block.first / block.group);
  const int newest = block.index(block.count - 1);
  const int chunk = decode_chunk(a.kv_lengths[block.sequence]);
  const int first_chunk = oldest / chunk, chunks = newest / chunk - first_chunk + 1;
  if (int(blockIdx.y) >= chunks) return;

  EXL_DYN_SMEM(uint8_t, memory);
  int* last = reinterpret_cast<int*>(memory);
  auto most = reinterpret_cast<float (*)[kColumns]>(memory + 16), sum = most + kDecodeWarps;
  uint8_t* queries = memory + kDecodeHead<kTiles>;
  uint8_t* rings = queries + kDim * kColumns * 2;
  uint8_t* ring = rings + warp * kRing * layout.slot;
  float* sums = reinterpret_cast<float*>(rings);

  const int base = (first_chunk + int(blockIdx.y)) * chunk;
  const Pages pages = pages_of(a, block.sequence, kv_head, max(oldest, base), min(newest + 1, base + chunk));

  // This warp's tiles: those of the chunk whose number is `warp` mod 4, as far as a key of them is seen.
  const int low_tile = (pages.low - base) / kTileKeys;
  const int first_tile = low_tile + ((warp - low_tile) & (kDecodeWarps - 1));
  const int end_tile = (pages.high - base + kTileKeys - 1) / kTileKeys;
  const int tiles = first_tile < end_tile ? (end_tile - first_tile + kDecodeWarps - 1) / kDecodeWarps : 0;
  auto tile_base = [&](int i) { return base + (first_tile + i * kDecodeWarps) * kTileKeys; };
  auto issue = [&](int unit) {  // keys of tile i are unit 2 i, values 2 i + 1
    if (unit < 2 * tiles) {
      uint8_t* slot = ring + unit % kRing * layout.slot;
      if (unit % 2 == 0) {
        fetch_rows(pages, static_cast<const uint8_t*>(a.k_pages), layout.key_bytes, tile_base(unit / 2), slot,
                   layout.key_stride, lane);
      } else {
        fetch_rows(pages, static_cast<const uint8_t*>(a.v_pages), layout.value_bytes, tile_base(unit / 2), slot,
                   layout.value_stride, lane);
      }
    }
    ptx::cp_async_commit();
  };
  for (int unit = 0; unit < kRing - 1; ++unit) issue(unit);

  stage_queries<kDim, kCodes, kTiles>(a, block, kv_head, reinterpret_cast<__half*>(queries));
  const uint2* fragments = reinterpret_cast<const uint2*>(queries);
  int low[kTiles][2], high[kTiles][2];  // keys that a column sees: [low, high)
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int column = 8 * n + 2 * t + e;
      const int index = column < block.count ? block.index(column) : -1;
      low[n][e] = oldest_key(a, index), high[n][e] = index + 1;
    }
  }
  DecodeState<kDim, kTiles> state = {};
#pragma unroll
  for (int n = 0; n < kTiles; ++n) state.most[n][0] = state.most[n][1] = -INFINITY;
  __syncthreads();

  for (int i = 0; i < tiles; ++i) {
    const int first_key = tile_base(i);
    uint32_t head = 0;
    if constexpr (kCodes) head = uint32_t(pages.head(first_key));
    ptx::cp_async_wait<kRing - 2>();
    __syncwarp();  // copies of all lanes are there, and nobody reads the slot that is filled next
    issue(2 * i + kRing - 1);
    const uint8_t* slot = ring + 2 * i % kRing * layout.slot;
    float scores[kTiles][4] = {};
    if constexpr (kCodes) {
      const uint8_t* row0 = slot_row(slot, layout.key_stride, head, a.kv_heads, layout.key_bytes, g);
      const uint8_t* row8 = slot_row(slot, layout.key_stride, head, a.kv_heads, layout.key_bytes, g + 8);
      with_bits(a.key_bits, [&](auto bits) {
        score_codes<kDim, kTiles, decltype(bits)::value>(row0, row8, fragments, lane, scores);
      });
    } else {
      score_floats<kDim, kTiles>(slot, layout.key_stride, a.kind == PageKind::bfloat16, fragments, lane, scores);
    }
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const int key = first_key + g + r / 2 * 8;
        const bool seen = key >= low[n][r % 2] && key < high[n][r % 2];
        scores[n][r] = seen ? finished_score(scores[n][r], scale, a.softcap) : -INFINITY;
      }
    }
    uint32_t weights[kTiles][2];
    take_scores(scores, state, weights);

    ptx::cp_async_wait<kRing - 2>();
    __syncwarp();
    issue(2 * i + kRing);
    slot = ring + (2 * i + 1) % kRing * layout.slot;
    if constexpr (kCodes) {
      const uint8_t* rows[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        rows[k] = slot_row(slot, layout.value_stride, head, a.kv_heads, layout.value_bytes, 2 * t + k % 2 + k / 2 * 8);
      }
      with_bits(a.value_bits, [&](auto bits) {
        mix_codes<kDim, kTiles, decltype(bits)::value>(rows, weights, lane, state.mixed);
      });
    } else {
      mix_floats<kDim, kTiles>(slot, layout.value_stride, a.kind == PageKind::bfloat16, weights, lane, state.mixed);
    }
  }
  ptx::cp_async_wait<0>();  // the sums take the place of the rings, behind the first barrier of merge_warps
  merge_warps<kDim, kTiles>(state, sums, most, sum);
  if (chunks == 1) {
    write_out<kDim, kCodes, kTiles>(a, block, kv_head, sums, sum[0]);
    return;
  }

  const int64_t row = int64_t(blockIdx.z) * gridDim.x + kv_head;  // of chunks
  float* parts = a.partial + row * gridDim.y * kPartFloats<kDim, kTiles>;
  float* mine = parts + int64_t(blockIdx.y) * kPartFloats<kDim, kTiles>;
  for (int i = threadIdx.x; i < kColumns; i += kThreads) {
    mine[i] = most[0][i];
    mine[kColumns + i] = sum[0][i];
  }
  for (int i = threadIdx.x; i < kDim * kColumns; i += kThreads) {
    mine[2 * kColumns + i] = sums[i / kColumns * (kColumns + 1) + i % kColumns];
  }
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    last[0] = atomicAdd(&a.tickets[row], 1) == chunks - 1;
    __threadfence();
  }
  __syncthreads();
  if (!last[0]) return;

  float* factors = sums + kDim * (kColumns + 1);  // [chunk][column]
  for (int i = threadIdx.x; i < kColumns; i += kThreads) {
    float larger = -INFINITY, total = 0.0f;
    for (int c = 0; c < chunks; ++c) larger = fmaxf(larger, __ldcg(parts + int64_t(c) * kPartFloats<kDim, kTiles> + i));
    for (int c = 0; c < chunks; ++c) {
      const float* part = parts + int64_t(c) * kPartFloats<kDim, kTiles>;
      const float factor = rescale(__ldcg(part + i), larger);
      factors[c * kColumns + i] = factor;
      total = fmaf(__ldcg(part + kColumns + i), factor, total);
    }
    sum[0][i] = total;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kDim * kColumns; i += kThreads) {
    float total = 0.0f;
    for (int c = 0; c < chunks; ++c) {
      const float* part = parts + int64_t(c) * kPartFloats<kDim, kTiles> + 2 * kColumns;
      total = fmaf(__ldcg(part + i), factors[c * kColumns + i % kColumns], total);
    }
    sums[i / kColumns * (kColumns + 1) + i % kColumns] = total;
  }
  __syncthreads();
  write_out<kDim, kCodes, kTiles>(a, block, kv_head, sums, sum[0]);
  if (threadIdx.x == 0) atomicExch(&a.tickets[row], 0);
}

template <int kDim, bool kCodes, int kTiles>
void launch_decode(const CudaAttention& a, dim3 grid, cudaStream_t stream) {
  const DecodeLayout layout = decode_layout<kDim, kCodes, kTiles>(a);
  const float scale = score_scale(a) / (kCodes ? 2.0f * kv_middle(a.key_bits) : 1.0f);
  EXL_LAUNCH((decode_kernel<kDim, kCodes, kTiles>), grid, dim3(32 * kDecodeWarps), size_t(layout.bytes), stream, a,
             layout, scale);
}

}  // namespace
}  // namespace exl
