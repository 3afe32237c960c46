// A whole pass of a model in one call: the model. Contract: cpu/step.h.
//
// A model is built once, step_new and then step_layer for every layer; everything about its matrices is checked there.
// It keeps the tensors that it reads. step_bind says where keys and values go; step_run.cpp looks only at the batch.
#include "step.h"

#include <cmath>
#include <limits>

#include "../common/kv_rows.h"
#include "../cpu/kv_append.h"
#include "step_parts.h"

namespace exl {
namespace {

int64_t op_step_new(const Tensor& table, double embedding_scale, const Tensor& final_norm, const Tensor& head,
                    const Tensor& head_bias, int64_t head_residual, int64_t heads, int64_t kv_heads, int64_t head_dim,
                    double eps, double norm_offset, double attention_scale, double attention_softcap,
                    double logit_scale) {
  const char* op = "step_new";
  auto program = std::make_shared<StepProgram>();
  StepModel& m = program->model;
  m.table_dtype = check_cpu_float(op, "table", table);
  check_shape(op, "table", table, {-1, -1});
  m.table = table.data_ptr();
  m.embedding_scale = float(embedding_scale);
  m.vocabulary = table.size(0), m.hidden = table.size(1);
  m.heads = heads, m.kv_heads = kv_heads, m.head_dim = head_dim;
  EXL_CHECK(m.hidden > 0 && head_dim > 0 && kv_heads > 0 && heads > 0 && heads % kv_heads == 0, "exl::", op, ": ",
            heads, " heads and ", kv_heads, " key/value heads of ", head_dim, ", hidden ", m.hidden);
  m.eps = float(eps), m.norm_offset = float(norm_offset);
  m.attention_scale = float(attention_scale), m.attention_softcap = float(attention_softcap);
  EXL_CHECK(std::isfinite(m.attention_softcap) && m.attention_softcap >= 0, "exl::", op, ": softcap ",
            attention_softcap);
  m.final_norm = step_vector(op, "final_norm", final_norm, m.hidden, false);
  m.head = step_matrix(op, head, head_bias, head_residual);
  step_fits(op, "head", m.head, m.hidden, m.head.outputs);
  m.logit_scale = float(logit_scale);
  program->kept = {table, final_norm, head, head_bias};
  const std::lock_guard<std::mutex> hold(step_guard);
  static int64_t last = 0;
  step_programs[++last] = std::move(program);
  return last;
}

// matrices, biases and residuals: query, key, value, out, gate, up, down; with `visits` > 0 a mixture of experts:
// query, key, value, out, router, then gate, up, down of every expert. norms: input, pre_mlp, post_attention, post_mlp,
// query, key. An empty tensor stands for none; window 0 for all keys.
void op_step_layer(int64_t number, std::vector<Tensor> matrices, std::vector<Tensor> biases,
                   std::vector<int64_t> residuals, std::vector<Tensor> norms, const std::string& activation,
                   int64_t window, int64_t rope, int64_t visits, bool normalize) {
  const char* op = "step_layer";
  const auto program = step_program(op, number);
  StepModel& m = program->model;
  EXL_CHECK(biases.size() == matrices.size() && residuals.size() == matrices.size() && norms.size() == 6, "exl::", op,
            ": wanted a bias and a residual for each of ", matrices.size(), " matrices and 6 norms, got ",
            biases.size(), ", ", residuals.size(), " and ", norms.size());
  EXL_CHECK(visits > 0 ? matrices.size() > 5 && matrices.size() % 3 == 2 : matrices.size() == 7, "exl::", op, ": ",
            matrices.size(), " matrices are no layer whose tokens visit ", visits, " experts");
  std::vector<StepMatrix> all;
  for (size_t i = 0; i < matrices.size(); ++i) all.push_back(step_matrix(op, matrices[i], biases[i], residuals[i]));
  StepLayer l{};
  for (size_t i = 0; i < (visits > 0 ? 4u : 7u); ++i) all[i].place = 7 * int64_t(m.layers.size()) + int64_t(i);
  l.query = all[0], l.key = all[1], l.value = all[2], l.out = all[3];
  const int64_t wide = m.heads * m.head_dim, narrow = m.kv_heads * m.head_dim;
  step_fits(op, "query", l.query, m.hidden, wide);
  step_fits(op, "key", l.key, m.hidden, narrow);
  step_fits(op, "value", l.value, m.hidden, narrow);
  step_fits(op, "out", l.out, wide, m.hidden);
  if (visits > 0) {
    l.moe = step_experts(op, all, m.hidden, visits, normalize);
  } else {
    l.gate = all[4], l.up = all[5], l.down = all[6];
    step_mlp_fits(op, l.gate, l.up, l.down, m.hidden, l.gate.outputs);
  }
  l.input_norm = step_vector(op, "the input norm", norms[0], m.hidden, false);
  l.pre_mlp_norm = step_vector(op, "the pre-MLP norm", norms[1], m.hidden, false);
  l.post_attention_norm = step_vector(op, "the post-attention norm", norms[2], m.hidden, true);
  l.post_mlp_norm = step_vector(op, "the post-MLP norm", norms[3], m.hidden, true);
  l.query_norm = step_vector(op, "the query norm", norms[4], m.head_dim, true);
  l.key_norm = step_vector(op, "the key norm", norms[5], m.head_dim, true);
  EXL_CHECK((l.query_norm == nullptr) == (l.key_norm == nullptr), "exl::", op, ": one of query and key has a norm");
  l.activation = activation_of(op, activation);
  EXL_CHECK(window >= 0 && rope >= 0, "exl::", op, ": window ", window, ", rope ", rope);
  l.window = window == 0 ? std::numeric_limits<int64_t>::max() : window;
  l.rope = rope;
  for (const auto* list : {&matrices, &biases, &norms}) {
    program->kept.insert(program->kept.end(), list->begin(), list->end());
  }
  m.layers.push_back(l);
  m.head.place = 7 * int64_t(m.layers.size());
}

void op_step_free(int64_t number) {
  std::shared_ptr<StepProgram> last;  // destroyed without the lock: that may wait for a pass to end
  const std::lock_guard<std::mutex> hold(step_guard);
  const auto found = step_programs.find(number);
  if (found == step_programs.end()) return;
  last = std::move(found->second);
  step_programs.erase(found);
}

// The pages of `layers` layers, (layers, pages, page_size, kv_heads, head_dim or row_bytes).
StepPages step_pages(const char* op, const char* name, const Tensor& t, int64_t layers, const StepModel& m,
                     StepBatch& b) {
  check_shape(op, name, t, {layers, -1, -1, m.kv_heads, -1});
  StepPages pages{t.data_ptr(), 0, 0};
  int64_t bytes = 1;
  if (t.scalar_type() == ScalarType::Byte) {
    check_cpu(op, name, t, ScalarType::Byte);
    pages.bits = kv_bits(t.size(4), m.head_dim);
    EXL_CHECK(pages.bits > 0, "exl::", op, ": rows of ", t.size(4), " bytes in ", name, " hold no quantized head of ",
              m.head_dim, " values");
  } else {
    b.page_dtype = check_cpu_float(op, name, t);
    check_shape(op, name, t, {-1, -1, -1, -1, m.head_dim});
    bytes = element_bytes(b.page_dtype);
  }
  pages.stride = t.size(1) * t.size(2) * t.size(3) * t.size(4) * bytes;
  return pages;
}

// The angles of every rope in turn: cos and sin, float32 (n, half).
std::vector<StepRope> step_ropes(const char* op, const std::vector<Tensor>& angles, const StepModel& m) {
  std::vector<StepRope> ropes;
  const int64_t rows = angles.empty() ? 0 : angles[0].size(0);
  for (size_t i = 0; i + 1 < angles.size(); i += 2) {
    check_cpu(op, "cos", angles[i], ScalarType::Float);
    check_cpu(op, "sin", angles[i + 1], ScalarType::Float);
    check_shape(op, "cos", angles[i], {rows, -1});
    const int64_t half = angles[i].size(1);
    check_shape(op, "sin", angles[i + 1], {rows, half});
    EXL_CHECK(2 * half <= m.head_dim, "exl::", op, ": angles of ", half, " pairs for heads of ", m.head_dim);
    ropes.push_back({angles[i].const_data_ptr<float>(), angles[i + 1].const_data_ptr<float>(), half});
  }
  for (const StepLayer& layer : m.layers) {
    EXL_CHECK(size_t(layer.rope) < ropes.size(), "exl::", op, ": ", ropes.size(), " ropes, a layer wants number ",
              layer.rope);
  }
  return ropes;
}

// Remembers the pages and the angles of the passes to come. keys, values: of every group of layers; homes: the group of
// every layer, whose layers are in it in their order.
void op_step_bind(int64_t number, std::vector<Tensor> keys, std::vector<Tensor> values, std::vector<int64_t> homes,
                  std::vector<Tensor> angles) {
  const char* op = "step_bind";
  const auto program = step_program(op, number);
  program->halt();
  program->bound.clear();  // until everything is known to be good
  const StepModel& m = program->model;
  const int64_t groups = int64_t(keys.size());
  EXL_CHECK(groups > 0 && keys.size() == values.size() && homes.size() == m.layers.size(), "exl::", op, ": ", groups,
            " groups of keys, ", values.size(), " of values, ", homes.size(), " homes for ", m.layers.size(), " layers");
  std::vector<int64_t> layers(keys.size(), 0);
  program->homes.clear();
  for (int64_t home : homes) {
    EXL_CHECK(home >= 0 && home < groups, "exl::", op, ": group ", home, " of ", groups);
    program->homes.push_back({home, layers[size_t(home)]++});
  }
  StepBatch b{};
  program->groups.clear(), program->pages.clear();
  for (size_t g = 0; g < keys.size(); ++g) {
    StepGroup group{};
    group.keys = step_pages(op, "keys", keys[g], layers[g], m, b);
    group.values = step_pages(op, "values", values[g], layers[g], m, b);
    EXL_CHECK(keys[g].scalar_type() == values[g].scalar_type() && keys[g].scalar_type() == keys[0].scalar_type() &&
                  keys[g].size(1) == values[g].size(1) && keys[g].size(2) == values[g].size(2) &&
                  keys[g].size(2) == keys[0].size(2),
              "exl::", op, ": keys ", describe(keys[g]), " and values ", describe(values[g]),
              " do not belong together, or not to ", describe(keys[0]));
    program->groups.push_back(group);
    program->pages.push_back(keys[g].size(1));
  }
  b.page_size = keys[0].size(2);
  EXL_CHECK(b.page_size > 0, "exl::", op, ": empty pages, got ", describe(keys[0]));
  program->ropes = step_ropes(op, angles, m);
  program->angle_rows = angles.empty() ? 0 : angles[0].size(0);
  b.ropes = program->ropes.data(), b.rope_count = int64_t(program->ropes.size());
  b.homes = program->homes.data();
  program->batch = b;
  angles.insert(angles.end(), keys.begin(), keys.end());
  angles.insert(angles.end(), values.begin(), values.end());
  program->bound = std::move(angles);
  program->next_layer = 0;
}

bool op_all_finite(const Tensor& x) {
  check_cpu("all_finite", "x", x, ScalarType::Float);
  return all_finite(x.const_data_ptr<float>(), x.numel());
}

}  // namespace
}  // namespace exl

