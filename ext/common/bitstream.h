// Streams of small unsigned codes, least significant bit first (formats/exl2.md 3.1): code i of a stream of `bits`-bit
// codes occupies stream bits i*bits .. i*bits + bits - 1, and stream bit p is bit p % 8 of byte p / 8. EXL2 and GPTQ
// cut the same stream into little-endian 32-bit words, so on the machines we build for the bytes are those of the file.
//
// Everything has internal linkage, see cpu/isa.h.
#pragma once

#include <cstdint>

namespace exl {
namespace {

constexpr bool legal_width(int bits) { return (bits >= 2 && bits <= 6) || bits == 8; }

}  // namespace
}  // namespace exl
