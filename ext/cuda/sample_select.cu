// registers: select_rows 64
#include "sample_common.cuh"

namespace exl {
namespace {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / 32;
constexpr int kBins = kThreads;      // one for every thread
constexpr int kCandidates = kThreads;
constexpr float kBinsPerNat = 32.0f;

struct Shared {
  uint64_t bins[kBins];        // measure by bin; later: ranks of candidates
  uint64_t measures[kCandidates];
  uint64_t parts[kWarps];
  uint64_t total;
  uint64_t base;               // measure of all that ranks above [low, high]
  uint64_t low, high;          // ranks among which the answer is
  int crossing;
  unsigned count;
};

// The tokens of one row that are still there, and how much each counts.
struct Row {
  const float* x;
  const uint64_t* weights;  // null: each counts 1
  int64_t vocab;
  uint64_t cut;

  __device__ __forceinline__ uint64_t measure(int64_t id) const { return weights == nullptr ? 1 : weights[id]; }
};

struct Smallest {
  __device__ uint64_t operator()(uint64_t a, uint64_t b) const { return a < b ? a : b; }
};

// Fills s.bins by `bin_of(value, rank)`, -1 for tokens that are not asked about.
template <class Bin>
__device__ void fill_bins(Shared& s, const Row& row, Bin bin_of) {
  s.bins[threadIdx.x] = 0;
  __syncthreads();
  for (int64_t id = threadIdx.x; id < row.vocab; id += kThreads) {
    const float value = row.x[id];
    const uint64_t rank = rank_of(value, id);
    if (rank < row.cut) continue;
    const int bin = bin_of(value, rank);
    if (bin < 0) continue;
    const uint64_t measure = row.measure(id);
    if (measure != 0) atomicAdd(reinterpret_cast<unsigned long long*>(&s.bins[bin]), (unsigned long long)(measure));
  }
  __syncthreads();
}

// The bin in which the running measure reaches `target`, into s.crossing; s.base moves to its beginning.
__device__ void cross(Shared& s, uint64_t target) {
  const uint64_t mine = s.bins[threadIdx.x], base = s.base;
  uint64_t total = 0;
  const uint64_t before = base + scan_block<kWarps>(mine, s.parts, &total);
  if (before < target && target <= before + mine) {  // exactly one thread
    s.crossing = int(threadIdx.x);
    s.base = before;
  }
  __syncthreads();
}

// The lowest and the highest rank in the crossing bin, into s.low and s.high, and how many there are.
template <class Bin>
__device__ void narrow(Shared& s, const Row& row, Bin bin_of) {
  const int wanted = s.crossing;
  uint64_t low = kBad, high = 0, count = 0;
  for (int64_t id = threadIdx.x; id < row.vocab; id += kThreads) {
    const float value = row.x[id];
    const uint64_t rank = rank_of(value, id);
    if (rank < row.cut || bin_of(value, rank) != wanted) continue;
    low = rank < low ? rank : low;
    high = rank > high ? rank : high;
    ++count;
  }
  low = over_block<kWarps>(low, s.parts, Smallest{});
  high = over_block<kWarps>(high, s.parts, Largest{});
  count = over_block<kWarps>(count, s.parts, Sum{});
  if (threadIdx.x == 0) {
    s.low = low;
    s.high = high;
    s.count = unsigned(count);
  }
  __syncthreads();
}

// The rank of the first token, best first, at which the running measure reaches `target`, 1 <= target <= the whole.
__device__ uint64_t rank_at(Shared& s, const Row& row, float best, uint64_t target) {
  if (threadIdx.x == 0) s.base = 0;
  __syncthreads();
  // By distance from the best first: logits spread over many of these bins, their bits over few.
  const auto by_distance = [best](float value, uint64_t) {
    const float bin = (best - value) * kBinsPerNat;
    return bin < float(kBins - 1) ? int(bin) : kBins - 1;
  };
  fill_bins(s, row, by_distance);
  cross(s, target);
  narrow(s, row, by_distance);
  // Then by rank, in 1024 times finer bins each time, until few enough are left.
  while (s.count > kCandidates) {
    const uint64_t low = s.low, high = s.high;
    int shift = 0;
    while (((high - low) >> shift) >= uint64_t(kBins)) ++shift;
    const auto by_rank = [low, high, shift](float, uint64_t rank) {
      return rank < low || rank > high ? -1 : int((high - rank) >> shift);
    };
    __syncthreads();  // everybody has read s
    fill_bins(s, row, by_rank);
    cross(s, target);
    narrow(s, row, by_rank);
  }
  const uint64_t low = s.low, high = s.high, base = s.base;
  const unsigned count = s.count;
  __syncthreads();
  if (threadIdx.x == 0) s.count = 0;
  __syncthreads();
  for (int64_t id = threadIdx.x; id < row.vocab; id += kThreads) {
    const uint64_t rank = rank_of(row.x[id], id);
    if (rank < row.cut || rank < low || rank > high) continue;
    const unsigned place = atomicAdd(&s.count, 1u);  // any order will do: each looks at all the others
    s.bins[place] = rank;
    s.measures[place] = row.measure(id);
  }
  __syncthreads();
  if (threadIdx.x < count) {
    const uint64_t rank = s.bins[threadIdx.x], own = s.measures[threadIdx.x];
    uint64_t running = base;
    for (unsigned i = 0; i < count; ++i) running += s.bins[i] >= rank ? s.measures[i] : 0;
    if (running >= target && running - own < target) s.low = rank;  // exactly one
  }
  __syncthreads();
  const uint64_t answer = s.low;
  __syncthreads();
  return answer;
}

__device__ uint64_t whole(Shared& s, const Row& row) {
  uint64_t sum = 0;
  for (int64_t id = threadIdx.x; id < row.vocab; id += kThreads) {
    if (rank_of(row.x[id], id) >= row.cut) sum += row.measure(id);
  }
  return over_block<kWarps>(sum, s.parts, Sum{});
}

// A block for each row: narrows `cut` by top-k, top-p and min-p in the order of the slot.
__global__ void __launch_bounds__(kThreads)
    select_rows(const int32_t* __restrict__ slots, SampleState state, const float* __restrict__ x,
                const uint64_t* __restrict__ weights, uint64_t* work, int64_t vocab, int chunks) {
  EXL_SHARED(Shared, shared, [1]);
  Shared& s = shared[0];
  const int64_t row = blockIdx.x, slot = slots[row];
  const Work w(work, row, vocab, chunks);
  const double* reals = state.reals + slot * kSampleReals;
  const int64_t* wholes = state.wholes + slot * kSampleWholes;
  const uint64_t rank = *w.best;
  if (rank == kBad || (wholes[kFlags] & (kGreedy | kPlain)) != 0) return;
  const float best = value_of(rank);
  uint64_t cut = *w.cut;
  for (uint64_t cuts = uint64_t(wholes[kCuts]); cuts != 0; cuts >>= 4) {
    Row rest{x + row * vocab, nullptr, vocab, cut};
    if ((cuts & 15) == 1) {
      const uint64_t k = uint64_t(wholes[kTopK]);
      if (whole(s, rest) > k) cut = rank_at(s, rest, best, k);
    } else if ((cuts & 15) == 2) {
      rest.weights = weights + row * vocab;
      const uint64_t total = whole(s, rest);
      const double need = ceil(reals[kTopP] * double(total));
      const uint64_t target = need < 1.0 ? 1 : need < double(total) ? uint64_t(need) : total;
      cut = rank_at(s, rest, best, target);
    } else if ((cuts & 15) == 3) {
      const float bound = float(double(best) + log(reals[kMinP]));
      const uint64_t least = uint64_t(key_of(bound)) << 32;
      cut = least > cut ? least : cut;
    }
  }
  if (threadIdx.x == 0) *w.cut = cut;
}

}  // namespace

void sample_select_cuda(const int32_t* slots, const SampleState& state, const float* x, const uint64_t* weights,
                        uint64_t* work, int64_t rows, int64_t vocab, cudaStream_t stream) {
  const int chunks = int((vocab + kSampleChunk - 1) / kSampleChunk);
  EXL_LAUNCH(select_rows, dim3(unsigned(rows)), dim3(kThreads), 0, stream, slots, state, x, weights, work, vocab,
             chunks);
}

}  // namespace exl
