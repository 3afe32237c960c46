// Codes of a quantized cache as operands of the tensor cores. Included by the attention kernels only.
//
// code_pair gives codes j and j + 8 of a step (16 codes) in the low and the high half of a word, whatever their width.
// Keys: lane t of a row takes j = 2t and 2t + 1, so the matrix sees the columns of a step in the order 0 8 1 9 2 10 ...
// and queries are laid out in the same order. Values: lane g takes j = g, rows g and g + 8 of the transposed tile.
//
// A code c of b bits stands for (2 c - 2 m + 1) / (2 m) times the scale of its group, m = 2^(b - 1). In half the number
// 2 c + 1024 is the pattern 0x6400 + 2 c; what follows is exact.
#pragma once

#include <type_traits>

#include "../common/kv_rows.h"
#include "attention_blocks.cuh"

namespace exl {
namespace {

__device__ inline uint32_t load_u16(const uint8_t* p) { return *reinterpret_cast<const uint16_t*>(p); }

// Four bytes; rows of an odd number of groups, and steps of an odd width, begin at any even address.
template <bool kAligned>
__device__ inline uint32_t load_u32(const uint8_t* p) {
  if constexpr (kAligned) return *reinterpret_cast<const uint32_t*>(p);
  return load_u16(p) | load_u16(p + 2) << 16;
}

template <int kBits, bool kAligned>
__device__ inline uint32_t code_pair(const uint8_t* step, int j) {
  constexpr bool kWords = kAligned && kBits % 2 == 0;
  uint32_t pair = 0;
  if constexpr ((kBits & 8) != 0) {
    pair = step[j] | uint32_t(step[j + 8]) << 16;
    step += 16;
  }
  if constexpr ((kBits & 4) != 0) {
    pair = pair << 4 | (load_u32<kWords>(step + 4 * (j & 1)) >> (j >> 1) * 4 & 0x000f000fu);
    step += 8;
  }
  if constexpr ((kBits & 2) != 0) {
    pair = pair << 2 | (load_u32<kWords>(step) >> 2 * j & 0x00030003u);
    step += 4;
  }
  if constexpr ((kBits & 1) != 0) {
    const uint32_t plane = load_u16(step);
    pair = pair << 1 | ((plane | plane << 8) >> j & 0x00010001u);
  }
  return pair;
}

// Codes -> 2 c - 2 m + 1.
template <int kBits>
__device__ inline uint32_t code_integers(uint32_t pair) {
  constexpr uint32_t kOffset = 0x6400u + (2u << (kBits - 1)) - 1u;  // 1024 + 2 m - 1
  return half2_bits(__hsub2(bits_half2(2 * pair + 0x64006400u), bits_half2(kOffset * 0x00010001u)));
}

// Codes -> (2 c - 2 m + 1) / (2 m), the part of the scale.
template <int kBits>
__device__ inline __half2 code_fractions(uint32_t pair) {
  constexpr float kInverse = 0.5f / float(1 << (kBits - 1));
  const __half2 inverse = __float2half2_rn(kInverse);
  const __half2 offset = __float2half2_rn(-(1024.0f + 1.0f / kInverse - 1.0f) * kInverse);
  return __hfma2(bits_half2(2 * pair + 0x64006400u), inverse, offset);
}

__device__ inline __half load_half(const uint8_t* p) { return __ushort_as_half(uint16_t(load_u16(p))); }

// f(std::integral_constant<int, bits>), one warp-uniform branch for all of a tile.
template <class F>
__device__ inline void with_bits(int bits, const F& f) {
  switch (bits) {
    case 2: return f(std::integral_constant<int, 2>{});
    case 3: return f(std::integral_constant<int, 3>{});
    case 4: return f(std::integral_constant<int, 4>{});
    case 5: return f(std::integral_constant<int, 5>{});
    case 6: return f(std::integral_constant<int, 6>{});
    case 7: return f(std::integral_constant<int, 7>{});
    default: return f(std::integral_constant<int, 8>{});
  }
}

}  // namespace
}  // namespace exl
