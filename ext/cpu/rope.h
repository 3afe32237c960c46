// Rotary position embedding of queries or keys, in place. The pair (i, i + rotary_dim / 2) turns by its angle:
//
//   x[t, h, i]        <-  x[t, h, i] * cos[t, i] - x[t, h, i + half] * sin[t, i]        i < half = rotary_dim / 2
//   x[t, h, i + half] <-  x[t, h, i + half] * cos[t, i] + x[t, h, i] * sin[t, i]
//
//   x         dtype, (tokens, heads, head_dim); a token's heads are contiguous, tokens are token_stride elements apart
//   cos, sin  float32 (tokens, rotary_dim / 2), any attention factor already multiplied in
//   rotary_dim  even, at most head_dim; elements from rotary_dim on stay as they are
//
// In float32, in the order written above, without fused operations: float32 results equal torch's bit for bit.
// Reference: exl_runtime/ops/rope.py. Test: tests/ops/test_native_small.py
#pragma once

#include <cstdint>

#include "../common/half.h"

namespace exl {

void rope(void* x, Dtype dtype, int64_t tokens, int64_t heads, int64_t head_dim, int64_t token_stride,
          int64_t rotary_dim, const float* cos, const float* sin);

}  // namespace exl
