// The attention kernels: AVX-512.
#include "attention_kernel.h"
#include "codes_avx512.h"
#include "lanes_avx512.h"

namespace exl {
namespace {

struct Avx512 {
  using Part = Part512;
  template <int bits>
  using Codes = CodesAvx512<bits>;
  static constexpr int tile_rows = 6;
  static constexpr int score_rows = 4;  // one fold of sums; see sums4x4
  static constexpr int code_rows = 4;
};

constexpr AttentionIsa table = attention_isa<Avx512>();

}  // namespace

const AttentionIsa& attention_avx512() { return table; }

}  // namespace exl
