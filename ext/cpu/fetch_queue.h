// What a thread reads next, asked for a few lines at a time while it computes: else memory rests while a kernel is busy
// with arithmetic, and arithmetic while memory answers. Only hints: no result depends on them.
//
// In the order of addresses, line by line: the processor's own prefetcher then runs in front (30 GB/s where scattered
// lines get 22; see LOG.md).
#pragma once

#include <cstdint>

namespace exl {

// `count` pieces of memory of `bytes` bytes each. The pointers must stay where they are until they are used up.
struct FetchRows {
  const void* const* rows;
  int64_t count;
  int64_t bytes;
};

// All rows of the lists, in order.
struct FetchQueue {
  static constexpr int kLists = 4;
  FetchRows list[kLists];
  int lists;
  int64_t row, offset;  // of what comes next in list[0]
};

namespace {  // internal linkage: see isa.h

// At most kLists at a time.
inline void fetch_later(FetchQueue& queue, const FetchRows& rows) {
  if (queue.lists < FetchQueue::kLists) queue.list[queue.lists++] = rows;
}

// Forgets all lists but the last `count`.
inline void fetch_only(FetchQueue& queue, int count) {
  const int drop = queue.lists - count;
  if (drop <= 0) return;
  for (int i = 0; i < count; ++i) queue.list[i] = queue.list[i + drop];
  queue.lists = count;
  queue.row = queue.offset = 0;
}

// Asks for up to `lines` lines of 64 bytes.
inline void fetch_some(FetchQueue& queue, int64_t lines) {
  while (lines > 0 && queue.lists > 0) {
    const FetchRows& from = queue.list[0];
    if (queue.row >= from.count) {
      fetch_only(queue, queue.lists - 1);
      continue;
    }
    const uint8_t* at = static_cast<const uint8_t*>(from.rows[queue.row]);
    for (; lines > 0 && queue.offset < from.bytes; --lines, queue.offset += 64) {
      __builtin_prefetch(at + queue.offset, 0, 2);
    }
    if (queue.offset < from.bytes) return;
    ++queue.row, queue.offset = 0;
  }
}

}  // namespace
}  // namespace exl
