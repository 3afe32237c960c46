// The attention kernels: plain C++.
#include "attention_kernel.h"
#include "codes_portable.h"
#include "lanes_portable.h"

namespace exl {
namespace {

struct Portable {
  using Part = Part128;
  template <int bits>
  using Codes = CodesPortable<bits>;
  static constexpr int tile_rows = 2;
  static constexpr int score_rows = tile_rows;
  static constexpr int code_rows = 2;
};

constexpr AttentionIsa table = attention_isa<Portable>();

}  // namespace

const AttentionIsa& attention_portable() { return table; }

}  // namespace exl
