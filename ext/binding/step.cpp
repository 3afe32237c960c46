// A whole pass of a model in one call. Contract: cpu/step.h.
//
// A model is built once, step_new and then step_layer for every layer; everything about its matrices is checked there.
// It keeps the tensors that it reads. step_bind says where keys and values go; step_run looks only at the batch.
#include "../cpu/step.h"

#include <chrono>
#include <cmath>
#include <limits>
#include <map>
#include <memory>
#include <mutex>

#include "../common/kv_rows.h"
#include "../cpu/kv_append.h"
#include "../cpu/sample.h"
#include "checks.h"
#include "shared.h"
#include "step_lora.h"
#include "step_parts.h"

namespace exl {
namespace {

struct StepProgram {
  StepModel model;
  std::vector<Tensor> kept;
  // From step_bind.
  std::vector<Tensor> bound;
  std::vector<StepRope> ropes;
  int64_t angle_rows = 0, pages = 0;
  // Of the pass under way: what `batch` points into, and the stream.
  std::vector<int64_t> plan;
  std::vector<int32_t> q_starts, kv_lengths;
  std::optional<Tensor> table, draw_pages;
  StepBatch batch{};
  StepLora lora;
  std::vector<float> x, logits;
  int64_t next_layer = -1;  // -1: none
  StepTimes times{};
  bool timed = false;
};

std::mutex step_guard;
std::map<int64_t, std::shared_ptr<StepProgram>> step_programs;

std::shared_ptr<StepProgram> step_program(const char* op, int64_t program) {
  const std::lock_guard<std::mutex> hold(step_guard);
  const auto found = step_programs.find(program);
  EXL_CHECK(found != step_programs.end(), "exl::", op, ": there is no program ", program);
  return found->second;
}

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
  const std::lock_guard<std::mutex> hold(step_guard);
  step_programs.erase(number);
}

// The pages of all layers, (layers, pages, page_size, kv_heads, head_dim or row_bytes).
StepPages step_pages(const char* op, const char* name, const Tensor& t, const StepModel& m, StepBatch& b) {
  check_shape(op, name, t, {int64_t(m.layers.size()), -1, -1, m.kv_heads, -1});
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

// Remembers the pages and the angles of the passes to come.
void op_step_bind(int64_t number, const Tensor& keys, const Tensor& values, std::vector<Tensor> angles) {
  const char* op = "step_bind";
  const auto program = step_program(op, number);
  const StepModel& m = program->model;
  StepBatch b{};
  b.keys = step_pages(op, "keys", keys, m, b);
  b.values = step_pages(op, "values", values, m, b);
  EXL_CHECK(keys.scalar_type() == values.scalar_type() && keys.size(1) == values.size(1) &&
                keys.size(2) == values.size(2),
            "exl::", op, ": keys ", describe(keys), " and values ", describe(values), " do not belong together");
  b.page_size = keys.size(2);
  EXL_CHECK(b.page_size > 0, "exl::", op, ": empty pages, got ", describe(keys));
  program->ropes = step_ropes(op, angles, m);
  program->angle_rows = angles.empty() ? 0 : angles[0].size(0);
  program->pages = keys.size(1);
  b.ropes = program->ropes.data(), b.rope_count = int64_t(program->ropes.size());
  program->batch = b;
  angles.push_back(keys);
  angles.push_back(values);
  program->bound = std::move(angles);
  program->next_layer = 0;
}

// `count` numbers of the plan, each in [0, limit).
const int64_t* step_part(const char* op, const char* name, const int64_t*& at, int64_t count, int64_t limit) {
  const int64_t* values = at;
  const int64_t bad = bad_slot(values, count, limit);
  EXL_CHECK(bad < 0, "exl::", op, ": ", name, "[", bad, "] is ", values[bad < 0 ? 0 : bad], ", allowed are 0 to ",
            limit - 1);
  at += count;
  return values;
}

const int32_t* step_ints(const char* op, const char* name, const int64_t*& at, int64_t count, std::vector<int32_t>& to) {
  to.resize(size_t(count));
  for (int64_t i = 0; i < count; ++i) {
    EXL_CHECK(at[i] >= 0 && at[i] <= std::numeric_limits<int32_t>::max(), "exl::", op, ": ", name, "[", i, "] is ",
              at[i]);
    to[size_t(i)] = int32_t(at[i]);
  }
  at += count;
  return to.data();
}

// A new pass: checks the numbers and the page table against what is bound.
void step_begin(const char* op, StepProgram& program, std::vector<int64_t> plan, const Tensor& pages) {
  const StepModel& m = program.model;
  StepBatch b = program.batch;
  program.next_layer = -1;  // until everything is known to be good
  program.lora.take();
  program.plan = std::move(plan);
  const int64_t* at = program.plan.data();
  const int64_t given = int64_t(program.plan.size());
  EXL_CHECK(given >= 3 && at[0] >= 0 && at[1] >= 0 && at[2] >= 0 && at[0] < given && at[1] < given && at[2] < given &&
                given == 3 + 3 * at[0] + 2 * at[1] + 1 + at[2],
            "exl::", op, ": a plan of ", given, " numbers does not hold what it says");
  b.rows = at[0], b.sequences = at[1], b.logits = at[2];
  at += 3;
  EXL_CHECK(b.logits <= b.rows, "exl::", op, ": ", b.logits, " rows of logits of ", b.rows, " tokens");
  b.tokens = step_part(op, "tokens", at, b.rows, m.vocabulary);
  b.places = step_part(op, "places", at, b.rows, program.angle_rows);
  b.slots = step_part(op, "slots", at, b.rows, program.pages * b.page_size);
  b.q_starts = step_ints(op, "q_starts", at, b.sequences + 1, program.q_starts);
  b.kv_lengths = step_ints(op, "kv_lengths", at, b.sequences, program.kv_lengths);
  b.logit_rows = step_part(op, "logit_rows", at, b.logits, b.rows);
  check_cpu(op, "pages", pages, ScalarType::Int);
  check_shape(op, "pages", pages, {b.sequences, -1});
  b.table_width = pages.size(1);
  b.page_table = pages.const_data_ptr<int32_t>();
  AttentionArgs a{};
  a.q_starts = b.q_starts, a.kv_lengths = b.kv_lengths, a.page_table = b.page_table;
  a.sequences = b.sequences, a.table_width = b.table_width, a.page_size = b.page_size;
  for (const StepLayer& layer : m.layers) a.window = layer.window > a.window ? layer.window : a.window;
  check_tables(op, a, b.rows, program.pages);
  program.lora.spread(op, b);
  program.table = pages;
  program.batch = b;
  program.x.resize(size_t(b.rows * m.hidden));
  program.next_layer = 0;
}

std::tuple<Tensor, bool> op_step_run(int64_t number, std::vector<int64_t> plan, const Tensor& pages, int64_t first,
                                     int64_t last) {
  const char* op = "step_run";
  const auto program = step_program(op, number);
  const StepModel& m = program->model;
  const int64_t layers = int64_t(m.layers.size());
  EXL_CHECK(!program->bound.empty(), "exl::", op, ": no pages are bound");
  if (first == 0) step_begin(op, *program, std::move(plan), pages);
  EXL_CHECK(first == program->next_layer && first <= last && last <= layers, "exl::", op, ": layers ", first, " to ",
            last, " of ", layers, ", layer ", program->next_layer, " comes next");
  const bool ends = last == layers;
  Tensor logits = empty_cpu({ends ? program->batch.logits : 0, m.head.outputs}, ScalarType::Float);
  float* to = ends ? logits.mutable_data_ptr<float>() : nullptr;
  step_cpu(m, program->batch, first, last, program->x.data(), to, program->timed ? &program->times : nullptr);
  program->next_layer = ends ? -1 : last;
  return {logits, all_finite(to, ends ? logits.numel() : 0)};
}

// The page table of the passes of step_draw.
void op_step_pages(int64_t number, const Tensor& pages) { step_program("step_pages", number)->draw_pages = pages; }

// A whole pass, and a token drawn behind each of its rows of logits. draws: temperature (0: the best), min_p, u of each
// row. banned: how many, then which, for each row. A token of -1: its logits are no distribution.
std::vector<int64_t> op_step_draw(int64_t number, std::vector<int64_t> plan, std::vector<double> draws,
                                  std::vector<int64_t> banned) {
  const char* op = "step_draw";
  const auto program = step_program(op, number);
  const StepModel& m = program->model;
  EXL_CHECK(!program->bound.empty() && program->draw_pages, "exl::", op, ": no pages are bound");
  step_begin(op, *program, std::move(plan), *program->draw_pages);
  program->next_layer = -1;
  const int64_t rows = program->batch.logits, width = m.head.outputs, given = int64_t(banned.size());
  EXL_CHECK(int64_t(draws.size()) == 3 * rows, "exl::", op, ": wanted 3 numbers for each of ", rows, " draws, got ",
            draws.size());
  std::vector<Draw> hows;
  int64_t at = 0;
  for (int64_t r = 0; r < rows; ++r) {
    EXL_CHECK(at < given && banned[size_t(at)] >= 0 && banned[size_t(at)] < given - at, "exl::", op, ": the ", given,
              " numbers of banned ids end within those of draw ", r);
    const double* d = draws.data() + 3 * r;
    hows.push_back({d[0], d[1], d[2], {banned.data() + at + 1, banned[size_t(at)]}});
    check_draw(op, hows.back(), width);
    at += 1 + hows.back().banned.count;
  }
  program->logits.resize(size_t(rows * width));
  float* logits = program->logits.data();
  step_cpu(m, program->batch, 0, int64_t(m.layers.size()), program->x.data(), logits,
           program->timed ? &program->times : nullptr);
  const auto started = std::chrono::steady_clock::now();
  std::vector<int64_t> tokens(size_t(rows), -1);
  const bool good = all_finite(logits, rows * width);
  for (int64_t r = 0; good && r < rows; ++r) tokens[size_t(r)] = draw(logits + r * width, width, hows[size_t(r)]);
  if (program->timed) {
    const std::chrono::duration<double> spent = std::chrono::steady_clock::now() - started;
    program->times.seconds[int(Phase::draw)] += spent.count();
  }
  return tokens;
}

// Seconds by phase since the last call, and their names; from now on passes are timed, or not.
std::tuple<Tensor, std::string> op_step_times(int64_t number, bool timed) {
  const auto program = step_program("step_times", number);
  constexpr int count = int(Phase::count);
  Tensor seconds = empty_cpu({count}, ScalarType::Double);
  std::string names;
  for (int i = 0; i < count; ++i) {
    seconds.mutable_data_ptr<double>()[i] = program->times.seconds[i];
    names += std::string(i ? " " : "") + kPhaseNames[i];
  }
  program->times = {};
  program->timed = timed;
  return {seconds, names};
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
  m.def("step_bind(int program, Tensor(a!) keys, Tensor(b!) values, Tensor[] angles) -> ()");
  m.def("step_run(int program, int[] plan, Tensor pages, int first, int last) -> (Tensor, bool)");
  m.def("step_pages(int program, Tensor pages) -> ()");
  m.def("step_draw(int program, int[] plan, float[] draws, int[] banned) -> int[]");
  m.def("step_times(int program, bool timed) -> (Tensor, str)");
  m.def("all_finite(Tensor x) -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(exl, CPU, m) {
  m.impl("step_new", TORCH_BOX(&exl::op_step_new));
  m.impl("step_layer", TORCH_BOX(&exl::op_step_layer));
  m.impl("step_bind", TORCH_BOX(&exl::op_step_bind));
  m.impl("step_run", TORCH_BOX(&exl::op_step_run));
  m.impl("step_pages", TORCH_BOX(&exl::op_step_pages));
  m.impl("all_finite", TORCH_BOX(&exl::op_all_finite));
}

STABLE_TORCH_LIBRARY_IMPL(exl, CompositeExplicitAutograd, m) {
  m.impl("step_draw", TORCH_BOX(&exl::op_step_draw));
  m.impl("step_free", TORCH_BOX(&exl::op_step_free));
  m.impl("step_times", TORCH_BOX(&exl::op_step_times));
}
