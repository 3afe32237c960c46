// Rotary position embedding and the storing of new keys and values, in one pass over them. No torch here.
//
//   q       q_dtype (tokens, heads, head_dim), rotated in place
//   k       k_dtype (tokens, kv_heads, head_dim), rotated; with pages only what is stored is rotated, k itself stays
//   v       v_dtype (tokens, kv_heads, head_dim)
//           a token's heads are contiguous, tokens are *_stride elements apart
//   cos, sin  float32 (tokens, rotary_dim / 2), any attention factor already multiplied in; null: nothing is rotated
//   pages   float32, half or bfloat16 (slots, kv_heads, head_dim), or rows of codes, see ../common/kv_rows.h
//   slots   int64 (tokens): pages[slots[t]] <- token t. Distinct. One outside [0, slot_count) is not written
//
// q, or v with the pages, may be null. Elements from rotary_dim on stay as they are. Rotation is in float32 without
// fused operations, rounded to k's dtype before it is stored, rounded to nearest even or quantized: the bits of
// exl_runtime/ops/{rope,kv_append,kv_quant}.py. (The payload of a NaN may differ.)
//
// reference: exl_runtime/ops/rope.py, kv_append.py, kv_quant.py      test: tests/cuda/test_kv_append.py
#pragma once

#include <cstdint>

#include "../common/half.h"
#include "stream.h"

namespace exl {

struct KvAppend {
  void* q;
  void* k;
  const void* v;
  Dtype q_dtype, k_dtype, v_dtype;
  int64_t q_stride, k_stride, v_stride;
  int64_t tokens;
  int heads, kv_heads;
  int head_dim;    // at most kMostHeadDim
  int rotary_dim;  // even
  const float* cos;
  const float* sin;
  void* k_pages;  // null: k is rotated in place instead
  void* v_pages;
  Dtype page_dtype;
  int key_bits, value_bits;  // 0: elements of page_dtype
  const int64_t* slots;
  int64_t slot_count;
};

constexpr int kMostHeadDim = 1024;

void kv_append_cuda(const KvAppend& args, cudaStream_t stream);

}  // namespace exl
