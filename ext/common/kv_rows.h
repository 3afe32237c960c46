// How one quantized head of a key/value cache lies in memory. The definition: exl_runtime/ops/kv_quant.py.
//
//   row    ceil(head_dim / 32) halves, the scales of the groups of 32 values; then ceil(head_dim / 16) steps
//   step   16 codes of `bits` bits as planes, of the powers of two in `bits`, largest first, high bits first; a plane
//          of width w takes 2 * w bytes. As one little-endian number, code j of it lies at bit kv_code_bit(w, j).
//
//   4-bit step   byte  0   1   2   3   4   5   6   7
//                code  0 2 4 6 8 a c e 1 3 5 7 9 b d f      (in a byte the low half first)
//
// A code f stands for (f - (m - 1/2)) * scale / m, m = 2^(bits - 1), in the rotated basis. The kernels leave 1 / m to
// their callers: then the product of a code and a half is exact in float32, fused or not.
//
// Everything has internal linkage, see cpu/isa.h.
#pragma once

#include <cstdint>

namespace exl {
namespace {

constexpr int64_t kKvGroup = 32;  // values of one scale, and of one block of the rotation
constexpr int64_t kKvStep = 16;   // codes

constexpr int64_t kv_groups(int64_t head_dim) { return (head_dim + kKvGroup - 1) / kKvGroup; }
constexpr int64_t kv_steps(int64_t head_dim) { return (head_dim + kKvStep - 1) / kKvStep; }
constexpr int64_t kv_row_bytes(int64_t head_dim, int bits) {
  return 2 * kv_groups(head_dim) + 2 * bits * kv_steps(head_dim);
}

// The width of the codes in rows of `bytes` bytes; 0: none fits.
constexpr int kv_bits(int64_t bytes, int64_t head_dim) {
  for (int bits = 2; bits <= 8; ++bits) {
    if (bytes == kv_row_bytes(head_dim, bits)) return bits;
  }
  return 0;
}

constexpr float kv_middle(int bits) { return float(1 << (bits - 1)); }

constexpr int kv_code_bit(int width, int j) { return width == 4 ? j / 2 * 4 + j % 2 * 32 : width * j; }

}  // namespace
}  // namespace exl
