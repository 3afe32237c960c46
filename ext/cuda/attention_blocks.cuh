// Which query rows a block of the attention kernels works on, and the turning of heads. Included by its kernels only.
//
// Column n of a sequence and a key/value head is query head n % group of that key/value head at token n / group, so
// that the heads that share keys lie together. A block takes kColumns consecutive ones.
#pragma once

#include "attention.h"
#include "ptx.h"
#include "rotation.cuh"

namespace exl {
namespace {

constexpr float kLog2e = 1.44269504088896341f;

// One block's place in the batch.
struct Columns {
  int sequence;  // -1: nothing to do
  int first;     // column
  int count;
  int group;
  int start;     // index in the sequence of its first new token

  __device__ int index(int column) const { return start + (first + column) / group; }
};

// Block `number` of the sequences with a number of rows from `least` to `most`, `columns` columns to a block.
__device__ inline Columns find_columns(const CudaAttention& a, int number, int columns, int least, int most) {
  const int group = a.heads / a.kv_heads;
  for (int s = 0; s < a.sequences; ++s) {
    const int rows = a.q_starts[s + 1] - a.q_starts[s];
    if (rows < least || rows > most) continue;
    const int blocks = (rows * group + columns - 1) / columns;
    if (number < blocks) {
      const int first = number * columns, left = rows * group - first;
      return {s, first, left < columns ? left : columns, group, a.kv_lengths[s] - rows};
    }
    number -= blocks;
  }
  return {-1, 0, 0, group, 0};
}

// Element of q and out where column `column` of the block begins.
__device__ inline int64_t column_offset(const CudaAttention& a, const Columns& block, int kv_head, int column) {
  const int n = block.first + column;
  const int64_t token = a.q_starts[block.sequence] + n / block.group;
  return (token * a.heads + kv_head * block.group + n % block.group) * a.head_dim;
}

__device__ inline int oldest_key(const CudaAttention& a, int index) {
  return index < a.window ? 0 : index - a.window + 1;
}

__device__ inline uint32_t half2_bits(__half2 v) {
  uint32_t u;
  memcpy(&u, &v, 4);
  return u;
}

__device__ inline __half2 bits_half2(uint32_t u) {
  __half2 v;
  memcpy(&v, &u, 4);
  return v;
}

__device__ inline uint32_t pack_half2(float low, float high) { return half2_bits(__floats2half2_rn(low, high)); }

// Two bfloat16 as two halves.
__device__ inline uint32_t bfloat16_to_half2(uint32_t u) {
  return pack_half2(__uint_as_float(u << 16), __uint_as_float(u & 0xffff0000u));
}

// A score times log2(e), after scale and softcap. `scale` is scale * log2(e) without a softcap, else scale / softcap.
__device__ inline float finished_score(float raw, float scale, float softcap) {
  return softcap > 0.0f ? softcap * kLog2e * tanhf(raw * scale) : raw * scale;
}

// The weight of a state whose largest score is `most` beside a larger one. Both may be -inf: nothing seen, weight 0.
__device__ inline float rescale(float most, float larger) {
  return most == -INFINITY ? 0.0f : ptx::exp2_approx(most - larger);
}

inline float score_scale(const CudaAttention& a) {
  return a.softcap > 0.0f ? a.scale / a.softcap : a.scale * kLog2e;
}

}  // namespace
}  // namespace exl
