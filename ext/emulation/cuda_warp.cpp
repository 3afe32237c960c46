// What the lanes of a warp compute together, once all of them have arrived (see cuda_host.h).
#include "cuda_host.h"

namespace exl_emu {
namespace {

constexpr int kLanes = 32;

bool has(unsigned mask, int lane) { return mask >> lane & 1u; }

template <float (*value_of)(uint16_t)>
void mma_exec(void** args) {
  float a[16][16], b[16][8], d[16][8];
  for (int lane = 0; lane < kLanes; ++lane) {
    const auto& m = *static_cast<const MmaArg*>(args[lane]);
    const int g = lane >> 2, t = (lane & 3) * 2;
    for (int r = 0; r < 4; ++r) {
      for (int h = 0; h < 2; ++h) a[g + (r & 1) * 8][t + (r >> 1) * 8 + h] = value_of(uint16_t(m.a[r] >> 16 * h));
    }
    for (int r = 0; r < 2; ++r) {
      for (int h = 0; h < 2; ++h) b[t + r * 8 + h][g] = value_of(uint16_t(m.b[r] >> 16 * h));
    }
    for (int r = 0; r < 4; ++r) d[g + (r >> 1) * 8][t + (r & 1)] = m.c[r];
  }
  for (int i = 0; i < 16; ++i) {
    for (int k = 0; k < 16; ++k) {  // products are exact in float32; sums round in the order of k
      for (int j = 0; j < 8; ++j) d[i][j] += a[i][k] * b[k][j];
    }
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    const auto& m = *static_cast<const MmaArg*>(args[lane]);
    const int g = lane >> 2, t = (lane & 3) * 2;
    for (int r = 0; r < 4; ++r) m.d[r] = d[g + (r >> 1) * 8][t + (r & 1)];
  }
}

}  // namespace

void mma_f16_exec(void** args, unsigned) { mma_exec<half_value>(args); }
void mma_bf16_exec(void** args, unsigned) { mma_exec<bfloat_value>(args); }

void shuffle_exec(void** args, unsigned mask) {
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!has(mask, lane)) continue;
    auto& s = *static_cast<ShuffleArg*>(args[lane]);
    const int base = lane & ~(s.width - 1);
    int source = lane;
    switch (s.mode) {
      case 0: source = base + (s.source & (s.width - 1)); break;
      case 1: source = lane - s.source < base ? lane : lane - s.source; break;
      case 2: source = lane + s.source >= base + s.width ? lane : lane + s.source; break;
      default: source = (lane ^ s.source) >= base + s.width ? lane : lane ^ s.source;
    }
    // from a lane outside the mask the device gives anything
    s.out = has(mask, source) ? static_cast<ShuffleArg*>(args[source])->in : 0xdeadbeefdeadbeefull;
  }
}

void vote_exec(void** args, unsigned mask) {
  unsigned ballot = 0;
  for (int lane = 0; lane < kLanes; ++lane) {
    if (has(mask, lane) && static_cast<VoteArg*>(args[lane])->predicate != 0) ballot |= 1u << lane;
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    if (has(mask, lane)) static_cast<VoteArg*>(args[lane])->ballot = ballot;
  }
}

void reduce_exec(void** args, unsigned mask) {
  bool first = true;
  int64_t total = 0;
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!has(mask, lane)) continue;
    const auto& r = *static_cast<ReduceArg*>(args[lane]);
    if (first) {
      total = r.value;
    } else if (r.mode == 0) {
      total += r.value;
    } else if (r.mode == 1 ? r.value < total : r.value > total) {
      total = r.value;
    }
    first = false;
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    if (has(mask, lane)) static_cast<ReduceArg*>(args[lane])->value = total;
  }
}

void ldmatrix_exec(void** args, unsigned) {
  const int count = static_cast<LdmatrixArg*>(args[0])->count;
  uint16_t matrix[4][8][8];
  for (int i = 0; i < count * 8; ++i) std::memcpy(matrix[i >> 3][i & 7], static_cast<LdmatrixArg*>(args[i])->row, 16);
  for (int lane = 0; lane < kLanes; ++lane) {
    const auto& l = *static_cast<LdmatrixArg*>(args[lane]);
    const int g = lane >> 2, t = (lane & 3) * 2;
    for (int r = 0; r < count; ++r) {
      const auto& m = matrix[r];
      const uint32_t low = l.trans ? m[t][g] : m[g][t], high = l.trans ? m[t + 1][g] : m[g][t + 1];
      l.r[r] = low | high << 16;
    }
  }
}

}  // namespace exl_emu
