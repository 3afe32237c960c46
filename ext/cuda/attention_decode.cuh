// The kernel behind attention_decode_cuda: flash decoding over pages. Instantiated by attention_decode_*.cu.
//
// A block of 4 warps does up to kColumns columns of one sequence and key/value head over one chunk of keys. Each warp
// streams its own keys, 16 at a time, through its own ring in shared memory, keys and values in turn. Keys are the rows
// (m16) of the matrix products and queries the columns (n8), so that a single query wastes nothing but columns. Of the
// blocks that share a row of chunks the last to arrive merges them in order.
#pragma once

#include "attention_codes.cuh"
#include "attention_pages.cuh"

namespace exl {
namespace {

constexpr int kDecodeWarps = 4;
constexpr int kTileKeys = 16;

template <int kDim, bool kCodes>
constexpr int kSlots = kCodes ? (kDim <= 128 ? 4 : 3) : (kDim <= 64 ? 3 : 2);

// Shared memory, all of it dynamic, so that a launch knows how much it asks for:
//   the ticket | largest score and sum of weights, [warp][column] each | queries in fragment order |
//   rings, later sums (kDim rows of kColumns + 1) and weights of chunks
template <int kTiles>
constexpr int kDecodeHead = 16 + 2 * kDecodeWarps * 8 * kTiles * int(sizeof(float));

struct DecodeLayout {
  int key_bytes, value_bytes;    // of a head
  int key_stride, value_stride;  // bytes
  int slot;                      // bytes
  int bytes;                     // of all
};

template <int kDim, bool kCodes, int kTiles>
DecodeLayout decode_layout(const CudaAttention& a) {
  constexpr int kColumns = 8 * kTiles;
  DecodeLayout layout{};
  layout.key_bytes = kCodes ? int(kv_row_bytes(kDim, a.key_bits)) : 2 * kDim;
  layout.value_bytes = kCodes ? int(kv_row_bytes(kDim, a.value_bits)) : 2 * kDim;
  layout.key_stride = ring_stride(layout.key_bytes, kCodes);
  layout.value_stride = ring_stride(layout.value_bytes, kCodes);
  layout.slot = kTileKeys * (layout.key_stride > layout.value_stride ? layout.key_stride : layout.value_stride);
  const int ring = kDecodeWarps * kSlots<kDim, kCodes> * layout.slot;
  const int sums = (kDim * (kColumns + 1) + kMostChunks * kColumns) * int(sizeof(float));
  layout.bytes = kDecodeHead<kTiles> + kDim * kColumns * 2 + (ring > sums ? ring : sums);
  return layout;
}

// Queries into shared memory as B fragments [step][tile][lane], rotated for codes (see attention_codes.cuh for the
// order inside a step).
template <int kDim, bool kCodes, int kTiles>
__device__ void stage_queries(const CudaAttention& a, const Columns& block, int kv_head, __half* queries) {
  constexpr int kColumns = 8 * kTiles, kGroups = (kDim + 31) / 32;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const __half* q = static_cast<const __half*>(a.q);
  for (int unit = warp; unit < kColumns * kGroups; unit += kDecodeWarps) {
    const int column = unit / kGroups, d = unit % kGroups * 32 + lane;
    float v = 0.0f;
    if (column < block.count && d < kDim) v = __half2float(q[column_offset(a, block, kv_head, column) + d]);
    if constexpr (kCodes) {
      const int left = kDim - unit % kGroups * 32;
      v = rotate_group(v, left < 32 ? left : 32, lane);
    }
    if (d >= kDim) continue;
    const int in_step = d % 16, t = in_step % 8 / 2;
    const int word = kCodes ? in_step & 1 : in_step / 8, half = kCodes ? in_step / 8 : in_step & 1;
    const int fragment = (d / 16 * kTiles + column / 8) * 32 + column % 8 * 4 + t;
    queries[fragment * 4 + word * 2 + half] = __float2half_rn(v);
  }
}

// scores += keys (16 x kDim codes of kBits bits) * queries, in units of scale / (2 m)
template <int kDim, int kTiles, int kBits>
__device__ inline void score_codes(const uint8_t* row0, const uint8_t* row8, const uint2* queries, int lane,
                                   float (&scores)[kTiles][4]) {
  constexpr int kStepsAll = kDim / 16, kGroups = (kDim + 31) / 32;
  constexpr bool kAligned = kDim % 64 == 0;
  const int t = lane & 3;
#pragma unroll
  for (int group = 0; group < kGroups; ++group) {
    float part[kTiles][4] = {};
#pragma unroll
    for (int step = 2 * group; step < 2 * group + 2 && step < kStepsAll; ++step) {
      const uint8_t* codes0 = row0 + 2 * kGroups + 2 * kBits * step;
      const uint8_t* codes8 = row8 + 2 * kGroups + 2 * kBits * step;
      const uint32_t keys[4] = {code_integers<kBits>(code_pair<kBits, kAligned>(codes0, 2 * t)),
                                code_integers<kBits>(code_pair<kBits, kAligned>(codes8, 2 * t)),
                                code_integers<kBits>(code_pair<kBits, kAligned>(codes0, 2 * t + 1)),
                                code_integers<kBits>(code_pair<kBits, kAligned>(codes8, 2 * t + 1))};
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        const uint2 q = queries[(step * kTiles + n) * 32 + lane];
        const uint32_t b[2] = {q.x, q.y};
        ptx::mma_m16n8k16_f16(part[n], keys, b, part[n]);
      }
    }
    const float scale0 = __half2float(load_half(row0 + 2 * group));
    const float scale8 = __half2float(load_half(row8 + 2 * group));
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      scores[n][0] = fmaf(scale0, part[n][0], scores[n][0]);
      scores[n][1] = fmaf(scale0, part[n][1], scores[n][1]);
      scores[n][2] = fmaf(scale8, part[n][2], scores[n][2]);
      scores[n][3] = fmaf(scale8, part[n][3], scores[n][3]);
    }
  }
}

