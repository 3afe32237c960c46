// Streams of small unsigned codes, least significant bit first (formats/exl2.md 3.1): code i of a stream of `bits`-bit
// codes occupies stream bits i*bits .. i*bits + bits - 1, and stream bit p is bit p % 8 of byte p / 8. EXL2 and GPTQ
// cut the same stream into little-endian 32-bit words, so on the machines we build for the bytes are those of the file.
//
// Kernels consume a stream in steps of 16 codes: 2 * bits whole bytes for every width.
//
//   step of 3-bit codes   byte  0        1        2        3        4        5
//                         code  00011122 23334445 55666777 888999aa abbbcccd ddeeefff     (each byte: low bit first)
//
// Everything has internal linkage, see cpu/isa.h.
#pragma once

#include <cstdint>

namespace exl {
namespace {

constexpr int kStepCodes = 16;

constexpr bool legal_width(int bits) { return (bits >= 2 && bits <= 6) || bits == 8; }

constexpr int step_bytes(int bits) { return 2 * bits; }

// Code i of a step; at most 8 bits wide, so it lies in one byte or in two neighbours.
inline uint32_t code_in_step(const uint8_t* step, int bits, int i) {
  const int position = i * bits, byte = position / 8, offset = position % 8;
  uint32_t two = step[byte];
  if (offset + bits > 8) two |= uint32_t(step[byte + 1]) << 8;
  return (two >> offset) & ((1u << bits) - 1u);
}

// The order in which the 16 lanes of a vector receive the codes of a step: lane l gets code lane_code(bits, l). For 3
// and 4 bits even lanes take the first 8 codes and odd lanes the last 8: then one 64-bit broadcast and one shift per
// lane separate them. The input vector is gathered in the same order, so that nothing else needs to know.
constexpr int lane_code(int bits, int lane) {
  return bits == 3 || bits == 4 ? (lane % 2) * 8 + lane / 2 : lane;
}

}  // namespace
}  // namespace exl
