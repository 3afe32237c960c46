// The prefill kernel itself and its launch; see attention_prefill.cuh.
#pragma once

#include <climits>

#include "attention_dims.h"
#include "attention_prefill.cuh"

namespace exl {

void attention_prefill_floats(const CudaAttention& args, dim3 grid, cudaStream_t stream);
void attention_prefill_codes(const CudaAttention& args, dim3 grid, cudaStream_t stream);

namespace {

// grid (kv_heads, blocks of columns), 128 threads
template <int kDim, bool kCodes>
__global__ void __launch_bounds__(32 * kPrefillWarps, 1)
    prefill_kernel(const CudaAttention a, const PrefillLayout layout, const float scale) {
  constexpr int kKeys = kPrefillKeys<kDim>, kStride = kTileStride<kDim>;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
  const int kv_head = blockIdx.x;
  // The last columns of a sequence see the most keys: they start first.
  const Columns block =
      find_columns(a, int(gridDim.y - 1 - blockIdx.y), kPrefillColumns, kDecodeRows + 1, INT_MAX);
  if (block.sequence < 0) return;
  const int oldest = oldest_key(a, block.index(0)), newest = block.index(block.count - 1);
  const Pages pages = pages_of(a, block.sequence, kv_head, oldest, newest + 1);
  const bool bfloat16 = a.kind == PageKind::bfloat16;

  EXL_DYN_SMEM(uint8_t, memory);
  uint8_t* queries = memory;
  uint8_t* keys = memory + (kHeldQueries<kDim> ? 0 : kPrefillColumns * kStride);
  uint8_t* values = keys + kKeys * kStride;
  uint8_t* key_codes = values + kKeys * kStride;
  uint8_t* value_codes = key_codes + kKeys * layout.key_stride;

  stage_columns<kDim, kCodes>(a, block, kv_head, queries);
  __syncthreads();
  queries += 16 * warp * kStride;
  uint32_t held[kHeldQueries<kDim> ? kDim / 16 : 1][4];
  if constexpr (kHeldQueries<kDim>) {
#pragma unroll
    for (int step = 0; step < kDim / 16; ++step) query_step<kDim>(queries, step, lane, held[step]);
    __syncthreads();  // keys and values come where the queries were
  }

  int low[2], high[2];  // keys that the lane's columns see: [low, high)
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    const int column = 16 * warp + g + 8 * e, index = column < block.count ? block.index(column) : -1;
    low[e] = oldest_key(a, index), high[e] = index + 1;
  }
  const int clear_low = oldest_key(a, newest), clear_high = block.index(0) + 1;  // seen by every column of the block

  PrefillState<kDim> state = {};
  state.most[0] = state.most[1] = -INFINITY;

