// Keys and values on their way from the pages into shared memory. Included by the attention kernels only.
#pragma once

#include "attention_blocks.cuh"

namespace exl {
namespace {

// Bytes between rows in shared memory: room for a row that begins anywhere in its first 16 bytes, and an odd number of
// 16-byte units so that the rows of a tile begin in different banks.
inline int ring_stride(int row_bytes, bool codes) {
  return codes ? ((row_bytes + 14 + 15) / 16 | 1) * 16 : row_bytes + 16;
}

// What a warp needs to know of the pages: where the 16 keys from `base` on lie.
struct Pages {
  const int32_t* table;  // of the sequence
  int page_shift;
  int kv_heads, kv_head;
  int low, high;         // keys outside are not read: zeros take their place

  // Heads of kv_heads before the one of key `base`, a multiple of 16.
  __device__ int64_t head(int base) const {
    const int64_t page = table[base >> page_shift];
    return ((page << page_shift) + (base & ((1 << page_shift) - 1))) * kv_heads + kv_head;
  }
};

__device__ inline Pages pages_of(const CudaAttention& a, int sequence, int kv_head, int low, int high) {
  int page_shift = 0;
  while ((1 << page_shift) < a.page_size) ++page_shift;
  return {a.page_table + int64_t(sequence) * a.table_width, page_shift, a.kv_heads, kv_head, low, high};
}

// Rows of `row_bytes` bytes of 16 keys into a slot, two lanes to a row. A row keeps its place within 16 bytes.
__device__ inline void fetch_rows(const Pages& pages, const uint8_t* rows, int row_bytes, int base, uint8_t* slot,
                                  int stride, int lane) {
  const int r = lane >> 1, key = base + r;
  const int64_t at = (pages.head(base) + int64_t(r) * pages.kv_heads) * row_bytes;
  const int shift = int(at) & 15, units = (shift + row_bytes + 15) >> 4;
  const uint8_t* from = rows + (at - shift);
  uint8_t* to = slot + r * stride;
  const bool seen = key >= pages.low && key < pages.high;
  for (int unit = lane & 1; unit < units; unit += 2) {
    // A row without a visible key may lie anywhere: its address is not even formed.
    ptx::cp_async16_zfill(to + 16 * unit, seen ? from + 16 * unit : rows, seen ? 16 : 0);
  }
}

// Where row r of a slot begins, given the head of its row 0.
__device__ inline const uint8_t* slot_row(const uint8_t* slot, int stride, uint32_t head, int kv_heads, int row_bytes,
                                          int r) {
  return slot + r * stride + ((head + uint32_t(r) * uint32_t(kv_heads)) * uint32_t(row_bytes) & 15u);
}

}  // namespace
}  // namespace exl
