// One token from each row of logits, without the logits leaving the device: bans and bias, penalties, temperature,
// top-k, top-p, min-p in any order of the three cuts, then the best token or a draw.
//
//   logits   float32 (rows, vocab), vocab up to 2^19; -infinity means "not allowed"
//   slots    int32 (rows): which slot of the state each row belongs to, all different
//   out      int64 (rows): the token, or -1 where there is none: NaN or +infinity, or nothing is allowed
//
// A slot is a request. Its state, written by the host when the request comes and advanced here with every token:
//
//   reals    float64 (slots, kSampleReals)    wholes  int64 (slots, kSampleWholes): the fields of `SampleReal`, `SampleWhole`
//   bias     float32 (tables, vocab): added to the logits; -infinity bans. wholes says which table, -1: none
//   counts   int32 (tables, vocab): how often a token occurs among the last kRange of the history (kRange -1: all of it)
//   history  int32 (slots, capacity): the latest tokens of prompt and reply, token i at i % capacity, -1 for one that is
//            not in the vocabulary; used where kRange is not -1, which is then below capacity
//
// What is computed is said by exl_runtime/sampling (masks, penalties, ranked, draw): the same numbers, with one
// exception. Weights exp(x - max) are rounded to multiples of 2^-44 and summed as integers: sums are exact in any order,
// so that results never depend on one, and a token below 2^-45 of the best is never drawn (the CPU's limit is 1e-18).
// Both agree but for draws that fall within about 1e-11 of the border between two tokens.
//
// All cuts keep a run of the tokens sorted by (logit descending, id ascending), so one number says what is kept: the
// `rank` of the last one, logit bits above, complement of the id below.
//
// Workspace: x float32 (rows, vocab); weights uint64 (rows, vocab), only where something `selects`; work uint64
// (rows, sample_work(vocab)), zero before the first call, and left so that the next call can use it.
// Reference: exl_runtime/sampling. Test: tests/cuda/test_sample.py
#pragma once

#include <cstdint>

#include "stream.h"

namespace exl {

enum SampleReal : int { kTemperature, kMinP, kTopP, kRepetition, kFrequency, kPresence, kSampleReals = 8 };
enum SampleWhole : int {
  kSeed,       // the 64 bits of the seed
  kIndex,      // tokens drawn so far; advanced here
  kTopK,       // 0: off
  kFlags,      // SampleFlag
  kRange,      // of the penalties; -1: everything
  kLength,     // of the history, tokens that left it included; advanced here
  kMinTokens,  // while kIndex is below, kEarlyBias is used in place of kBias
  kBias,       // row of bias, -1: none
  kEarlyBias,
  kCounts,     // row of counts, -1: no penalties
  kCuts,       // the cuts in order, four bits each from the lowest: 1 top-k, 2 top-p, 3 min-p, 0 ends
  kSampleWholes = 12
};
enum SampleFlag : int64_t {
  kGreedy = 1,           // the best token after bias and penalties
  kPlain = 2,            // temperature, min-p and draw in one, as ops/sample.py: exp((x - max) / temperature) in float64
  kTemperatureLast = 4,  // cut first, then divide
};

struct SampleState {
  const double* reals;
  int64_t* wholes;
  const float* bias;
  int32_t* counts;
  int32_t* history;
  int64_t capacity;
};

constexpr int64_t kSampleChunk = 1024;  // tokens of one block
constexpr int64_t kSampleVocab = 1 << 19;

inline int64_t sample_work(int64_t vocab) { return 2 * ((vocab + kSampleChunk - 1) / kSampleChunk) + 3; }

// draws: some row is not greedy; selects: some row has top-k or top-p. What no row needs is not launched.
void sample_cuda(const float* logits, const int32_t* slots, const SampleState& state, float* x, uint64_t* weights,
                 uint64_t* work, int64_t* out, int64_t rows, int64_t vocab, bool draws, bool selects,
                 cudaStream_t stream);

// The next step of rows that each drew a token: tokens = drawn (where it is >= 0), positions and kv_lengths one further,
// slots[r] the place of the new position in the row's pages.
//   tokens, positions, slots  int64 (rows);  kv_lengths int32 (rows);  pages int32 (rows, width);  drawn int64 (rows)
void advance_cuda(const int64_t* drawn, int64_t* tokens, int64_t* positions, int64_t* slots, int32_t* kv_lengths,
                  const int32_t* pages, int64_t rows, int64_t width, int64_t page_size, cudaStream_t stream);

}  // namespace exl
