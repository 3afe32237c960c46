// The dense kernel for short rows of weights, as adapters have them (rank -> outputs): sixteen columns at a time, since
// adding up lanes costs more than the products. The sums and their tree are those of dot_tile. Included by
// linear_dense_kernel.h only; internal linkage, see isa.h.
#pragma once

#include "lanes.h"
#include "linear_dense_isa.h"

namespace exl {
namespace {

constexpr int64_t kShort = 64;  // inputs at most
constexpr int64_t kShortColumns = 16, kShortTiles = kShortColumns / kDenseColumns;
static_assert(kShort <= kBlock);

// Tiles [first, ...) up to the first that it returns, for all rows of x.
template <class I, class T>
int64_t few_short(const DenseWeights& w, const DenseInput& x, float* y, int64_t first, int64_t last) {
  using P = typename I::Part;
  using L = Lanes<P>;
  const int64_t whole = w.inputs / 16 * 16;
  for (; first + kShortTiles <= last && (first + kShortTiles) * kDenseColumns <= w.outputs; first += kShortTiles) {
    const int64_t column = first * kDenseColumns;
    const T* const weights = static_cast<const T*>(w.weight) + column * w.inputs;
    for (int64_t r = 0; r < x.rows; ++r) {
      const float* const row = x.row(0, r);
      L sum[kShortColumns];
      EXL_UNROLL for (int c = 0; c < kShortColumns; ++c) sum[c] = L::zero();
      for (int64_t k = 0; k < whole; k += 16) {
        const L input = L::load(row + k);
        EXL_UNROLL for (int c = 0; c < kShortColumns; ++c) {
          sum[c] = fma(input, L::load(weights + c * w.inputs + k), sum[c]);
        }
      }
      if (whole < w.inputs) {
        const L input = L::load(row + whole);
        EXL_UNROLL for (int c = 0; c < kShortColumns; ++c) {
          sum[c] = fma(input, L::load_part(weights + c * w.inputs + whole, w.inputs - whole), sum[c]);
        }
      }
      float* const to = y + r * w.outputs + column;
      if constexpr (P::sums_of_16) {
        P own[kShortColumns];
        EXL_UNROLL for (int c = 0; c < kShortColumns; ++c) own[c] = sum[c].part[0];
        P::sums4x4(own, to, kDenseColumns, false);
      } else {
        for (int c = 0; c < kShortColumns; c += 4) sums4(sum + c, to + c);
      }
    }
  }
  return first;
}

}  // namespace
}  // namespace exl
