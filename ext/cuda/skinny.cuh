// The kernel behind skinny.h: skinny.cu and gemm.cu choose its numbers. Device code only.
#pragma once

#include "activation.cuh"
#include "exl_cuda.h"
#include "ptx.h"
#include "skinny.h"
#include "tile.cuh"

namespace exl {

// A warp's tiles on their way: a ring of kStages pieces of shared memory that belongs to the warp alone. One commit per
// tile, so that waiting for all but kStages - 2 means the oldest has come.
constexpr int kStages = 6;

// ROWS of x in n8 columns of the tensor cores, WN warps side by side over tile columns, WK over units. ROUNDED: weights
// as the formats round them go into the multiplication; else codes, scaled after each group.
template <int ROWS, int WN, int WK, bool ROUNDED>
struct Multiply {
  static constexpr int kN8 = ROWS / 8, kWarps = WN * WK, kColumns = WN * kTileColumns32;
  static constexpr int kPitch = kColumns + 4;  // of the sums in shared memory: no bank conflicts
  static constexpr int kSums = kColumns * ROWS;
  static constexpr size_t kSumBytes = sizeof(float) * WK * ROWS * kPitch;
  static constexpr int kResident = ROWS == 8 || ROUNDED ? 3 : 2;  // blocks that registers must suffice for

  float sums[2][kN8][4];
  float part[ROUNDED ? 1 : 2][ROUNDED ? 1 : kN8][4];  // of the running group, not scaled yet
  tile::GroupScales scales;
  uint4 x[kN8];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int nh = 0; nh < 2; ++nh)
#pragma unroll
      for (int j = 0; j < kN8; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          sums[nh][j][i] = 0.0f;
          if constexpr (!ROUNDED) part[nh][j][i] = 0.0f;
        }
  }

  __device__ __forceinline__ void scale_group() {
    if constexpr (!ROUNDED) {
#pragma unroll
      for (int nh = 0; nh < 2; ++nh)
#pragma unroll
        for (int j = 0; j < kN8; ++j)
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            sums[nh][j][i] = fmaf(__half2float(scales.scale(2 * nh + (i >> 1))), part[nh][j][i], sums[nh][j][i]);
            part[nh][j][i] = 0.0f;
          }
    }
  }

  // from: this lane's piece of its row of the first eight, which is the last row for lanes past it: what they multiply
  // is never read. rows_left: rows from lane / 4 on.
  __device__ __forceinline__ void load_x(const uint4* from, int rows_left) {
    x[0] = from[0];
#pragma unroll
    for (int j = 1; j < kN8; ++j) {
      x[j] = make_uint4(0, 0, 0, 0);
      if (8 * j < rows_left) x[j] = from[32 * j];
    }
  }

  template <int BITS, int F>
  __device__ __forceinline__ void fragment(const tile::Codes<BITS>& codes) {
    constexpr int nh = F >> 1, kh = F & 1;
    const uint32_t even = scales.zero[2 * nh], odd = scales.zero[2 * nh + 1];
    uint32_t a[4] = {codes.template code<F, 0>(even), codes.template code<F, 1>(odd),
                     codes.template code<F, 2>(even), codes.template code<F, 3>(odd)};
    if constexpr (ROUNDED) {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const __half2 s = __half2half2(scales.scale(2 * nh + (r & 1)));
        a[r] = tile::as_bits(__hmul2(tile::as_half2(a[r]), s));
      }
    }
