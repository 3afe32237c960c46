// Which experts of a mixture a token visits, and with what weight.
//
//   logits   float32 (rows, experts)
//   weights  float32 (rows, chosen), kinds int32 (rows, chosen): the `chosen` experts with the largest shares of the
//            softmax, best first; of equal shares the lower index first
//   1 <= chosen <= experts
//
// In double, a share rounded to float32 before it is compared; with `normalize` the kept shares are divided by their
// sum. A row with NaN, or without a largest logit that is finite, visits the first experts with weights of NaN. A row's
// result depends on nothing else.
//
// Reference: exl_runtime/ops/moe.py. Test: tests/ops/test_moe.py
#pragma once

#include <cstdint>

namespace exl {

void route(const float* logits, int64_t rows, int64_t experts, int64_t chosen, bool normalize, float* weights,
           int32_t* kinds);

}  // namespace exl
