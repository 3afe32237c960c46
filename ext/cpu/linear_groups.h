// Products of packed matrices with rows of their own, as the experts of a mixture have them, in two parallel regions for
// all. No torch here.
//
// A product has the bits that linear_packed.h gives its rows, whatever the others are. Inputs that several products
// quantize alike (equal rows, equal signature) are quantized once where such products stand near each other.
//
// reference: linear_packed.h, one product after another      test: tests/model/test_step_moe.py
#pragma once

#include <cstdint>

#include "tiles.h"

namespace exl {

struct GroupProduct {
  Packed w;
  const float* x;       // (*, inputs)
  const int32_t* rows;  // which rows of x, (count); null: the first ones
  int64_t count;        // at least 1
  bool residual;  // linear_packed.h
  float* y;       // (count, outputs)
};

// Memory in use meanwhile: the sum of all counts times an input in 8 bits, or 16 with the residual.
void linear_packed_groups(const GroupProduct* products, int64_t count);

}  // namespace exl
