// The dense kernels in plain C++: any architecture, any processor.
#include "lanes_portable.h"
#include "linear_dense_kernel.h"

namespace exl {
namespace {

struct Set {
  using Part = Part128;
  static constexpr int tile_rows = 2, few_tiles = 4;
};

constexpr DenseIsa table = dense_isa<Set>();

}  // namespace

const DenseIsa& linear_dense_portable() { return table; }

}  // namespace exl
