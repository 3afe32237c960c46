// registers: weigh_rows 64
// registers: draw_rows 64
// registers: shape_rows 64
#include "sample.h"

#include "element.cuh"
#include "sample_common.cuh"

namespace exl {
namespace {

constexpr int kThreads = 256;
constexpr int kEach = int(kSampleChunk) / kThreads;  // neighbours of a thread
constexpr int kWarps = kThreads / 32;

// The last block of a row to come here, and what all of them wrote is visible to it.
__device__ __forceinline__ bool arrives_last(uint64_t* ticket, int blocks, int* flag) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    unsigned* counter = reinterpret_cast<unsigned*>(ticket);
    const bool last = atomicAdd(counter, 1u) == unsigned(blocks - 1);
    if (last) atomicExch(counter, 0u);
    __threadfence();
    *flag = last;
  }
  __syncthreads();
  return *flag != 0;
}

// What the state of a slot becomes with one more token. One thread.
__device__ void append(const SampleState& state, int64_t slot, int64_t vocab, int64_t token) {
  int64_t* wholes = state.wholes + slot * kSampleWholes;
  wholes[kIndex] += 1;
  if (wholes[kCounts] < 0) return;
  int32_t* counts = state.counts + wholes[kCounts] * vocab;
  counts[token] += 1;
  const int64_t range = wholes[kRange];
  if (range < 0) return;  // nothing is ever forgotten
  int32_t* history = state.history + slot * state.capacity;
  const int64_t length = wholes[kLength];
  if (length >= range) {
    const int32_t gone = history[(length - range) % state.capacity];
    if (gone >= 0 && gone < vocab) counts[gone] -= 1;
  }
  history[length % state.capacity] = int32_t(token);
  wholes[kLength] = length + 1;
}

// grid (chunks, rows): bias, penalties, temperature; the best token of the row.
__global__ void __launch_bounds__(kThreads)
    shape_rows(const float* __restrict__ logits, const int32_t* __restrict__ slots, SampleState state, float* x,
               uint64_t* work, int64_t* out, int64_t vocab) {
  EXL_SHARED(uint64_t, parts, [kWarps]);
  EXL_SHARED(int, flag, [1]);
  const int64_t row = blockIdx.y, slot = slots[row];
  const int chunks = gridDim.x;
  const Work w(work, row, vocab, chunks);
  const double* reals = state.reals + slot * kSampleReals;
  const int64_t* wholes = state.wholes + slot * kSampleWholes;
  const int64_t flags = wholes[kFlags];
  const int64_t table = wholes[wholes[kIndex] < wholes[kMinTokens] ? kEarlyBias : kBias];
  const float* bias = table < 0 ? nullptr : state.bias + table * vocab;
  const int32_t* counts = wholes[kCounts] < 0 ? nullptr : state.counts + wholes[kCounts] * vocab;
  const bool divides = (flags & (kGreedy | kPlain | kTemperatureLast)) == 0 && reals[kTemperature] != 1.0;
  const float temperature = float(reals[kTemperature]);

  uint64_t best = 0;
  for (int i = 0; i < kEach; ++i) {
    const int64_t id = int64_t(blockIdx.x) * kSampleChunk + i * kThreads + threadIdx.x;
    if (id >= vocab) break;
    float value = logits[row * vocab + id];
    if (!(value < kInfinity)) {  // NaN or +infinity, told from what follows: bias may be -infinity
      best = kBad;
      continue;
    }
    if (bias != nullptr) value += bias[id];
    if (counts != nullptr && counts[id] > 0) {
      const double factor = 1.0 + (reals[kRepetition] - 1.0);
      double wide = double(value);
      wide = wide > 0.0 ? wide / factor : wide * factor;
      wide -= reals[kFrequency] * double(counts[id]) + reals[kPresence];
      value = float(wide);
    }
    if (divides) value = value / temperature;
    x[row * vocab + id] = value;
    const uint64_t rank = rank_of(value, id);
    best = rank > best ? rank : best;
  }
  best = over_block<kWarps>(best, &parts[0], Largest{});
  if (threadIdx.x == 0) w.bests[blockIdx.x] = best;
  if (!arrives_last(w.ticket, chunks, &flag[0])) return;
  best = 0;
  for (int c = threadIdx.x; c < chunks; c += kThreads) best = w.bests[c] > best ? w.bests[c] : best;
  best = over_block<kWarps>(best, &parts[0], Largest{});
  if (threadIdx.x != 0) return;
  if (best != kBad && best < kFirstRank) best = kBad;  // nothing is allowed
  *w.best = best;
  *w.cut = kFirstRank;
  if (best == kBad) {
    out[row] = -1;
  } else if ((flags & kGreedy) != 0) {
    out[row] = id_of(best);
    append(state, slot, vocab, id_of(best));
  }
}

// grid (chunks, rows): the weights that `select_rows` sums, for rows with top-p
__global__ void __launch_bounds__(kThreads)
    weigh_rows(const int32_t* __restrict__ slots, SampleState state, const float* __restrict__ x,
               uint64_t* __restrict__ weights, uint64_t* work, int64_t vocab) {
  const int64_t row = blockIdx.y;
  const Work w(work, row, vocab, gridDim.x);
  const double top_p = state.reals[slots[row] * kSampleReals + kTopP];
  if (*w.best == kBad || !(top_p < 1.0)) return;
  const double best = double(value_of(*w.best));
  for (int i = 0; i < kEach; ++i) {
    const int64_t id = int64_t(blockIdx.x) * kSampleChunk + i * kThreads + threadIdx.x;
    if (id < vocab) weights[row * vocab + id] = fixed(double(x[row * vocab + id]) - best);
  }
}