// mixed += values^T (kDim x 16 codes of kBits bits) * weights
template <int kDim, int kTiles, int kBits>
__device__ inline void mix_codes(const uint8_t* const (&rows)[4], const uint32_t (&weights)[kTiles][2], int lane,
                                 float (&mixed)[kDim / 16][kTiles][4]) {
  constexpr int kGroups = (kDim + 31) / 32;
  constexpr bool kAligned = kDim % 64 == 0;
  const int g = lane >> 2;
#pragma unroll
  for (int group = 0; group < kGroups; ++group) {
    const __half2 scale0 = __halves2half2(load_half(rows[0] + 2 * group), load_half(rows[1] + 2 * group));
    const __half2 scale8 = __halves2half2(load_half(rows[2] + 2 * group), load_half(rows[3] + 2 * group));
#pragma unroll
    for (int step = 2 * group; step < 2 * group + 2 && step < kDim / 16; ++step) {
      uint32_t pairs[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        pairs[i] = code_pair<kBits, kAligned>(rows[i] + 2 * kGroups + 2 * kBits * step, g);
      }
      // rows g | g + 8 of keys 2t, 2t + 1, then of keys 2t + 8, 2t + 9
      const uint32_t values[4] = {
          half2_bits(__hmul2(code_fractions<kBits>(ptx::prmt(pairs[0], pairs[1], 0x5410)), scale0)),
          half2_bits(__hmul2(code_fractions<kBits>(ptx::prmt(pairs[0], pairs[1], 0x7632)), scale0)),
          half2_bits(__hmul2(code_fractions<kBits>(ptx::prmt(pairs[2], pairs[3], 0x5410)), scale8)),
          half2_bits(__hmul2(code_fractions<kBits>(ptx::prmt(pairs[2], pairs[3], 0x7632)), scale8))};
#pragma unroll
      for (int n = 0; n < kTiles; ++n) ptx::mma_m16n8k16_f16(mixed[step][n], values, weights[n], mixed[step][n]);
    }
  }
}

template <int kDim, int kTiles>
__device__ inline void score_floats(const uint8_t* slot, int stride, bool bfloat16, const uint2* queries, int lane,
                                    float (&scores)[kTiles][4]) {
#pragma unroll
  for (int step = 0; step < kDim / 16; ++step) {
    uint32_t keys[4];
    ptx::ldmatrix_x4(keys, slot + lane % 16 * stride + step * 32 + lane / 16 * 16);
    if (bfloat16) {
#pragma unroll
      for (int i = 0; i < 4; ++i) keys[i] = bfloat16_to_half2(keys[i]);
    }
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      const uint2 q = queries[(step * kTiles + n) * 32 + lane];
      const uint32_t b[2] = {q.x, q.y};
      ptx::mma_m16n8k16_f16(scores[n], keys, b, scores[n]);
    }
  }
}

template <int kDim, int kTiles>
__device__ inline void mix_floats(const uint8_t* slot, int stride, bool bfloat16, const uint32_t (&weights)[kTiles][2],
                                  int lane, float (&mixed)[kDim / 16][kTiles][4]) {
#pragma unroll
  for (int step = 0; step < kDim / 16; ++step) {
    uint32_t values[4];
    ptx::ldmatrix_x4_trans(values, slot + (lane % 8 + lane / 16 * 8) * stride + step * 32 + lane / 8 % 2 * 16);
    if (bfloat16) {
#pragma unroll
      for (int i = 0; i < 4; ++i) values[i] = bfloat16_to_half2(values[i]);
    }
#pragma unroll
    for (int n = 0; n < kTiles; ++n) ptx::mma_m16n8k16_f16(mixed[step][n], values, weights[n], mixed[step][n]);
  }
}

}  // namespace
}  // namespace exl
