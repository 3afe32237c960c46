// Lays the rows of x down as the B operands that skinny.h multiplies with: half, in the order of positions.
//
//   x        dtype (m, inputs), row-major
//   rows     int32 (units * 32): the input at each position, -1 for none (0 is written); null: inputs in order, and
//            0 from `inputs` on
//   staged   half [units][m][32], 16-byte aligned. Number 8t + 2o + e of the 32 is position 8o + 2t + e: lane (g, t) of
//            a warp reads what it needs of row g in one piece.
//   factors  float (m,): x = staged * factor. 1 for half input, which is copied. Otherwise a power of two that brings
//            the row's largest number to 2^14 .. 2^15, so that no input is too large for half; 1 for rows that are all
//            zero or not finite.
//
// test: tests/cuda/test_skinny.py
#pragma once

#include "../common/half.h"
#include "stream.h"

namespace exl {

void skinny_stage_cuda(const void* x, Dtype dtype, const int32_t* rows, void* staged, float* factors, int64_t m,
                       int64_t inputs, int64_t units, cudaStream_t stream);

}  // namespace exl