// grid (chunks, rows): the weights of what is left, their sum, and the token at quantile u
__global__ void __launch_bounds__(kThreads)
    draw_rows(const int32_t* __restrict__ slots, SampleState state, const float* __restrict__ x, uint64_t* work,
              int64_t* out, int64_t vocab) {
  EXL_SHARED(uint64_t, parts, [kWarps]);
  EXL_SHARED(uint64_t, found, [2]);
  EXL_SHARED(int, flag, [1]);
  const int64_t row = blockIdx.y, slot = slots[row];
  const int chunks = gridDim.x;
  const Work w(work, row, vocab, chunks);
  const double* reals = state.reals + slot * kSampleReals;
  const int64_t* wholes = state.wholes + slot * kSampleWholes;
  const int64_t flags = wholes[kFlags];
  const uint64_t rank = *w.best;
  if (rank == kBad || (flags & kGreedy) != 0) return;  // all blocks of the row alike
  const Weigher weigh(reals, flags, rank, *w.cut);

  uint64_t sum = 0;
  for (int i = 0; i < kEach; ++i) {
    const int64_t id = int64_t(blockIdx.x) * kSampleChunk + i * kThreads + threadIdx.x;
    if (id < vocab) sum += weigh(x[row * vocab + id], id);
  }
  sum = over_block<kWarps>(sum, &parts[0], Sum{});
  if (threadIdx.x == 0) w.sums[blockIdx.x] = sum;
  if (!arrives_last(w.ticket, chunks, &flag[0])) return;

  // The chunk in which the running sum first exceeds u * total; then the token in it. Up to 512 chunks.
  uint64_t mine[2];
  for (int i = 0; i < 2; ++i) {
    const int c = int(threadIdx.x) * 2 + i;
    mine[i] = c < chunks ? w.sums[c] : 0;
  }
  uint64_t total = 0;
  uint64_t before = scan_block<kWarps>(mine[0] + mine[1], &parts[0], &total);
  const uint64_t target = __umul64hi(uniform53(uint64_t(wholes[kSeed]), uint64_t(wholes[kIndex])) << 11, total);
  for (int i = 0; i < 2; ++i) {
    if (before <= target && target < before + mine[i]) {  // exactly one thread
      found[0] = uint64_t(threadIdx.x) * 2 + i;
      found[1] = before;
    }
    before += mine[i];
  }
  __syncthreads();
  const int64_t first = int64_t(found[0]) * kSampleChunk + int64_t(threadIdx.x) * kEach;
  const uint64_t rest = target - found[1];
  uint64_t own = 0, each[kEach];
  for (int i = 0; i < kEach; ++i) {
    each[i] = first + i < vocab ? weigh(x[row * vocab + first + i], first + i) : 0;
    own += each[i];
  }
  uint64_t running = scan_block<kWarps>(own, &parts[0], &total);
  for (int i = 0; i < kEach; ++i) {
    if (running <= rest && rest < running + each[i]) {
      out[row] = first + i;
      append(state, slot, vocab, first + i);
    }
    running += each[i];
  }
}

__global__ void advance_rows(const int64_t* __restrict__ drawn, int64_t* tokens, int64_t* positions, int64_t* slots,
                             int32_t* kv_lengths, const int32_t* __restrict__ pages, int64_t rows, int64_t width,
                             int64_t page_size) {
  const int64_t row = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (row >= rows) return;
  const int64_t at = kv_lengths[row];  // the new token comes behind all that are there
  if (drawn[row] >= 0) tokens[row] = drawn[row];
  positions[row] += 1;
  kv_lengths[row] = int32_t(at + 1);
  const int64_t page = at / page_size;
  // Beyond the table: the host did not make room, so this step will not be used; it must still write somewhere harmless.
  slots[row] = int64_t(pages[row * width + (page < width ? page : width - 1)]) * page_size + at % page_size;
}

}  // namespace

void sample_cuda(const float* logits, const int32_t* slots, const SampleState& state, float* x, uint64_t* weights,
                 uint64_t* work, int64_t* out, int64_t rows, int64_t vocab, bool draws, bool selects,
                 cudaStream_t stream) {
  if (rows == 0) return;
  const dim3 grid(unsigned((vocab + kSampleChunk - 1) / kSampleChunk), unsigned(rows)), block(kThreads);
  EXL_LAUNCH(shape_rows, grid, block, 0, stream, logits, slots, state, x, work, out, vocab);
  if (!draws) return;
  if (selects) {
    EXL_LAUNCH(weigh_rows, grid, block, 0, stream, slots, state, x, weights, work, vocab);
    sample_select_cuda(slots, state, x, weights, work, rows, vocab, stream);
  }
  EXL_LAUNCH(draw_rows, grid, block, 0, stream, slots, state, x, work, out, vocab);
}

void advance_cuda(const int64_t* drawn, int64_t* tokens, int64_t* positions, int64_t* slots, int32_t* kv_lengths,
                  const int32_t* pages, int64_t rows, int64_t width, int64_t page_size, cudaStream_t stream) {
  if (rows == 0) return;
  EXL_LAUNCH(advance_rows, dim3(unsigned((rows + 31) / 32)), dim3(32), 0, stream, drawn, tokens, positions, slots,
             kv_lengths, pages, rows, width, page_size);
}

}  // namespace exl
