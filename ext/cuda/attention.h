// Causal attention over the paged key/value cache on CUDA. No torch here.
//
//   q            half (tokens, heads, head_dim): the new tokens of all sequences, one after another
//   k, v pages   half or bfloat16 (pages, page_size, kv_heads, head_dim); query head h reads head
//                h / (heads / kv_heads). Or quantized: rows of codes in place of heads, see ../common/kv_rows.h; they
//                are widened on the way to the tensor cores, never in memory. Start of either: 16-byte aligned
//   q_starts     int32 (sequences + 1): sequence s owns rows q_starts[s] .. q_starts[s + 1] - 1 of q
//   kv_lengths   int32 (sequences): its keys, the new tokens included; not fewer than its rows
//   page_table   int32 (sequences, table_width): key j lies in page [j / page_size] at offset j % page_size; only
//                entries of pages with a visible key are read
//   out          half (tokens, heads, head_dim)
//
// Row r of a sequence has index i = kv_length - rows + r and sees keys j, i - window < j <= i. Scores are
// scale * q.k, then softcap * tanh(score / softcap) if softcap > 0. Everything but q.k and the weighted values is
// float32; those are products of halves with float32 sums. bfloat16 pages are narrowed to half on the way: exact for
// magnitudes from 2^-14 to 65504, within 2^-25 below, infinite above.
//
// q_starts, kv_lengths and page_table stay on the device: a launch depends on numbers of the host only, so that it can
// be captured in a graph and replayed with other lengths, up to table_width * page_size keys.
//
// attention_decode_cuda does the sequences of 1 .. kDecodeRows rows and skips all others; attention_prefill_cuda does
// the others. Together they do everything.
//
// Order of summation, decode. Keys are taken in chunks of decode_chunk(kv_length) by their index; in a chunk, 16 keys
// at a time, warp w of 4 takes every fourth 16; the warps are merged in order, then the chunks. So the result of a row
// is the same bits in any batch, with any number of rows of its sequence beside it (while they fall into the same band
// of decode_chunk), in any order of blocks.
// Prefill: 64 or 32 keys at a time in order; the same bits in any batch.
//
// reference: exl_runtime/ops/attention/reference.py      test: tests/cuda/test_attention.py
#pragma once

#include <cstdint>

#include "stream.h"

namespace exl {

enum class PageKind : int { float16 = 0, bfloat16 = 1, codes = 2 };

constexpr int kDecodeRows = 16;
constexpr int kMostChunks = 128;

struct CudaAttention {
  const void* q;
  const void* k_pages;
  const void* v_pages;
  PageKind kind;
  int key_bits, value_bits;  // widths of the codes
  const int32_t* q_starts;
  const int32_t* kv_lengths;
  const int32_t* page_table;
  int tokens;
  int sequences;
  int table_width;
  int heads;
  int kv_heads;
  int head_dim;   // see attention_head_dim
  int page_size;  // a power of two, at least 16
  int window;     // at least 1; INT32_MAX for "all"
  float scale;
  float softcap;  // 0: none
  void* out;
  float* partial;  // decode: workspace of decode_workspace(args).floats floats, any content
  int32_t* tickets;  // decode: .tickets of them, zero before the launch and after it
};

struct DecodeWorkspace {
  int64_t floats;
  int64_t tickets;
};

// Whether the kernels were built for this head_dim.
bool attention_head_dim(int64_t head_dim);

// Keys of one chunk, by the length of the sequence.
#if defined(__CUDACC__)
__host__ __device__
#endif
constexpr int decode_chunk(int length) {
  if (length <= 2048) return 128;
  if (length <= 8192) return 256;
  int chunk = 512;
  while ((length - 1) / chunk >= kMostChunks) chunk *= 2;
  return chunk;
}

// Follows from tokens, sequences, table_width, heads and shape alone.
DecodeWorkspace decode_workspace(const CudaAttention& args);
void attention_decode_cuda(const CudaAttention& args, cudaStream_t stream);
void attention_prefill_cuda(const CudaAttention& args, cudaStream_t stream);

}  // namespace exl
