// The kernel behind attention_prefill_cuda. Instantiated by attention_prefill_*.cu.
//
// A block of 4 warps does 64 columns of one sequence and key/value head, 16 to a warp, over all keys they see, in tiles
// of 64 (large heads: 32). Queries are the rows (m16) of the matrix products; the softmax is kept while keys go by.
// Codes are copied as they are and widened once per block, into the tile that the tensor cores read.
#pragma once

#include "attention_codes.cuh"
#include "attention_pages.cuh"

namespace exl {
namespace {

constexpr int kPrefillWarps = 4;
constexpr int kPrefillColumns = 16 * kPrefillWarps;

template <int kDim>
constexpr int kPrefillKeys = kDim <= 128 ? 64 : 32;
// Queries stay in registers where there is room beside the sums; else in shared memory.
template <int kDim>
constexpr bool kHeldQueries = kDim <= 128;
template <int kDim>
constexpr int kTileStride = 2 * kDim + 16;  // bytes: an odd number of 16-byte units

// Dynamic shared memory: queries, if not held | keys | values | codes of keys | codes of values. Held queries pass
// through the place of keys and values.
struct PrefillLayout {
  int key_bytes, value_bytes;    // of a head in the pages
  int key_stride, value_stride;  // of the copied codes
  int bytes;
};

template <int kDim, bool kCodes>
PrefillLayout prefill_layout(const CudaAttention& a) {
  PrefillLayout layout{};
  layout.key_bytes = kCodes ? int(kv_row_bytes(kDim, a.key_bits)) : 2 * kDim;
  layout.value_bytes = kCodes ? int(kv_row_bytes(kDim, a.value_bits)) : 2 * kDim;
  layout.bytes = (2 * kPrefillKeys<kDim> + (kHeldQueries<kDim> ? 0 : kPrefillColumns)) * kTileStride<kDim>;
  if (!kCodes) return layout;
  layout.key_stride = ring_stride(layout.key_bytes, true);
  layout.value_stride = ring_stride(layout.value_bytes, true);
  layout.bytes += kPrefillKeys<kDim> * (layout.key_stride + layout.value_stride);
  return layout;
}

// Position of dimension d inside a tile's row: for codes, 16 dimensions lie in the order 0 8 1 9 2 10 ...
template <bool kCodes>
__device__ inline int place_of(int d) {
  return kCodes ? (d & ~15) + (d & 7) * 2 + (d >> 3 & 1) : d;
}

template <int kDim, bool kCodes>
__device__ void stage_columns(const CudaAttention& a, const Columns& block, int kv_head, uint8_t* tile) {
  constexpr int kGroups = (kDim + 31) / 32;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const __half* q = static_cast<const __half*>(a.q);
  for (int unit = warp; unit < kPrefillColumns * kGroups; unit += kPrefillWarps) {
    const int column = unit / kGroups, first = unit % kGroups * 32, d = first + lane;
    float v = 0.0f;
    if (column < block.count && d < kDim) v = __half2float(q[column_offset(a, block, kv_head, column) + d]);
    if constexpr (kCodes) v = rotate_group(v, kDim - first < 32 ? kDim - first : 32, lane);
    if (d < kDim) {
      reinterpret_cast<__half*>(tile + column * kTileStride<kDim>)[place_of<kCodes>(d)] = __float2half_rn(v);
    }
  }
}

// Copied codes of a tile, from head row `first_key` on, widened into halves.
template <int kDim, int kBits>
__device__ void widen_tile(const Pages& pages, const uint8_t* codes, int stride, int row_bytes, int first_key,
                           uint8_t* tile) {
  constexpr int kSteps = kDim / 16, kGroups = (kDim + 31) / 32;
  constexpr bool kAligned = kDim % 64 == 0;
  for (int unit = threadIdx.x; unit < kPrefillKeys<kDim> * kSteps; unit += 32 * kPrefillWarps) {
    const int r = unit / kSteps, step = unit % kSteps, base = first_key + (r & ~15);
    uint4* to = reinterpret_cast<uint4*>(tile + r * kTileStride<kDim> + step * 32);
    if (base >= pages.high || base + 15 < pages.low) {  // nobody copied these, and their page may not exist
      to[0] = to[1] = uint4{0, 0, 0, 0};
      continue;
    }
    const uint8_t* row = slot_row(codes + (r & ~15) * stride, stride, uint32_t(pages.head(base)), pages.kv_heads,
                                  row_bytes, r & 15);
    const __half2 scale = __half2half2(load_half(row + step / 2 * 2));
    const uint8_t* from = row + 2 * kGroups + 2 * kBits * step;
    uint32_t words[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      words[j] = half2_bits(__hmul2(code_fractions<kBits>(code_pair<kBits, kAligned>(from, j)), scale));
    }
    to[0] = uint4{words[0], words[1], words[2], words[3]};
    to[1] = uint4{words[4], words[5], words[6], words[7]};
  }
}

// A tile of keys or values (or of their codes) into shared memory, 16 rows to a warp. Rows of 16 keys of which none is
// seen are zeros, as the rest of the arithmetic must stay finite; of codes they are left alone.
template <int kDim, bool kCodes>
__device__ void fetch_tile(const Pages& pages, const void* rows, int row_bytes, int first_key, uint8_t* tile,
                           int stride) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  for (int r = 16 * warp; r < kPrefillKeys<kDim>; r += 16 * kPrefillWarps) {
    const int base = first_key + r;
    if (base < pages.high && base + 15 >= pages.low) {
      fetch_rows(pages, static_cast<const uint8_t*>(rows), row_bytes, base, tile + r * stride, stride, lane);
    } else if constexpr (!kCodes) {
      uint4* to = reinterpret_cast<uint4*>(tile + r * stride);
      for (int i = lane; i < 16 * stride / 16; i += 32) to[i] = uint4{0, 0, 0, 0};
    }
  }
  ptx::cp_async_commit();
}

// The running softmax of two columns, g and g + 8 of a warp's 16. Sums of dimension 8 n + 2 t + e: [n][e], [n][2 + e].
template <int kDim>
struct PrefillState {
  float most[2], sum[2];
  float mixed[kDim / 8][4];
};

template <int kDim>
__device__ inline void query_step(const uint8_t* queries, int step, int lane, uint32_t (&q)[4]) {
  ptx::ldmatrix_x4(q, queries + lane % 16 * kTileStride<kDim> + step * 32 + lane / 16 * 16);
}

// scores (16 columns x the tile's keys) = queries * keys^T. `held`: the queries' fragments, or nothing.
template <int kDim>
__device__ inline void score_tile(const uint32_t (*held)[4], const uint8_t* queries, const uint8_t* keys, bool bfloat16,
                                  int lane, float (&scores)[kPrefillKeys<kDim> / 8][4]) {
#pragma unroll
  for (int step = 0; step < kDim / 16; ++step) {
    uint32_t q[4];
    if constexpr (kHeldQueries<kDim>) {
#pragma unroll
      for (int i = 0; i < 4; ++i) q[i] = held[step][i];
    } else {
      query_step<kDim>(queries, step, lane, q);
    }
#pragma unroll
    for (int n = 0; n < kPrefillKeys<kDim> / 8; n += 2) {
      uint32_t k[4];
      const int row = 8 * n + lane % 8 + lane / 16 * 8;
      ptx::ldmatrix_x4(k, keys + row * kTileStride<kDim> + step * 32 + lane / 8 % 2 * 16);
      if (bfloat16) {
#pragma unroll
        for (int i = 0; i < 4; ++i) k[i] = bfloat16_to_half2(k[i]);
      }
      const uint32_t first[2] = {k[0], k[1]}, second[2] = {k[2], k[3]};
      ptx::mma_m16n8k16_f16(scores[n], q, first, scores[n]);
      ptx::mma_m16n8k16_f16(scores[n + 1], q, second, scores[n + 1]);
    }
  }
}

// mixed += weights (16 columns x the tile's keys) * values
template <int kDim>
__device__ inline void mix_tile(const uint32_t (&weights)[kPrefillKeys<kDim> / 8][2], const uint8_t* values,
                                bool bfloat16, int lane, float (&mixed)[kDim / 8][4]) {
#pragma unroll
  for (int step = 0; step < kPrefillKeys<kDim> / 16; ++step) {
    const auto &near = weights[2 * step], &far = weights[2 * step + 1];
    const uint32_t p[4] = {near[0], near[1], far[0], far[1]};
#pragma unroll
    for (int n = 0; n < kDim / 8; n += 2) {
      uint32_t v[4];
      ptx::ldmatrix_x4_trans(v, values + (16 * step + lane % 16) * kTileStride<kDim> + n * 16 + lane / 16 * 16);
      if (bfloat16) {
#pragma unroll
        for (int i = 0; i < 4; ++i) v[i] = bfloat16_to_half2(v[i]);
      }
      const uint32_t first[2] = {v[0], v[1]}, second[2] = {v[2], v[3]};
      ptx::mma_m16n8k16_f16(mixed[n], p, first, mixed[n]);
      ptx::mma_m16n8k16_f16(mixed[n + 1], p, second, mixed[n + 1]);
    }
  }
}

// Scores, -inf where hidden -> weights in A-fragment order; updates the state.
template <int kDim>
__device__ inline void weigh_tile(const float (&scores)[kPrefillKeys<kDim> / 8][4], PrefillState<kDim>& state,
                                  uint32_t (&weights)[kPrefillKeys<kDim> / 8][2]) {
#pragma unroll
  for (int e = 0; e < 2; ++e) {  // column g, g + 8
    float most = -INFINITY;
#pragma unroll
    for (int n = 0; n < kPrefillKeys<kDim> / 8; ++n) most = fmaxf(most, fmaxf(scores[n][2 * e], scores[n][2 * e + 1]));
    most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
    most = fmaxf(most, __shfl_xor_sync(~0u, most, 2));
    most = fmaxf(most, state.most[e]);
    const float keep = rescale(state.most[e], most), top = most == -INFINITY ? 0.0f : most;
    state.most[e] = most;
    float sum = 0.0f;
#pragma unroll
    for (int n = 0; n < kPrefillKeys<kDim> / 8; ++n) {
      const __half2 w = __floats2half2_rn(ptx::exp2_approx(scores[n][2 * e] - top),
                                          ptx::exp2_approx(scores[n][2 * e + 1] - top));
      sum += __low2float(w);  // of the rounded weights, as in the decode kernel
      sum += __high2float(w);
      weights[n][e] = half2_bits(w);
    }
    state.sum[e] = fmaf(state.sum[e], keep, sum);
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n) {
      state.mixed[n][2 * e] = __fmul_rn(state.mixed[n][2 * e], keep);
      state.mixed[n][2 * e + 1] = __fmul_rn(state.mixed[n][2 * e + 1], keep);
    }
  }
}

