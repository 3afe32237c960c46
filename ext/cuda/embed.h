// out[t, c] = table[tokens[t], c] * scale
//
//   tokens  int64 (count)
//   table   dtype (vocab, cols) row-major
//   out     float32 (count, cols) row-major
//
// A token outside the table gives a row of NaN: a kernel cannot raise, and the check of the logits will.
// Reference: exl_runtime/model/embedding.py. Test: tests/cuda/test_rows.py
#pragma once

#include <cstdint>

#include "../common/half.h"
#include "stream.h"

namespace exl {

void embed_cuda(const int64_t* tokens, const void* table, Dtype dtype, float* out, int64_t count, int64_t vocab,
                int64_t cols, float scale, cudaStream_t stream);

}  // namespace exl
