// One call of every ptx:: wrapper, and of the arithmetic on halves that kernels rest on, with fixed inputs. Prints
// lines `name: words in hex`. Compiled by g++ (emulated) and by nvcc (on a card) it must print the same: test_ptx.py.
#include <cstdio>
#include <cstring>
#include <string>

#include "../../../ext/cuda/ptx.h"

namespace {

constexpr int kWords = 1024, kOut = 128;

// out[4 * lane + i], at most four words to a lane. `in` holds bits of all kinds, `small` pairs of halves that are
// multiples of 1/2 below 8 and `brain` the same as bfloat16: their products add up exactly in any order.
struct Inputs {
  const uint32_t *in, *small, *brain;
};

template <class Type>
__device__ uint32_t bits_of(Type value) {
  uint32_t bits = 0;
  memcpy(&bits, &value, sizeof(Type));
  return bits;
}

template <class Type>
__device__ Type from_bits(uint32_t bits) {
  Type value;
  memcpy(&value, &bits, sizeof(Type));
  return value;
}

__device__ void fragments(const uint32_t* from, int lane, uint32_t (&a)[4], uint32_t (&b)[2], float (&c)[4]) {
  for (int i = 0; i < 4; ++i) a[i] = from[4 * lane + i];
  for (int i = 0; i < 2; ++i) b[i] = from[128 + 2 * lane + i];
  for (int i = 0; i < 4; ++i) c[i] = float(lane * 4 + i) * 0.25f;
}

__global__ void call(int what, Inputs inputs, uint32_t* out) {
  EXL_SHARED(uint4, rows, [64]);
  const int lane = int(threadIdx.x);
  const uint32_t* in = inputs.in;
  uint32_t r[4] = {0, 0, 0, 0}, a[4], b[2], pair[2];
  float c[4];
  auto* words = reinterpret_cast<uint32_t*>(rows);
  for (int i = 0; i < 8; ++i) words[8 * lane + i] = in[8 * lane + i];
  __syncthreads();
  const uint32_t x = in[lane], y = in[lane + 32], z = in[lane + 64];
  const auto hx = from_bits<__half2>(x), hy = from_bits<__half2>(y), hz = from_bits<__half2>(z);
  switch (what) {
    case 0:
      fragments(inputs.small, lane, a, b, c);
      ptx::mma_m16n8k16_f16(c, a, b, c);
      for (int i = 0; i < 4; ++i) r[i] = bits_of(c[i]);
      break;
    case 1:
      fragments(inputs.brain, lane, a, b, c);
      ptx::mma_m16n8k16_bf16(c, a, b, c);
      for (int i = 0; i < 4; ++i) r[i] = bits_of(c[i]);
      break;
    case 2: ptx::ldmatrix_x4(r, &rows[lane * 2 % 61]); break;
    case 3: ptx::ldmatrix_x4_trans(r, &rows[lane * 2 % 61]); break;
    case 4:
    case 5:
      if (what == 4) ptx::ldmatrix_x2(pair, &rows[lane * 2 % 61]);
      if (what == 5) ptx::ldmatrix_x2_trans(pair, &rows[lane * 2 % 61]);
      r[0] = pair[0];
      r[1] = pair[1];
      break;
    case 6:
    case 7:
    case 8:
    case 9:
    case 10:
    case 11:
    case 12: {
      const uint32_t* source = in + 512 + 4 * lane;
      if (what == 6) ptx::cp_async4(&rows[lane], source);
      if (what == 7) ptx::cp_async8(&rows[lane], source);
      if (what == 8) ptx::cp_async16(&rows[lane], source);
      if (what == 9) ptx::cp_async4_zfill(&rows[lane], source, lane % 5);
      if (what == 10) ptx::cp_async8_zfill(&rows[lane], source, lane % 9);
      if (what == 11) ptx::cp_async16_zfill(&rows[lane], source, lane % 17);
      if (what == 12) ptx::cp_async16_hint(&rows[lane], source, ptx::policy_evict_first());
      ptx::cp_async_commit();
      ptx::cp_async_wait<0>();
      const uint4 v = rows[lane];
      r[0] = v.x, r[1] = v.y, r[2] = v.z, r[3] = v.w;
      break;
    }
    case 13:
    case 14: {
      ptx::prefetch_l2(in);
      const uint32_t* from = in + 4 * lane;
      const uint4 v = what == 13 ? ptx::load16_once(from) : ptx::load16_hint(from, ptx::policy_evict_first());
      r[0] = v.x, r[1] = v.y, r[2] = v.z, r[3] = v.w;
      break;
    }
    case 15: {
      const uint2 v = ptx::load8_once(in + 2 * lane);
      r[0] = v.x, r[1] = v.y, r[2] = ptx::load4_once(in + lane);
      break;
    }
    case 16:
      r[0] = ptx::lop3<0xEA>(x, y, z);
      r[1] = ptx::lop3<0x1D>(x, y, z);
      r[2] = ptx::lop3<0x96>(x, y, z);
      r[3] = ptx::lop3<0x42>(x, y, z);
      break;
    case 17:
      r[0] = ptx::prmt(x, y, z & 0x7777u);
      r[1] = ptx::prmt(x, y, z & 0xffffu);
      r[2] = ptx::prmt(x, y, 0x5410u);
      r[3] = ptx::prmt(x, y, 0x7632u);
      break;
    case 18:
      r[0] = bits_of(__hfma2(hx, hy, hz));
      r[1] = bits_of(__hmul2(hx, hy));
      r[2] = bits_of(__hadd2(hx, hy));
      r[3] = bits_of(__hsub2(hx, hz));
      break;
    case 19:
      r[0] = bits_of(__hfma2(from_bits<__nv_bfloat162>(x), from_bits<__nv_bfloat162>(y), from_bits<__nv_bfloat162>(z)));
      r[1] = bits_of(__floats2half2_rn(from_bits<float>(x & 0x4fffffffu), float(lane) * 1e-8f));
      r[2] = bits_of(__floats2bfloat162_rn(from_bits<float>(x), from_bits<float>(y)));
      r[3] = bits_of(fmaf(float(lane) + 0.1f, float(lane) - 0.7f, 1.0f / float(lane + 3)));
      break;
    case 20:
      r[0] = uint32_t(__shfl_up_sync(~0u, int(x), 3, 16));
      r[1] = uint32_t(__shfl_down_sync(~0u, int(x), 5, 8));
      r[2] = uint32_t(__shfl_xor_sync(~0u, int(x), 9));
      r[3] = uint32_t(__shfl_sync(~0u, int(x), lane + 7, 16));
      break;
    case 21:
      r[0] = __ballot_sync(~0u, x & 1);
      r[1] = uint32_t(__reduce_add_sync(~0u, int(x)));
      r[2] = __reduce_max_sync(~0u, x);
      r[3] = uint32_t(__reduce_min_sync(~0u, int(x)));
      break;
    case 22:
      r[0] = uint32_t(__dp4a(int(x), int(y), int(z)));
      r[1] = __funnelshift_r(x, y, z);
      r[2] = __umulhi(x, y);
      r[3] = __brev(x) ^ uint32_t(__popc(y)) ^ uint32_t(__clz(int(z)));
      break;
    case 23:  // only close: compared within a bound
      r[0] = bits_of(ptx::exp2_approx(float(lane - 16) * 0.37f));
      r[1] = bits_of(ptx::exp2_approx(-130.0f - float(lane)));
      r[2] = bits_of(__expf(float(lane - 16) * 0.37f));
      r[3] = bits_of(rsqrtf(float(lane + 1) * 0.37f));
      break;
    case 24:
      r[0] = ptx::movmatrix_trans(x);
      r[1] = ptx::movmatrix_trans(y);
      break;
    case 25: {
      EXL_SHARED(int, counters, [3]);
      if (lane < 3) counters[lane] = lane == 2 ? -1 : 0;
      r[0] = uint32_t(__syncthreads_count(int(x & 1)));
      r[1] = uint32_t(__syncthreads_or(x == 5) + 2 * __syncthreads_and(x != 5) + 4 * __syncthreads_or(lane == 9));
      atomicAdd(&counters[0], int(x & 255));
      atomicMax(&counters[1], int(y & 0xffff));
      atomicCAS(&counters[2], lane == 4 ? -1 : -2, lane);
      __syncthreads();
      r[2] = uint32_t(counters[0]);
      r[3] = uint32_t(counters[1]) + (uint32_t(counters[2]) << 16);
      break;
    }
    default: break;
  }
  for (int i = 0; i < 4; ++i) out[4 * lane + i] = r[i];
}

const char* const kNames[] = {
    "mma_m16n8k16_f16", "mma_m16n8k16_bf16", "ldmatrix_x4",      "ldmatrix_x4_trans", "ldmatrix_x2",
    "ldmatrix_x2_trans", "cp_async4",        "cp_async8",        "cp_async16",        "cp_async4_zfill",
    "cp_async8_zfill",  "cp_async16_zfill",  "cp_async16_hint",  "load16_once",       "load16_hint",
    "load8_load4_once", "lop3",              "prmt",             "half2_arithmetic",  "rounding",
    "shuffle",          "vote_reduce",       "integers",         "approximate",       "movmatrix_trans",
    "barrier_atomics",
};

#if defined(__CUDACC__)
uint32_t* words(size_t count) {
  void* p = nullptr;
  EXL_CUDA_CHECK(cudaMallocManaged(&p, count * 4));
  return static_cast<uint32_t*>(p);
}
void finish() { EXL_CUDA_CHECK(cudaDeviceSynchronize()); }
#else
uint32_t* words(size_t count) { return static_cast<uint32_t*>(aligned_alloc(256, count * 4)); }
void finish() {}
#endif

}  // namespace