#pragma unroll
    for (int j = 0; j < kN8; ++j) {
      const uint32_t b[2] = {kh ? x[j].z : x[j].x, kh ? x[j].w : x[j].y};
      if constexpr (ROUNDED) {
        ptx::mma_m16n8k16_f16(sums[nh][j], a, b, sums[nh][j]);
      } else {
        ptx::mma_m16n8k16_f16(part[nh][j], a, b, part[nh][j]);
      }
    }
  }

  template <int BITS>
  __device__ __forceinline__ void unit(const unsigned char* tile_bytes, int lane) {
    tile::Codes<BITS> codes;
    codes.load(tile_bytes, lane);
    fragment<BITS, 0>(codes);
    fragment<BITS, 1>(codes);
    fragment<BITS, 2>(codes);
    fragment<BITS, 3>(codes);
  }

  // The warp's units [begin, end) of one tile column.
  __device__ __forceinline__ void stream(const CudaMatrix& w, const LinearWork& work, int column, int begin, int end,
                                         unsigned char* ring, int first_row, int lane, bool wait) {
    const uint64_t policy = ptx::policy_evict_first();
    const UnitEntry* entries = w.units;
    const uint8_t* records = w.scales + int64_t(column) * w.groups * w.record + lane * 16;
    const uint8_t* from = w.tiles + int64_t(column) * w.tile_stride + lane * 16;
    uint32_t coming = 0, issued = 0;  // bits_group of the unit to be issued next, and of the one before
    if (begin < end) {
      from += int64_t(__ldg(&entries[begin].line)) * kLineBytes;
      coming = __ldg(&entries[begin].bits_group);
    }
    const bool of_record = lane * 16 < w.record;
    auto issue = [&](int u, int at) {  // unit u, the one after the last issued, to `at` bytes in the ring
      if (u < end) {
        const int pieces = int(coming & 255u) * 8, bytes = pieces * 16;
        unsigned char* to = ring + at + lane * 16;
        if (lane < pieces) ptx::cp_async16_hint(to, from, policy);
        if (lane + 32 < pieces) ptx::cp_async16_hint(to + 512, from + 512, policy);
        if (coming != issued && of_record) ptx::cp_async16(to + bytes, records + int64_t(coming >> 8) * w.record);
        issued = coming;
        from += bytes;
        if (u + 1 < end) coming = __ldg(&entries[u + 1].bits_group);
      }
      ptx::cp_async_commit();
    };
    clear();
#pragma unroll
    for (int i = 0; i < kStages - 1; ++i) issue(begin + i, i * work.slot_bytes);
    if (wait) {  // weights do not depend on the kernel before this one, everything else does
      ptx::grid_wait();
      ptx::grid_launch_dependents();
    }
    const int row = first_row + (lane >> 2), rows_left = work.m - row;
    const uint4* x_from = static_cast<const uint4*>(work.staged) +
                          (int64_t(begin) * work.m + min(row, work.m - 1)) * 4 + (lane & 3);
    const int64_t x_step = int64_t(work.m) * 4;
    Multiply next;  // only its x is used: of the unit after this one
    if (kN8 <= 2 && begin < end) next.load_x(x_from, rows_left);
    uint32_t running = 0;
    for (int u = begin, at = 0; u < end; ++u) {
      if constexpr (kN8 <= 2) {
#pragma unroll
        for (int j = 0; j < kN8; ++j) x[j] = next.x[j];
        next.load_x(u + 1 < end ? x_from + x_step : x_from, rows_left);
      } else {
        load_x(x_from, rows_left);
      }
      const uint32_t entry = __ldg(&entries[u].bits_group);
      const int bits = int(entry & 255u);
      ptx::cp_async_wait<kStages - 2>();
      __syncwarp();  // the tile is there for all lanes, and all have read the one before, which is overwritten next
      issue(u + kStages - 1, at == 0 ? (kStages - 1) * work.slot_bytes : at - work.slot_bytes);
      const unsigned char* tile_bytes = ring + at;
      if (entry != running) {
        if (running != 0) scale_group();
        scales.load(w, tile_bytes + bits * kLineBytes, bits, int(entry >> 8), lane >> 2);
        running = entry;
      }
      switch (bits) {
        case 2: unit<2>(tile_bytes, lane); break;
        case 3: unit<3>(tile_bytes, lane); break;
        case 4: unit<4>(tile_bytes, lane); break;
        case 5: unit<5>(tile_bytes, lane); break;
        case 6: unit<6>(tile_bytes, lane); break;
        default: unit<8>(tile_bytes, lane); break;
      }
      x_from += x_step;
      at = at == (kStages - 1) * work.slot_bytes ? 0 : at + work.slot_bytes;
    }
    if (running != 0) scale_group();
  }

  // Own sums to shared memory, [row][column].
  __device__ __forceinline__ void put(float* to, int warp_n, int lane) const {
    const int g = lane >> 2, t = lane & 3;
#pragma unroll
    for (int nh = 0; nh < 2; ++nh)
#pragma unroll
      for (int j = 0; j < kN8; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          to[(8 * j + 2 * t + (i & 1)) * kPitch + 32 * warp_n + 16 * nh + 8 * (i >> 1) + g] = sums[nh][j][i];
        }
  }
};

__device__ __forceinline__ float activate(Gate gate, float x) {
  switch (gate) {
    case Gate::silu: return silu(x);
    case Gate::gelu: return gelu(x);
    case Gate::gelu_tanh: return gelu_tanh(x);
    default: return relu(x);
  }
}

__device__ __forceinline__ void write(const LinearOutput& out, int64_t at, float v) {
  if (out.dtype == Dtype::float32) {
    static_cast<float*>(out.y)[at] = v;
  } else if (out.dtype == Dtype::float16) {
    static_cast<__half*>(out.y)[at] = __float2half_rn(v);
  } else {
    static_cast<__nv_bfloat16*>(out.y)[at] = __float2bfloat16(v);
  }
}

// `sum(column)` is the sum of a column of the block's group; n the output of column i. With a gate, `pair` columns on.
template <class Sum>
__device__ __forceinline__ void finish(const LinearWork& work, const LinearOutput& out, int64_t row, int i, int n,
                                       int outputs, int pair, Sum sum) {
  if (n >= outputs || (pair > 0 && i >= pair)) return;
  const int64_t at = row * outputs + n;
  const float factor = work.factors[row];
  if (pair > 0) {
    write(out, at, activate(work.gate, sum(i) * factor) * (sum(i + pair) * factor));
    return;
  }
  const float bias = out.bias == nullptr ? 0.0f : __half2float(static_cast<const __half*>(out.bias)[n]);
  const float v = fmaf(sum(i), factor, bias);
  if (out.stream != nullptr) {
    out.stream[at] += v;
  } else {
    write(out, at, v);
  }
}

