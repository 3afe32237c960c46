// The attention kernels: AVX2 with FMA and F16C.
#include "attention_kernel.h"
#include "codes_avx2.h"
#include "lanes_avx2.h"

namespace exl {
namespace {

struct Avx2 {
  using Part = Part256;
  template <int bits>
  using Codes = CodesAvx2<bits>;
  static constexpr int tile_rows = 3;
  static constexpr int score_rows = tile_rows;
  static constexpr int code_rows = 2;
};

constexpr AttentionIsa table = attention_isa<Avx2>();

}  // namespace

const AttentionIsa& attention_avx2() { return table; }

}  // namespace exl