// Turns mixed back in place. A position's bits 0 (element), 1 and 2 (lane), 3 (tile), 4 (next 16) stand for the bits
// 3, 0, 1, 2, 4 of a dimension; the transform takes them in any order.
template <int kDim>
__device__ inline void rotate_mixed(float (&mixed)[kDim / 8][4], int lane) {
#pragma unroll
  for (int n = 0; n < kDim / 8; ++n) {
#pragma unroll
    for (int e = 0; e < 4; e += 2) {
      const float low = mixed[n][e], high = mixed[n][e + 1];
      mixed[n][e] = low + high, mixed[n][e + 1] = low - high;
    }
#pragma unroll
    for (int e = 0; e < 4; ++e) {
#pragma unroll
      for (int span = 1; span < 4; span *= 2) {
        const float other = __shfl_xor_sync(~0u, mixed[n][e], span);
        mixed[n][e] = (lane & span) != 0 ? other - mixed[n][e] : mixed[n][e] + other;
      }
    }
  }
#pragma unroll
  for (int span = 1; span < 4; span *= 2) {
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n) {
      if ((n & span) != 0 || (span == 2 && n / 4 * 4 + 4 > kDim / 8)) continue;  // the last 16 may be alone
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float low = mixed[n][e], high = mixed[n + span][e];
        mixed[n][e] = low + high, mixed[n + span][e] = low - high;
      }
    }
  }
#pragma unroll
  for (int n = 0; n < kDim / 8; ++n) {
    const float norm = rotation_norm(n / 4 * 4 + 4 <= kDim / 8 ? 32 : 16);
#pragma unroll
    for (int e = 0; e < 4; ++e) mixed[n][e] *= norm;
  }
}

}  // namespace
}  // namespace exl
