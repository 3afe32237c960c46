// The inner loops of the small operators, one table per instruction set. No threads here: the operators' own files
// (rms_norm.cpp, rope.cpp, ...) hold the contracts, cut the work and call through `row_kernels()`.
//
// All rows are computed independently and in the same order of operations on every instruction set (see vec8.h).
#pragma once

#include <cstdint>

#include "../common/half.h"
#include "gated.h"

namespace exl {

struct RowKernels {
  // One row of rms_norm.h.
  void (*rms_norm)(const void* x, const float* weight, void* y, Dtype dtype, int64_t cols, float eps, float offset);
  // x += more, then one row of rms_norm.h; y may be the memory of more.
  void (*add_norm)(float* x, const float* more, const float* weight, float* y, int64_t cols, float eps, float offset);
  // out[i] = activation(gate[i]) * up[i]
  void (*gated)(const void* gate, const void* up, void* out, Dtype dtype, int64_t count, Activation activation);
  // The heads of one token, in place; see rope.h.
  void (*rope)(void* x, Dtype dtype, int64_t heads, int64_t head_dim, int64_t rotary_dim, const float* cos,
               const float* sin);
  // to[i] = from[i], rounded if `to` is narrower.
  void (*convert)(const void* from, Dtype from_dtype, void* to, Dtype to_dtype, int64_t count);
  // One head of float32 into a row of codes (common/kv_rows.h); x is overwritten.
  void (*quantize)(float* x, int64_t head_dim, int bits, uint8_t* row);
  // One head times the blocks of Hadamard matrices of common/kv_rows.h, in place. Its own inverse.
  void (*rotate)(float* x, int64_t head_dim);
  // The largest element; NaN if there is a NaN among them, -infinity if count is 0.
  float (*max)(const float* x, int64_t count);
};

extern const RowKernels row_kernels_portable;
#if EXL_X86_ISA
extern const RowKernels row_kernels_avx2;
#endif

// The table for the instruction set in use. AVX-512 uses the AVX2 one: these loops wait for memory, not for lanes.
const RowKernels& row_kernels();

}  // namespace exl
