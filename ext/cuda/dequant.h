// The weights of some tile columns (tile.h) as the format defines them, for a multiplication by a library.
//
//   rows     int32 (unit_count * 32): the input at each position, -1 for none; null: inputs in order
//   out      half (inputs, 32 * columns), row-major, 16-byte aligned: W[k][32 * column + n], bit for bit that of
//            QuantFormat.dequantize; columns at or past w.outputs are zero or finite filler, to be left out
//
// Every input of the matrix must stand at exactly one position.      test: tests/cuda/test_repack.py
#pragma once

#include "stream.h"
#include "tile.h"

namespace exl {

void dequant_cuda(const CudaMatrix& w, const int32_t* rows, int64_t inputs, int64_t column, int64_t columns, void* out,
                  cudaStream_t stream);

}  // namespace exl