// grid (blocks, row blocks)
template <int ROWS, int WN, int WK, bool ROUNDED>
__global__ void __launch_bounds__(32 * WN * WK, (Multiply<ROWS, WN, WK, ROUNDED>::kResident))
    multiply(const LinearWork work) {
  using M = Multiply<ROWS, WN, WK, ROUNDED>;
  EXL_DYN_SMEM(unsigned char, memory);
  EXL_SHARED(int, last, [1]);
  const int lane = int(threadIdx.x) & 31, warp = int(threadIdx.x) >> 5, warp_n = warp % WN, warp_k = warp / WN;
  const int first_row = int(blockIdx.y) * ROWS, rows = min(work.m - first_row, ROWS);
  const int64_t slot_zero = int64_t(blockIdx.y) * work.slots;
  unsigned char* ring = memory + warp * kStages * work.slot_bytes;
  float* shared_sums = reinterpret_cast<float*>(memory);  // the ring is empty by then
  M mine;

  const bool paired = work.gate != Gate::none;
  const int pair = paired ? M::kColumns / 2 : 0;  // columns
  constexpr int kHalf = WN / 2;

  for (int s = work.first[blockIdx.x]; s < work.first[blockIdx.x + 1]; ++s) {
    {
      const Segment segment = work.segments[s];
      const CudaMatrix& w = work.matrix[paired ? warp_n / kHalf : segment.matrix];
      const int units = segment.end - segment.begin, column = segment.column + (paired ? warp_n % kHalf : warp_n);
      int begin = segment.begin + units * warp_k / WK;
      const int end = segment.begin + units * (warp_k + 1) / WK;
      if (column * kTileColumns32 >= w.outputs) begin = end;  // the last column group may be incomplete
      mine.stream(w, work, column, begin, end, ring, first_row, lane, s == work.first[blockIdx.x]);
    }
    __syncthreads();
    mine.put(shared_sums + warp_k * ROWS * M::kPitch, warp_n, lane);
    __syncthreads();

    const Segment segment = work.segments[s];  // read again: registers are short above
    const LinearOutput& out = work.output[segment.matrix];
    float* part = work.partials + (slot_zero + segment.slot) * M::kSums;
    const int n0 = segment.column * kTileColumns32, outputs = work.matrix[segment.matrix].outputs;
    for (int i = int(threadIdx.x); i < rows * M::kColumns; i += 32 * M::kWarps) {
      const int row = i / M::kColumns, n = i % M::kColumns;
      const auto sum = [&](int at) {
        float total = shared_sums[row * M::kPitch + at];
#pragma unroll
        for (int k = 1; k < WK; ++k) total += shared_sums[(k * ROWS + row) * M::kPitch + at];
        return total;
      };
      if (segment.pieces > 1) {
        __stcg(part + int64_t(segment.piece) * M::kSums + i, sum(n));
      } else {
        finish(work, out, first_row + row, n, n0 + n, outputs, pair, sum);
      }
    }
    if (segment.pieces > 1) {
      __threadfence();
      __syncthreads();
      int32_t* ticket = work.tickets + slot_zero + segment.slot;
      if (threadIdx.x == 0) {
        last[0] = atomicAdd(ticket, 1) == segment.pieces - 1;
        __threadfence();
      }
      __syncthreads();
      if (last[0]) {
        for (int i = int(threadIdx.x); i < rows * M::kColumns; i += 32 * M::kWarps) {
          const int row = i / M::kColumns, n = i % M::kColumns;
          const auto sum = [&](int at) {
            const float* from = part + row * M::kColumns + at;
            float total = __ldcg(from);
            for (int p = 1; p < segment.pieces; ++p) total += __ldcg(from + int64_t(p) * M::kSums);
            return total;
          };
          finish(work, out, first_row + row, n, n0 + n, outputs, pair, sum);
        }
        if (threadIdx.x == 0) atomicExch(ticket, 0);
      }
    }
    __syncthreads();  // the next segment fills the ring again
  }
  if (work.first[blockIdx.x] == work.first[blockIdx.x + 1]) ptx::grid_wait();  // nothing to do, but in its turn
}

template <int ROWS, int WN, int WK, bool ROUNDED>
void launch_multiply(const LinearWork& work, int row_blocks, cudaStream_t stream) {
  using M = Multiply<ROWS, WN, WK, ROUNDED>;
  const size_t ring = size_t(M::kWarps) * kStages * size_t(work.slot_bytes);
  const size_t shared = ring > M::kSumBytes ? ring : M::kSumBytes;
  EXL_LAUNCH_PDL((multiply<ROWS, WN, WK, ROUNDED>), dim3(unsigned(work.blocks), unsigned(row_blocks)),
                 dim3(32 * M::kWarps), shared, stream, work);
}

}  // namespace exl
