// A pass of a decoder-only transformer over the paged cache in one call: what the operators of this folder compute one
// by one, in the same order and to the same bits, without an interpreter between them. No torch here.
//
//   x[t] = table[tokens[t]] * embedding_scale
//   per layer   h = norm(x, input)                            q, k, v = h @ Wq, h @ Wk, h @ Wv (+ bias)
//               q, k = norm over head_dim, where there are such weights;   rotated;   k, v into the pages
//               a = attention(q) @ Wo (+ bias), then norm(., post_attention) where there is one;   x += a
//               h = norm(x, pre_mlp)                          m = (activation(h @ Wg) * (h @ Wu)) @ Wd (+ biases)
//               or of the experts e that a row visits, in ascending order, the sum of weight[e] * m[e] (step_moe.h)
//               m = norm(m, post_mlp) where there is one;     x += m
//   logits = norm(x[logit_rows], final) @ Wh (+ bias) * logit_scale
//   behind every product: what the adapters of its rows add (step_lora.h)
//
// All in float32 (rms_norm.h, linear_packed.h, linear_dense.h, rope.h, kv_append.h, attention.h, gated.h).
// reference: the same model run operator by operator      test: tests/model/test_step.py
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

#include "attention.h"
#include "gated.h"
#include "linear_dense.h"
#include "linear_packed.h"

namespace exl {

// One matrix (inputs, outputs), packed or dense, and its bias.
struct StepMatrix {
  Packed packed;          // its header is null: it is dense
  int64_t residual_rows;  // linear_packed.h
  DenseWeights dense;
  const float* bias;  // (outputs), or null
  int64_t inputs, outputs;
  int64_t place = -1;  // step_lora.h; -1: no adapter changes it
};

// A mixture of experts in the place of gate, up and down.
struct StepMoe {
  StepMatrix router;                       // an output for every expert
  std::vector<StepMatrix> gate, up, down;  // of every expert, without biases
  int64_t visits = 0;                      // experts for a row; 0: the layer has no mixture
  bool normalize = false;                  // route.h
};

// Norm weights are float32; null where the model has none.
struct StepLayer {
  const float *input_norm, *pre_mlp_norm;            // (hidden)
  const float *post_attention_norm, *post_mlp_norm;  // (hidden), or null
  const float *query_norm, *key_norm;                // (head_dim), or null
  StepMatrix query, key, value, out, gate, up, down;
  StepMoe moe;
  Activation activation;
  int64_t window;  // attention.h
  int64_t rope;    // which of the batch's
};

struct StepModel {
  const void* table;  // (vocabulary, hidden)
  Dtype table_dtype;
  float embedding_scale;
  int64_t vocabulary, hidden, heads, kv_heads, head_dim;
  float eps, norm_offset;
  float attention_scale, attention_softcap;
  const float* final_norm;
  StepMatrix head;
  float logit_scale;
  std::vector<StepLayer> layers;
};

// Angles, float32 (n, half); which row of them is a token's says StepBatch::places.
struct StepRope {
  const float *cos, *sin;
  int64_t half;
};

// The pages of the first layer of a group; those of its next layers lie `stride` bytes behind one another.
struct StepPages {
  void* data;
  int64_t stride;
  int bits;  // 0: elements of StepBatch::page_dtype
};

// Layers that keep the same part of every sequence, in pages of their own.
struct StepGroup {
  StepPages keys, values;
  const int64_t* slots;       // (rows)
  const int32_t* page_table;  // (sequences, table_width)
};

// Where the pages of a layer are: the `place`th of a group.
struct StepHome {
  int64_t group, place;
};

struct StepShare;  // step_lora.h

// The new tokens of all sequences, one after another.
struct StepBatch {
  int64_t rows, sequences, table_width, page_size;
  const int64_t* tokens;  // (rows)
  const int32_t *q_starts, *kv_lengths;
  const StepRope* ropes;
  int64_t rope_count;
  const int64_t* places;  // (rows)
  const StepGroup* groups;
  const StepHome* homes;  // (layers)
  Dtype page_dtype;
  const int64_t* logit_rows;  // (logits)
  int64_t logits;
  const StepShare* shares;  // of adapters
  int64_t share_count;
};

// Where the time of passes went, in seconds; route: all of a mixture but its products and activations; draw: what a
// caller does with the logits.
enum class Phase { embed, norm, project, rope, append, attend, out, mlp, gated, route, head, draw, count };
struct StepTimes {
  double seconds[int(Phase::count)];
};
extern const char* const kPhaseNames[int(Phase::count)];

// Layers [first, last) on x, float32 (rows, hidden), written in place. Before layer 0 the tokens' embeddings are put
// there; after the last layer of the model float32 (logits, head.outputs) go to `logits`. `times` may be null; else the
// time spent is added. `stop`, where there is one, is looked at before every layer: false, and no logits, if it was true.
bool step_cpu(const StepModel& model, const StepBatch& batch, int64_t first, int64_t last, float* x, float* logits,
              StepTimes* times, const std::atomic<bool>* stop = nullptr);

// Whether all of x are finite.
bool all_finite(const float* x, int64_t count);

}  // namespace exl
