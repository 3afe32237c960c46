// The attention kernels: AVX-512.
#include "attention_kernel.h"
#include "lanes_avx512.h"

namespace exl {
namespace {

struct Avx512 {
  using Part = Part512;
  static constexpr int tile_rows = 6;
};

constexpr AttentionIsa table = attention_isa<Avx512>();

}  // namespace

const AttentionIsa& attention_avx512() { return table; }

}  // namespace exl