STABLE_TORCH_LIBRARY_FRAGMENT(exl, m) {
  m.def(
      "step_new(Tensor table, float embedding_scale, Tensor final_norm, Tensor head, Tensor head_bias, "
      "int head_residual, int heads, int kv_heads, int head_dim, float eps, float norm_offset, float attention_scale, "
      "float attention_softcap, float logit_scale) -> int");
  m.def(
      "step_layer(int program, Tensor[] matrices, Tensor[] biases, int[] residuals, Tensor[] norms, str activation, "
      "int window, int rope, int visits, bool normalize) -> ()");
  m.def("step_free(int program) -> ()");
  m.def("step_bind(int program, Tensor(a!)[] keys, Tensor(b!)[] values, int[] homes, Tensor[] angles) -> ()");
  m.def("all_finite(Tensor x) -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(exl, CPU, m) {
  m.impl("step_new", TORCH_BOX(&exl::op_step_new));
  m.impl("step_layer", TORCH_BOX(&exl::op_step_layer));
  m.impl("step_bind", TORCH_BOX(&exl::op_step_bind));
  m.impl("all_finite", TORCH_BOX(&exl::op_all_finite));
}

STABLE_TORCH_LIBRARY_IMPL(exl, CompositeExplicitAutograd, m) {
  m.impl("step_free", TORCH_BOX(&exl::op_step_free));
}
