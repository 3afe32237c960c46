// Causal attention over the paged key/value cache. No torch here.
//
//   q            float32 (T, heads, head_dim): the new tokens of all sequences, one after another
//   k, v pages   float32, half or bfloat16 (pages, page_size, kv_heads, head_dim); query head h reads head
//                h / (heads / kv_heads). Or quantized: rows of codes in place of heads, see ../common/kv_rows.h; they
//                are widened a few at a time, queries are rotated first and what is mixed is rotated back
//   q_starts     (sequences + 1): sequence s owns rows q_starts[s] .. q_starts[s + 1] - 1 of q
//   kv_lengths   (sequences): its keys, the new tokens included; not fewer than its rows
//   page_table   (sequences, table_width): key j lies in page [j / page_size] at offset j % page_size
//   out          float32 (T, heads, head_dim)
//
// Row r of a sequence has index i = kv_length - rows + r and sees keys j, i - window < j <= i. Scores are
// scale * q.k, then softcap * tanh(score / softcap) if softcap > 0.
//
// Order of summation. Keys are taken in chunks of kChunk by their index in the sequence. Inside a chunk: the softmax of
// the visible keys against the chunk's own maximum; its weights summed in 16 lanes (key j in lane j % 16) and by the
// tree of lanes.h; values added key by key. Chunks are merged in order. All of that is fixed by the indices alone, so a
// query's result is the same bits in one prefill, in pieces or token by token, in any batch, on any number of threads,
// on AVX2 and on AVX-512.
//
// reference: exl_runtime/ops/attention/reference.py      test: tests/ops/test_attention_cpu.py
#pragma once

#include <cstdint>

#include "../common/half.h"

namespace exl {

constexpr int64_t kChunk = 256;  // keys

struct AttentionArgs {
  const float* q;
  const void* k_pages;
  const void* v_pages;
  Dtype dtype;
  int key_bits, value_bits;  // widths of the codes; both 0: elements of dtype
  const int32_t* q_starts;
  const int32_t* kv_lengths;
  const int32_t* page_table;
  int64_t sequences;
  int64_t table_width;
  int64_t heads;
  int64_t kv_heads;
  int64_t head_dim;
  int64_t page_size;
  int64_t window;  // at least 1; a huge number for "all"
  float scale;
  float softcap;  // 0: none
  float* out;
};

void paged_attention_cpu(const AttentionArgs& args);

}  // namespace exl