int main() {
  uint32_t *in = words(kWords), *small = words(kWords), *brain = words(kWords), *out = words(kOut);
  for (int i = 0; i < kWords; ++i) {
    in[i] = uint32_t(i + 1) * 2654435761u ^ uint32_t(i) << 7;
    float value[2] = {float(i * 5 % 31 - 15) * 0.5f, float(i * 11 % 29 - 14) * 0.5f};
    uint32_t bits[2];
    memcpy(bits, value, 8);
    small[i] = brain[i] = 0;
    for (int h = 0; h < 2; ++h) {
      const uint32_t exponent = bits[h] >> 23 & 255u;
      const uint32_t half = exponent ? (exponent - 112u) << 10 | (bits[h] >> 13 & 1023u) : 0u;
      small[i] |= (half | (bits[h] >> 31) << 15) << 16 * h;
      brain[i] |= bits[h] >> 16 << 16 * h;
    }
  }
  for (int what = 0; what < int(sizeof kNames / sizeof *kNames); ++what) {
    EXL_LAUNCH(call, dim3(1), dim3(32), 0, nullptr, what, Inputs{in, small, brain}, out);
    finish();
    std::printf("%s:", kNames[what]);
    for (int i = 0; i < kOut; ++i) std::printf(" %08x", out[i]);
    std::printf("\n");
  }
  return 0;
}
