// What the kernels of sample.cu and sample_select.cu share: ranks, fixed-point weights, the generator, the workspace.
#pragma once

#include "element.cuh"
#include "sample.h"

namespace exl {

// Cuts rows with top-k or top-p (sample_select.cu).
void sample_select_cuda(const int32_t* slots, const SampleState& state, const float* x, const uint64_t* weights,
                        uint64_t* work, int64_t rows, int64_t vocab, cudaStream_t stream);

namespace {

constexpr float kInfinity = __builtin_huge_valf();
constexpr uint64_t kBad = ~uint64_t(0);                             // not the rank of any number
constexpr uint64_t kFirstRank = (uint64_t(0x007fffffu) << 32 | 0xffffffffu) + 1;  // above every -infinity
constexpr double kUnit = 17592186044416.0;                          // 2^44
constexpr double kDeepest = -32.0;                                  // e^-32 is below half of 2^-44
constexpr double kLeast = 1e-18;                                    // FLOOR of ops/sample.py

// Floats as integers of the same order, -0 equal to 0.
__device__ __forceinline__ uint32_t key_of(float value) {
  const uint32_t bits = __float_as_uint(value + 0.0f);
  return (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
}

// Greater for a larger logit, among equals for the lower id.
__device__ __forceinline__ uint64_t rank_of(float value, int64_t id) {
  return uint64_t(key_of(value)) << 32 | (0xffffffffu - uint32_t(id));
}
__device__ __forceinline__ int64_t id_of(uint64_t rank) { return int64_t(0xffffffffu - uint32_t(rank)); }
__device__ __forceinline__ float value_of(uint64_t rank) {
  const uint32_t key = uint32_t(rank >> 32);
  return __uint_as_float((key & 0x80000000u) != 0 ? key & 0x7fffffffu : ~key);
}

// exp(below) in units of 2^-44, below <= 0
__device__ __forceinline__ uint64_t fixed(double below) {
  return below > kDeepest ? uint64_t(exp(below) * kUnit + 0.5) : 0;
}

// The weight of a token in the last step, 0 if it was cut.
struct Weigher {
  __device__ Weigher(const double* reals, int64_t flags, uint64_t best, uint64_t cut)
      : plain((flags & kPlain) != 0),
        last((flags & kTemperatureLast) != 0),
        cut(cut),
        temperature(reals[kTemperature]),
        least(reals[kMinP] > kLeast ? reals[kMinP] : kLeast),
        best(last ? double(value_of(best) / float(temperature)) : double(value_of(best))) {}

  __device__ __forceinline__ uint64_t operator()(float value, int64_t id) const {
    if (rank_of(value, id) < cut) return 0;
    if (!plain) return fixed(double(last ? value / float(temperature) : value) - best);
    const double below = (double(value) - best) / temperature;
    if (below < kDeepest) return 0;
    const double weight = exp(below);
    return weight < least ? 0 : uint64_t(weight * kUnit + 0.5);
  }

  bool plain, last;
  uint64_t cut;
  double temperature, least, best;
};

// Philox4x32-10: the 53 bits of exl_runtime/sampling/random.py: uniform, stream DRAW.
__device__ __forceinline__ uint64_t uniform53(uint64_t seed, uint64_t index) {
  uint32_t c0 = uint32_t(index), c1 = uint32_t(index >> 32), c2 = 0, c3 = 0;
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t left = uint64_t(0xD2511F53u) * c0, right = uint64_t(0xCD9E8D57u) * c2;
    c0 = uint32_t(right >> 32) ^ c1 ^ k0;
    c1 = uint32_t(right);
    c2 = uint32_t(left >> 32) ^ c3 ^ k1;
    c3 = uint32_t(left);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return (uint64_t(c0) << 32 | c1) >> 11;
}

// The sum over the threads before this one; `total` over all. Integers: exact in any order.
template <int WARPS>
__device__ __forceinline__ uint64_t scan_block(uint64_t value, uint64_t* parts, uint64_t* total) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  uint64_t inclusive = value;
  for (int distance = 1; distance < 32; distance <<= 1) {
    const uint64_t left = __shfl_up_sync(0xffffffffu, inclusive, distance);
    if (lane >= distance) inclusive += left;
  }
  if (lane == 31) parts[warp] = inclusive;
  __syncthreads();
  uint64_t before = 0, all = 0;
  for (int w = 0; w < WARPS; ++w) {
    if (w < warp) before += parts[w];
    all += parts[w];
  }
  __syncthreads();
  *total = all;
  return before + inclusive - value;
}

// The parts of one row's workspace.
struct Work {
  __device__ Work(uint64_t* work, int64_t row, int64_t vocab, int chunks)
      : sums(work + row * (2 * chunks + 3)),
        bests(sums + chunks),
        best(bests + chunks),
        cut(best + 1),
        ticket(cut + 1) {
    (void)vocab;
  }
  uint64_t *sums, *bests, *best, *cut, *ticket;
};

}  // namespace
}  // namespace exl
