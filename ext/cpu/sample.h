// Drawing a token from the logits of one position.
//
//   logits  float32 (count); -infinity means "not allowed"
//   banned  ids of tokens that are not allowed either, ascending, each once, within the row; a few
//
// All return -1 when the logits are no distribution: a NaN or +infinity among them, nothing allowed, or count 0.
// Reference and the exact definition: exl_runtime/ops/sample.py. Test: tests/ops/test_native_small.py
#pragma once

#include <cstdint>

namespace exl {

struct Banned {
  const int64_t* ids;
  int64_t count;
};

// The index of the largest logit, the lowest one among equals.
int64_t argmax(const float* logits, int64_t count, Banned banned = {nullptr, 0});

// One token of softmax(logits / temperature) restricted to probabilities of at least min_p times the largest, by
// inversion in index order: the first kept i whose running sum of weights exceeds u times their total. In double.
//   temperature > 0, 0 <= min_p <= 1, 0 <= u < 1
int64_t sample_min_p(const float* logits, int64_t count, double temperature, double min_p, double u,
                     Banned banned = {nullptr, 0});

// One of the two: argmax where temperature is 0.
struct Draw {
  double temperature, min_p, u;
  Banned banned;
};
int64_t draw(const float* logits, int64_t count, const Draw& how);

}  // namespace exl
