// Descriptions of matrices and plans that travel through Python as uint8 tensors on the CPU, made and read here only:
// addresses on the card and numbers, checked once, so that a call per token has next to nothing to look at.
#pragma once

#include <cstring>

#include "../../cuda/skinny.h"
#include "library.h"

namespace exl {

constexpr uint64_t kLinearMatrixMagic = 0x317874616d6c7865, kLinearPlanMagic = 0x316e616c706c7865;

struct LinearMatrixBlob {
  uint64_t magic;
  int64_t device;
  CudaMatrix matrix;
};

// How one range of batch sizes is cut.
struct LinearCut {
  const Segment* segments;
  const int32_t* first;
  int32_t blocks, slots;
};

constexpr int kLinearCuts = 3;  // up to 32 rows, up to 64, up to 256

struct LinearPlanBlob {
  uint64_t magic;
  int64_t device;
  int64_t count;  // matrices
  int64_t inputs, units;
  const int32_t* rows;
  LinearCut cut[kLinearCuts];
  LinearWork work;
};

template <class Blob>
Tensor linear_blob(const Blob& blob) {
  Tensor t = empty_cpu({int64_t(sizeof(Blob))}, ScalarType::Byte);
  std::memcpy(t.data_ptr(), &blob, sizeof(Blob));
  return t;
}

template <class Blob>
const Blob& linear_unblob(const char* op, const char* name, const Tensor& t, uint64_t magic) {
  check_cpu(op, name, t, ScalarType::Byte);
  const Blob* blob = static_cast<const Blob*>(t.data_ptr());
  EXL_CHECK(t.numel() == int64_t(sizeof(Blob)) && blob->magic == magic, "exl_cuda::", op, ": ", name,
            " was not made by the operator that makes such, got ", describe(t));
  return *blob;
}

}  // namespace exl
