// Rotating and quantizing heads: part of row_kernels_body.h. What comes out: exl_runtime/ops/kv_quant.py, to the bit.
#pragma once

#include <cstring>

#include "../common/half.h"
#include "../common/kv_rows.h"
#include "vec8.h"

namespace exl {
namespace {

// 1 / sqrt(size) for the sizes of blocks.
inline float block_norm(int64_t size) {
  switch (size) {
    case 32: return 0.17677669529663687f;
    case 16: return 0.25f;
    case 8: return 0.35355339059327373f;
    case 4: return 0.5f;
    case 2: return 0.70710678118654757f;
    default: return 1.0f;
  }
}

EXL_INLINE F8 flip(F8 v, U8 signs) { return F8(U8(v) ^ signs); }

// The first three stages of the transform: each value becomes its partner 1, 2, then 4 away, plus or minus itself.
EXL_INLINE F8 stages_1_2_4(F8 v) {
  constexpr uint32_t n = 0x80000000u;
  v = F8{v[1], v[0], v[3], v[2], v[5], v[4], v[7], v[6]} + flip(v, U8{0, n, 0, n, 0, n, 0, n});
  v = F8{v[2], v[3], v[0], v[1], v[6], v[7], v[4], v[5]} + flip(v, U8{0, 0, n, n, 0, 0, n, n});
  return F8{v[4], v[5], v[6], v[7], v[0], v[1], v[2], v[3]} + flip(v, U8{0, 0, 0, 0, n, n, n, n});
}

// x (32) times the Hadamard matrix over sqrt(32), in place.
EXL_INLINE void rotate_32(float* x) {
  const F8 a = stages_1_2_4(load(x)), b = stages_1_2_4(load(x + 8));
  const F8 c = stages_1_2_4(load(x + 16)), d = stages_1_2_4(load(x + 24));
  const F8 ab = a + b, amb = a - b, cd = c + d, cmd = c - d;
  const float norm = block_norm(32);
  store((ab + cd) * norm, x);
  store((amb + cmd) * norm, x + 8);
  store((ab - cd) * norm, x + 16);
  store((amb - cmd) * norm, x + 24);
}

inline void rotate_small(float* x, int64_t size) {
  for (int64_t span = 1; span < size; span *= 2) {
    for (int64_t start = 0; start < size; start += 2 * span) {
      for (int64_t i = start; i < start + span; ++i) {
        const float low = x[i], high = x[i + span];
        x[i] = low + high;
        x[i + span] = low - high;
      }
    }
  }
  for (int64_t i = 0; i < size; ++i) x[i] *= block_norm(size);
}

// Up to 32 values: one block, or blocks of a power of two, largest first.
inline void rotate_group(float* x, int64_t count) {
  if (count == kKvGroup) return rotate_32(x);
  for (int64_t size = kKvGroup / 2; size > 0; size /= 2) {
    if ((count & size) == 0) continue;
    rotate_small(x, size);
    x += size;
  }
}

inline void rotate_head(float* x, int64_t head_dim) {
  for (int64_t d = 0; d < head_dim; d += kKvGroup) {
    rotate_group(x + d, head_dim - d < kKvGroup ? head_dim - d : kKvGroup);
  }
}

// 16 codes as the planes of a step.
inline void pack_step(const int32_t* codes, int bits, uint8_t* to) {
  int below = bits;
  for (int width = 8; width > 0; width /= 2) {
    if ((bits & width) == 0) continue;
    below -= width;
    if (width == 8) {
      for (int j = 0; j < kKvStep; ++j) to[j] = uint8_t(codes[j]);
    } else {
      uint64_t plane = 0;
      for (int j = 0; j < kKvStep; ++j) {
        plane |= uint64_t((uint32_t(codes[j]) >> below) & ((1u << width) - 1u)) << kv_code_bit(width, j);
      }
      std::memcpy(to, &plane, size_t(2 * width));
    }
    to += 2 * width;
  }
}

// x: one head, overwritten.
inline void quantize_head(float* x, int64_t head_dim, int bits, uint8_t* row) {
  const float middle = kv_middle(bits), top = 2.0f * middle - 1.0f;
  uint8_t* step = row + 2 * kv_groups(head_dim);
  for (int64_t d = 0; d < head_dim; d += kKvGroup, row += 2) {
    const int64_t count = head_dim - d < kKvGroup ? head_dim - d : kKvGroup;
    float v[kKvGroup] = {};
    std::memcpy(v, x + d, size_t(count) * sizeof(float));
    rotate_group(v, count);
    int32_t most = 0;  // magnitudes compare as integers, and NaN is above all of them
    for (int i = 0; i < kKvGroup; ++i) {
      const int32_t magnitude = int32_t(float_to_bits(v[i]) & 0x7fffffffu);
      most = magnitude > most ? magnitude : most;
    }
    const float scale = bits_to_float(uint32_t(most)) + 1e-10f, inverse = 1.0f / scale;
    int32_t codes[kKvGroup];
    for (int i = 0; i < kKvGroup; ++i) {
      float level = v[i] * inverse * middle + middle;
      level = level > 0.0f ? level : 0.0f;  // NaN as well
      codes[i] = int32_t(level < top ? level : top);
    }
    for (int64_t i = count; i < kKvGroup; ++i) codes[i] = 0;
    const uint16_t half = float_to_half(scale);
    std::memcpy(row, &half, sizeof half);
    for (int64_t i = 0; i < count; i += kKvStep, step += 2 * bits) pack_step(codes + i, bits, step);
  }
}

}  // namespace
}  // namespace exl
