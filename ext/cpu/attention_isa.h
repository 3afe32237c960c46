// What attention.cpp asks of an instruction set: a table of functions, one table per attention_<isa>.cpp.
#pragma once

#include <cstdint>

#include "attention.h"
#include "fetch_queue.h"

namespace exl {

constexpr int64_t kMostRows = 96;  // query rows taken together; a multiple of every register tile

// Keys or values that are widened at a time: as many as fill half the first-level cache.
constexpr int64_t kPanelFloats = 4096;
constexpr int64_t panel_keys(int64_t padded_dim) {
  const int64_t fitting = kPanelFloats / padded_dim / 4 * 4;
  return fitting < 4 ? 4 : fitting < kChunk ? fitting : kChunk;
}
constexpr int64_t panel_floats(int64_t padded_dim) { return panel_keys(padded_dim) * padded_dim; }

// Query rows of one key/value head against one chunk of its keys.
struct AttentionChunk {
  const float* q;  // (rows, padded_dim), zeros behind head_dim
  int64_t rows;
  int64_t head_dim;
  int64_t padded_dim;          // head_dim rounded up to 16
  const void* const* keys;     // kChunk pointers to one head each; only [first, last) are used
  const void* const* values;
  int64_t skip;                // elements from there to the head; 0 for rows of codes
  Dtype dtype;                 // of keys and values
  int key_bits, value_bits;    // not 0: they are rows of codes instead, worth 2^(bits - 1) times what they stand for
  int64_t first, last;         // keys that any row sees, within the chunk
  const int64_t* begin;        // per row: the keys it sees, within [first, last); possibly none
  const int64_t* end;
  float scale;
  float softcap;
  float* scores;               // scratch: (rows, kChunk)
  float* panel;                // scratch: panel_floats(padded_dim)
};

// A softmax over some keys, not yet divided: sum of e^(s - maximum), and of e^(s - maximum) * value.
struct AttentionState {
  float* maximum;  // (rows), -infinity: no keys
  float* sum;      // (rows)
  float* mixed;    // (rows, padded_dim)
};

constexpr int64_t kMostHeads = 8;  // taken together

struct AttentionIsa {
  // `heads` neighbouring key/value heads, at most kMostHeads: their chunks differ in q, skip and scores only. One if
  // keys are codes.
  // Meanwhile what is in `queue` is asked for, which may be null.
  void (*attend)(const AttentionChunk* chunks, int64_t heads, const AttentionState* to, FetchQueue* queue);
  // total := total and the keys of `next`
  void (*merge)(const AttentionState& total, const AttentionState& next, int64_t rows, int64_t padded_dim);
};

const AttentionIsa& attention_portable();
const AttentionIsa& attention_avx2();
const AttentionIsa& attention_avx512();

}  // namespace exl
