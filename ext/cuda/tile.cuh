// Decoding the tiles of tile.h in registers. Device code only.
#pragma once

#include "exl_cuda.h"
#include "ptx.h"
#include "tile.h"

namespace exl {
namespace tile {

constexpr uint32_t kMagic = 0x64006400;  // two halves 1024; a code or-ed into the low bits is added exactly

__device__ __forceinline__ __half2 as_half2(uint32_t bits) {
  __half2 h;
  memcpy(&h, &bits, 4);
  return h;
}

__device__ __forceinline__ uint32_t as_bits(__half2 h) {
  uint32_t bits;
  memcpy(&bits, &h, 4);
  return bits;
}

__device__ __forceinline__ uint32_t twice(__half h) { return uint32_t(__half_as_ushort(h)) * 0x00010001u; }

// Or the field that starts at bit FROM of both halves of `word`, WIDTH bits wide, into bit TO of both halves of v.
template <int FROM, int TO, int WIDTH>
__device__ __forceinline__ uint32_t merge(uint32_t word, uint32_t v) {
  constexpr uint32_t mask = (((1u << WIDTH) - 1) << TO) * 0x00010001u;
  const uint32_t moved = FROM >= TO ? word >> (FROM >= TO ? FROM - TO : 0) : word << (FROM >= TO ? 0 : TO - FROM);
  return ptx::lop3<0xEA>(moved, mask, v);
}

// One lane's codes of a tile, still packed.
template <int BITS>
struct Codes {
  static_assert(BITS == 2 || BITS == 3 || BITS == 4 || BITS == 5 || BITS == 6 || BITS == 8, "a width of the format");
  static constexpr bool kFour = BITS >= 4;
  static constexpr bool kEight = BITS == 8;
  static constexpr bool kTwo = (BITS & 2) != 0;
  static constexpr bool kOne = (BITS & 1) != 0;
  uint32_t four[4], eight[4], two[2], one;

  __device__ __forceinline__ void load(const unsigned char* tile, int lane) {
    int at = 0;
    if (kFour) {
      const uint4 v = *reinterpret_cast<const uint4*>(tile + lane * 16);
      four[0] = v.x, four[1] = v.y, four[2] = v.z, four[3] = v.w;
      at += 4 * kLineBytes;
    }
    if (kEight) {
      const uint4 v = *reinterpret_cast<const uint4*>(tile + at + lane * 16);
      eight[0] = v.x, eight[1] = v.y, eight[2] = v.z, eight[3] = v.w;
    }
    if (kTwo) {
      const uint2 v = *reinterpret_cast<const uint2*>(tile + at + lane * 8);
      two[0] = v.x, two[1] = v.y;
      at += 2 * kLineBytes;
    }
    if (kOne) one = *reinterpret_cast<const uint32_t*>(tile + at + lane * 4);
  }

  // Register R of fragment F as two halves 1024 + code.
  template <int F, int R>
  __device__ __forceinline__ uint32_t raw() const {
    uint32_t v = kMagic;
    if (kFour) v = merge<4 * R, 0, 4>(four[F], v);
    if (kEight) v = merge<4 * R, 4, 4>(eight[F], v);
    if (kTwo) v = merge<8 * (F & 1) + 2 * R, kFour ? 4 : 0, 2>(two[F >> 1], v);
    if (kOne) v = merge<4 * F + R, BITS - 1, 1>(one, v);
    return v;
  }

  // The same as two halves code - zero, exact; `zero` is two halves 1024 + zero.
  template <int F, int R>
  __device__ __forceinline__ uint32_t code(uint32_t zero) const {
    if constexpr (BITS == 4 && (R & 1) == 1) {
      // Left where they are, the odd fields make 1024 + 16 code: a multiplication by 1/16 does what a shift would.
      const uint32_t raw16 = merge<4, 4, 4>(four[F] >> (R == 3 ? 8 : 0), kMagic);
      const __half2 less = __hsub2(as_half2(0x63806380), as_half2(zero));  // 960 - (1024 + zero)
      return as_bits(__hfma2(as_half2(raw16), as_half2(0x2c002c00), less));
    }
    return as_bits(__hsub2(as_half2(raw<F, R>()), as_half2(zero)));
  }
};

// What the codes of one group mean for a lane: entry i belongs to column 8i + g.
struct GroupScales {
  uint32_t halves[2];  // the scales of entries 0, 1 and 2, 3
  uint32_t zero[4];    // two halves 1024 + zero-point

  __device__ __forceinline__ __half scale(int i) const {
    return __ushort_as_half(static_cast<unsigned short>(halves[i >> 1] >> (16 * (i & 1)) & 0xffffu));
  }

  // record: of this group and tile column; in shared or global memory
  __device__ __forceinline__ void load(const CudaMatrix& w, const unsigned char* record, int bits, int group, int g) {
    if (w.kind == ScaleRecord::exl2) {
      const uint32_t nibbles = reinterpret_cast<const uint16_t*>(record)[g];
      const float most = __half2float(__ushort_as_half(__ldg(w.maxima + group)));
      halves[0] = halves[1] = 0;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int s = int(nibbles >> (4 * i) & 15u) + 1;
        const __half scale = __float2half_rn(float(s * s) * most);  // the format rounds here
        halves[i >> 1] |= uint32_t(__half_as_ushort(scale)) << (16 * (i & 1));
      }
    } else {
      const uint2 both = reinterpret_cast<const uint2*>(record)[g];
      halves[0] = both.x;
      halves[1] = both.y;
    }
    if (w.kind == ScaleRecord::zeros) {
      const uint32_t bytes = reinterpret_cast<const uint32_t*>(record + 64)[g];
#pragma unroll
      for (int i = 0; i < 4; ++i) zero[i] = kMagic + ((bytes >> (8 * i) & 255u) + uint32_t(w.zero_base)) * 0x00010001u;
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) zero[i] = kMagic + (1u << (bits - 1)) * 0x00010001u;
    }
  }
};

}  // namespace tile
}  // namespace exl
