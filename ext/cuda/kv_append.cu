// One warp to a head of one token. See kv_append.h.
#include "kv_append.h"

#include "../common/kv_rows.h"
#include "exl_cuda.h"
#include "rotation.cuh"

namespace exl {
namespace {

constexpr int kAppendWarps = 4;

__device__ inline float load_element(const void* x, Dtype dtype, int64_t i) {
  if (dtype == Dtype::float32) return static_cast<const float*>(x)[i];
  if (dtype == Dtype::float16) return __half2float(static_cast<const __half*>(x)[i]);
  return __bfloat162float(static_cast<const __nv_bfloat16*>(x)[i]);
}

__device__ inline void store_element(void* x, Dtype dtype, int64_t i, float v) {
  if (dtype == Dtype::float32) {
    static_cast<float*>(x)[i] = v;
  } else if (dtype == Dtype::float16) {
    static_cast<__half*>(x)[i] = __float2half_rn(v);
  } else {
    static_cast<__nv_bfloat16*>(x)[i] = __float2bfloat16(v);
  }
}

__device__ inline float rounded(float v, Dtype dtype) {
  if (dtype == Dtype::float16) return __half2float(__float2half_rn(v));
  if (dtype == Dtype::bfloat16) return __bfloat162float(__float2bfloat16(v));
  return v;
}

// Byte `b` of a step of 16 codes of `bits` bits.
__device__ inline uint8_t step_byte(const uint8_t* codes, int bits, int b) {
  int below = bits;
  for (int width = 8; width > 0; width /= 2) {
    if ((bits & width) == 0) continue;
    below -= width;
    if (b < 2 * width) {
      const int count = 8 / width, mask = (1 << width) - 1;
      // 4 bits: even codes in the first four bytes, odd ones in the last four
      const int first = width == 4 ? b % 4 * 4 + b / 4 : b * count, apart = width == 4 ? 2 : 1;
      int byte = 0;
      for (int i = 0; i < count; ++i) byte |= (codes[first + i * apart] >> below & mask) << (width * i);
      return uint8_t(byte);
    }
    b -= 2 * width;
  }
  return 0;
}

// A head, in shared memory, as a row of codes. `codes`: 32 bytes of this warp.
__device__ void store_codes(const float* head, int head_dim, int bits, uint8_t* row, uint8_t* codes) {
  const int lane = threadIdx.x & 31, groups = (head_dim + 31) / 32;
  const float middle = float(1 << (bits - 1)), top = 2.0f * middle - 1.0f;
  for (int group = 0; group < groups; ++group) {
    const int left = head_dim - 32 * group, count = left < 32 ? left : 32;
    const float v = rotate_group(lane < count ? head[32 * group + lane] : 0.0f, count, lane);
    int most = int(__float_as_uint(v) & 0x7fffffffu);  // magnitudes compare as integers, and NaN is above all of them
    for (int span = 16; span > 0; span /= 2) {
      const int other = __shfl_xor_sync(~0u, most, span);
      most = other > most ? other : most;
    }
    const float scale = __fadd_rn(__uint_as_float(unsigned(most)), 1e-10f), inverse = __fdiv_rn(1.0f, scale);
    float level = __fadd_rn(__fmul_rn(__fmul_rn(v, inverse), middle), middle);
    level = level > 0.0f ? level : 0.0f;  // NaN as well
    codes[lane] = lane < count ? uint8_t(level < top ? level : top) : uint8_t(0);
    __syncwarp();
    if (lane == 0) {
      const uint16_t half = __half_as_ushort(__float2half_rn(scale));
      row[2 * group] = uint8_t(half), row[2 * group + 1] = uint8_t(half >> 8);
    }
    uint8_t* steps = row + 2 * groups + 2 * group * 2 * bits;
    for (int b = lane; b < (count + 15) / 16 * 2 * bits; b += 32) {
      const int step = b / (2 * bits);
      steps[b] = step_byte(codes + 16 * step, bits, b - step * 2 * bits);
    }
    __syncwarp();
  }
}

// A unit is one head: first those of q, then of k, then of v.
__global__ void __launch_bounds__(32 * kAppendWarps) kv_append_kernel(const KvAppend a, const int key_row,
                                                                      const int value_row) {
  EXL_DYN_SMEM(float, memory);
  EXL_SHARED(uint8_t, codes, [kAppendWarps][32]);
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int queries = a.q != nullptr ? a.heads : 0, keys = a.k != nullptr ? a.kv_heads : 0;
  const int values = a.v != nullptr ? a.kv_heads : 0, units = queries + keys + values;
  const int64_t unit = int64_t(blockIdx.x) * kAppendWarps + warp;
  if (unit >= a.tokens * units) return;  // whole warps
  const int64_t t = unit / units;
  const int n = int(unit % units);
  const bool is_query = n < queries, is_key = !is_query && n < queries + keys;
  const int h = is_query ? n : is_key ? n - queries : n - queries - keys;
  const void* x = is_query ? a.q : is_key ? a.k : a.v;
  const Dtype dtype = is_query ? a.q_dtype : is_key ? a.k_dtype : a.v_dtype;
  const int64_t from = t * (is_query ? a.q_stride : is_key ? a.k_stride : a.v_stride) + int64_t(h) * a.head_dim;

  float* head = memory + warp * a.head_dim;
  for (int d = lane; d < a.head_dim; d += 32) head[d] = load_element(x, dtype, from + d);
  __syncwarp();
  const bool turns = a.cos != nullptr && (is_query || is_key);
  if (turns) {
    const int half = a.rotary_dim / 2;
    for (int i = lane; i < half; i += 32) {
      const float c = a.cos[t * half + i], s = a.sin[t * half + i], first = head[i], second = head[i + half];
      head[i] = rounded(__fsub_rn(__fmul_rn(first, c), __fmul_rn(second, s)), dtype);
      head[i + half] = rounded(__fadd_rn(__fmul_rn(second, c), __fmul_rn(first, s)), dtype);
    }
    __syncwarp();
  }
  void* pages = is_query ? nullptr : is_key ? a.k_pages : a.v_pages;
  if (pages == nullptr) {
    if (!turns) return;
    void* to = is_query ? a.q : a.k;
    for (int d = lane; d < a.rotary_dim; d += 32) store_element(to, dtype, from + d, head[d]);
    return;
  }
  const int64_t slot = a.slots[t];
  if (slot < 0 || slot >= a.slot_count) return;
  const int bits = is_key ? a.key_bits : a.value_bits;
  const int64_t row = slot * a.kv_heads + h;
  if (bits == 0) {
    for (int d = lane; d < a.head_dim; d += 32) store_element(pages, a.page_dtype, row * a.head_dim + d, head[d]);
  } else {
    uint8_t* to = static_cast<uint8_t*>(pages) + row * (is_key ? key_row : value_row);
    store_codes(head, a.head_dim, bits, to, codes[warp]);
  }
}

}  // namespace

void kv_append_cuda(const KvAppend& a, cudaStream_t stream) {
  const int64_t kinds = (a.k != nullptr) + (a.v != nullptr), units = (a.q != nullptr ? a.heads : 0) + kinds * a.kv_heads;
  const int64_t blocks = (a.tokens * units + kAppendWarps - 1) / kAppendWarps;
  if (blocks == 0 || a.head_dim == 0) return;
  EXL_LAUNCH(kv_append_kernel, dim3(unsigned(blocks)), dim3(32 * kAppendWarps),
             size_t(kAppendWarps) * size_t(a.head_dim) * sizeof(float), stream, a,
             int(kv_row_bytes(a.head_dim, a.key_bits)), int(kv_row_bytes(a.head_dim, a.value_bits)));
}

}  // namespace exl
