// Ways to misuse CUDA that a card answers with a hang or with rubbish. Prints what the emulation says to each.
#include <cstdio>
#include <vector>

#include "../../../ext/cuda/ptx.h"

namespace {

__global__ void misuse(int what, float* p) {
  const int t = int(threadIdx.x);
  EXL_SHARED(uint32_t, words, [256]);
  uint32_t a[4] = {}, b[2] = {};
  float d[4] = {};
  switch (what) {
    case 0:  // half a warp waits for the block, another part of it for each other
      if (t >= 40 && t < 64) {
        __syncthreads();
      } else if (t >= 32) {
        __syncwarp(0xffffffffu);
      }
      break;
    case 1:
      if (t != 7) p[t] = __shfl_xor_sync(~0u, float(t), 1);
      break;
    case 2:
      if (t & 1) {
        p[t] = __shfl_xor_sync(~0u, 1.0f, 2);
      } else {
        p[t] = __shfl_xor_sync(~0u, 2.0f, 2);
      }
      break;
    case 3:
      if (t < 16) __syncwarp();
      break;
    case 4: {
      EXL_SHARED(float, large, [30000]);
      large[t] = 0;
      break;
    }
    case 5: __syncwarp(t < 32 ? 0x0000ffffu : ~0u); break;
    case 6:
      if (t < 8) {
        __syncwarp(0x0000ffffu);
      } else {
        __syncwarp(~0u);
      }
      break;
    case 7: ptx::cp_async16(&words[1], p); break;
    case 8: ptx::mma_m16n8k16_f16(d, a, b, d); break;
    case 9: ptx::ldmatrix_x4(a, &words[t & 1]); break;
    default: break;
  }
}

}  // namespace

int main() {
  exl_emu::config().strict_exit = false;
  std::vector<float> p(64);
  for (int what = 0; what < 12; ++what) {
    const unsigned threads = what == 8 ? 16 : what == 10 ? 2048 : 64;
    try {
      EXL_LAUNCH(misuse, dim3(1), dim3(threads), what == 11 ? 200000 : 0, nullptr, what, p.data());
      std::printf("\n@ nothing");
    } catch (const exl_emu::KernelError& error) {
      std::printf("\n@ %s", error.what());
    }
  }
  return 0;
}
