// The dense kernels for AVX2 with FMA and F16C.
#include "lanes_avx2.h"
#include "linear_dense_kernel.h"

namespace exl {
namespace {

struct Set {
  using Part = Part256;
  static constexpr int tile_rows = 3, few_tiles = 4;
};

constexpr DenseIsa table = dense_isa<Set>();

}  // namespace

const DenseIsa& linear_dense_avx2() { return table; }

}  // namespace exl
