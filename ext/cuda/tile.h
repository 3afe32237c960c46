// A quantized matrix as the CUDA kernels read it. EXL2 and GPTQ of every width and group size look alike here.
//
// Positions are the order in which a kernel meets the inputs: rows sorted by group, every group padded to whole units
// of 32. A unit has one width and one group. A tile is one unit of 32 columns (outputs), 1024 codes, 128 * bits bytes.
//
//   tiles    tile column c (columns 32c .. 32c + 31) is one stream of its units in order, tile_stride bytes. A tile is
//            cut into bit planes, the lowest bits first, 4-bit planes before 2 before 1: 3 = 2 + 1, 5 = 4 + 1,
//            6 = 4 + 2, 8 = 4 + 4. A lane of a warp finds its 32 codes of a plane in one piece: 4-bit plane 16 bytes,
//            2-bit 8 bytes, 1-bit 4 bytes, lane after lane.
//
// The 32 codes of lane (g, t) = (lane / 4, lane % 4) are the A operands of four mma.m16n8k16 with the weights as A.
// Register r of 0..3 of fragment f = 2 * nh + kh holds two codes e = 0, 1:
//
//   column 16 nh + 8 (r & 1) + g      position 16 kh + 8 (r >> 1) + 2t + e
//
//   4-bit plane  word f          bits 4r + 16e ..
//   2-bit plane  word f / 2      bits 8 kh + 2r + 16e ..
//   1-bit plane  one word        bit  4f + r + 16e
//
// so that (word >> 4r) & 0x000f000f are the two halves of a register, and | 0x64006400 makes them the fp16 numbers
// 1024 + code.
//
//   scales   [tile columns][groups] records. Column 8i + g of the 32 is entry (g, i):
//              exl2       16 bytes: 8 halfwords g of four nibbles s - 1; scale = half((s * s) * maxima[group])
//              symmetric  64 bytes: halves [g][i]; the zero-point is 2^(bits - 1), as for exl2
//              zeros      96 bytes: the same, then bytes [g][i]; the zero-point is zero_base more than the byte
//   units    per unit {128-byte lines of the stream before it, bits | group << 8}
//
// W = (code - zero) * scale.      reference: QuantFormat.dequantize      test: tests/cuda/test_repack.py
#pragma once

#include <cstdint>

namespace exl {

constexpr int kUnitRows = 32;     // positions of a unit
constexpr int kTileColumns32 = 32;  // columns of a tile
constexpr int kLineBytes = 128;   // of one bit plane's bit

enum class ScaleRecord : int32_t { exl2 = 0, symmetric = 1, zeros = 2 };

constexpr int record_bytes(ScaleRecord kind) {
  return kind == ScaleRecord::exl2 ? 16 : kind == ScaleRecord::symmetric ? 64 : 96;
}

struct UnitEntry {
  uint32_t line;
  uint32_t bits_group;
};

struct CudaMatrix {
  const uint8_t* tiles;
  const uint8_t* scales;
  const UnitEntry* units;
  const uint16_t* maxima;  // halves [groups]; exl2 only
  int64_t tile_stride;
  int32_t unit_count, groups, outputs;
  int32_t widest;  // bits
  int32_t record;  // bytes of a scale record
  ScaleRecord kind;
  int32_t zero_base;
};

}  // namespace exl
