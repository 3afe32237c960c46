// Stores the keys or values of new tokens into the pages of one layer: pages[slots[t]] <- x[t].
//
//   x      from_dtype, (tokens, width), width = kv_heads * head_dim; each token contiguous, x_stride elements apart
//   pages  to_dtype, (pages * page_size, width) row-major; rounded to nearest even where to_dtype is narrower
//   slots  int64 (tokens), each in [0, pages * page_size): checked by the caller through bad_slot. Distinct: with a
//          repeated slot it is not defined which token stays
//
// Reference: exl_runtime/ops/kv_append.py. Test: tests/ops/test_native_small.py, tests/ops/test_kv_quant.py
#pragma once

#include <cstdint>

#include "../common/half.h"

namespace exl {

// Index of the first slot outside [0, slot_count), or -1.
int64_t bad_slot(const int64_t* slots, int64_t tokens, int64_t slot_count);

void kv_append(const void* x, Dtype from_dtype, void* pages, Dtype to_dtype, const int64_t* slots, int64_t tokens,
               int64_t width, int64_t x_stride);

// The same into quantized pages, (pages * page_size, kv_heads) rows of codes of `bits` bits: see ../common/kv_rows.h.
void kv_append_codes(const void* x, Dtype from_dtype, uint8_t* pages, int bits, const int64_t* slots, int64_t tokens,
                     int64_t kv_heads, int64_t head_dim, int64_t x_stride);

}  // namespace exl
