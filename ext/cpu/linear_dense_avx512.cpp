// The dense kernels for AVX-512.
#include "lanes_avx512.h"
#include "linear_dense_kernel.h"

namespace exl {
namespace {

struct Set {
  using Part = Part512;
  static constexpr int tile_rows = 6, few_tiles = 16;
};

constexpr DenseIsa table = dense_isa<Set>();

}  // namespace

const DenseIsa& linear_dense_avx512() { return table; }

}  // namespace exl
