// A checksum of 64 bits that finds damage as fast as memory is read. Against accidents, not against intent. No torch.
//
//   eight lanes of 64 bits, lane i taking the 8-byte words i, i + 8, ... in little-endian order:
//     lane = rotate_left((lane ^ word) * 0x9e3779b97f4a7c15, 29), beginning at i + 1
//   the last words are filled up with zeros; then the lanes in order and the number of bytes go the same way into one.
//
// Every step is a bijection of the lane, so any change of a single word changes the result.
// reference, test: tests/ops/test_checksum.py
#pragma once

#include <cstdint>

namespace exl {

uint64_t checksum_cpu(const uint8_t* bytes, int64_t count);

}  // namespace exl