  const int first_tile = oldest / kKeys, end_tile = newest / kKeys + 1;
  uint8_t* key_target = kCodes ? key_codes : keys;
  uint8_t* value_target = kCodes ? value_codes : values;
  const int key_stride = kCodes ? layout.key_stride : kStride, value_stride = kCodes ? layout.value_stride : kStride;
  fetch_tile<kDim, kCodes>(pages, a.k_pages, layout.key_bytes, first_tile * kKeys, key_target, key_stride);
  if constexpr (kCodes) {
    fetch_tile<kDim, kCodes>(pages, a.v_pages, layout.value_bytes, first_tile * kKeys, value_target, value_stride);
  }
  for (int tile = first_tile; tile < end_tile; ++tile) {
    const int first_key = tile * kKeys;
    if constexpr (kCodes) {
      ptx::cp_async_wait<1>();
      __syncthreads();  // the codes of the keys are here; the last tile's keys and values have been used
      with_bits(a.key_bits, [&](auto bits) {
        widen_tile<kDim, decltype(bits)::value>(pages, key_codes, layout.key_stride, layout.key_bytes, first_key, keys);
      });
      __syncthreads();
      fetch_tile<kDim, kCodes>(pages, a.k_pages, layout.key_bytes, first_key + kKeys, key_target, key_stride);
    } else {
      ptx::cp_async_wait<0>();
      __syncthreads();  // the keys are here; the last tile's values have been used
      fetch_tile<kDim, kCodes>(pages, a.v_pages, layout.value_bytes, first_key, value_target, value_stride);
    }
    float scores[kKeys / 8][4] = {};
    score_tile<kDim>(held, queries, keys, bfloat16, lane, scores);
    if constexpr (!kCodes) {
      __syncthreads();  // the keys have been used
      fetch_tile<kDim, kCodes>(pages, a.k_pages, layout.key_bytes, first_key + kKeys, key_target, key_stride);
    }
    const bool clear = first_key >= clear_low && first_key + kKeys <= clear_high && 16 * warp + 16 <= block.count;
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const int key = first_key + 8 * n + 2 * t + r % 2;
        const bool seen = clear || (key >= low[r / 2] && key < high[r / 2]);
        scores[n][r] = seen ? finished_score(scores[n][r], scale, a.softcap) : -INFINITY;
      }
    }
    uint32_t weights[kKeys / 8][2];
    weigh_tile<kDim>(scores, state, weights);
    ptx::cp_async_wait<1>();
    __syncthreads();  // the values, or their codes, are here
    if constexpr (kCodes) {
      with_bits(a.value_bits, [&](auto bits) {
        widen_tile<kDim, decltype(bits)::value>(pages, value_codes, layout.value_stride, layout.value_bytes, first_key,
                                                values);
      });
      __syncthreads();
      fetch_tile<kDim, kCodes>(pages, a.v_pages, layout.value_bytes, first_key + kKeys, value_target, value_stride);
    }
    mix_tile<kDim>(weights, values, bfloat16, lane, state.mixed);
  }
  ptx::cp_async_wait<0>();

  __half* out = static_cast<__half*>(a.out);
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    float sum = state.sum[e];
    sum += __shfl_xor_sync(~0u, sum, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    state.sum[e] = sum;
  }
  if constexpr (kCodes) rotate_mixed<kDim>(state.mixed, lane);
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    const int column = 16 * warp + g + 8 * e;
    if (column >= block.count) continue;
    __half* to = out + column_offset(a, block, kv_head, column);
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n) {
      const float first = __fdiv_rn(state.mixed[n][2 * e], state.sum[e]);
      const float second = __fdiv_rn(state.mixed[n][2 * e + 1], state.sum[e]);
      if constexpr (kCodes) {  // positions 2 t and 2 t + 1 of a row are 8 dimensions apart
        const int d = n / 2 * 16 + n % 2 * 4 + t;
        to[d] = __float2half_rn(first);
        to[d + 8] = __float2half_rn(second);
      } else {
        *reinterpret_cast<__half2*>(to + 8 * n + 2 * t) = __floats2half2_rn(first, second);
      }
    }
  }
}

template <int kDim, bool kCodes>
void launch_prefill(const CudaAttention& a, dim3 grid, cudaStream_t stream) {
  const PrefillLayout layout = prefill_layout<kDim, kCodes>(a);
  EXL_LAUNCH((prefill_kernel<kDim, kCodes>), grid, dim3(32 * kPrefillWarps), size_t(layout.bytes), stream, a, layout,
             score_scale(a));
}

template <bool kCodes>
void prefill_by_dim(const CudaAttention& args, dim3 grid, cudaStream_t stream) {
#define EXL_DIM(dim) \
  case dim: return launch_prefill<dim, kCodes>(args, grid, stream);
  switch (args.head_dim) {
    EXL_ATTENTION_DIMS(EXL_DIM)
    default: throw std::runtime_error("attention: no kernel for heads of " + std::to_string(args.head_dim) + " values");
  }
#undef EXL_DIM
}

}  // namespace
}  // namespace exl
