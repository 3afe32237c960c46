// A whole pass of a model in one call: the passes. Contract: cpu/step.h, cpu/ahead.h.
//
// step_draw may be told how the pass behind it is drawn. That one, one more token of every sequence, is then begun by a
// thread of the program as soon as its tokens are known, and the next step_draw finds it under way: it is the same pass if
// all its numbers are. Else it is halted, and nobody has seen anything of it but keys and values behind every length.
// Whatever else touches what a pass reads or writes halts it first, here or, from Python, by step_halt.
#include <algorithm>
#include <chrono>
#include <limits>
#include <new>

#include "../cpu/kv_append.h"
#include "../cpu/threads.h"
#include "step.h"

namespace exl {
namespace {

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
  StepPass& pass = program.pass;
  StepBatch b = program.batch;
  program.lora.take();
  pass.plan = std::move(plan);
  const int64_t* at = pass.plan.data();
  const int64_t given = int64_t(pass.plan.size()), groups = int64_t(program.groups.size());
  EXL_CHECK(given >= 3 && at[0] >= 0 && at[1] >= 0 && at[2] >= 0 && at[0] < given && at[1] < given && at[2] < given &&
                given == 3 + (2 + groups) * at[0] + 2 * at[1] + 1 + at[2],
            "exl::", op, ": a plan of ", given, " numbers does not hold what it says");
  b.rows = at[0], b.sequences = at[1], b.logits = at[2];
  at += 3;
  EXL_CHECK(b.logits <= b.rows, "exl::", op, ": ", b.logits, " rows of logits of ", b.rows, " tokens");
  b.tokens = step_part(op, "tokens", at, b.rows, m.vocabulary);
  b.places = step_part(op, "places", at, b.rows, program.angle_rows);
  pass.groups = program.groups;
  for (size_t g = 0; g < pass.groups.size(); ++g) {
    pass.groups[g].slots = step_part(op, "slots", at, b.rows, program.pages[g] * b.page_size);
  }
  b.q_starts = step_ints(op, "q_starts", at, b.sequences + 1, pass.q_starts);
  b.kv_lengths = step_ints(op, "kv_lengths", at, b.sequences, pass.kv_lengths);
  b.logit_rows = step_part(op, "logit_rows", at, b.logits, b.rows);
  check_cpu(op, "pages", pages, ScalarType::Int);
  check_shape(op, "pages", pages, {groups * b.sequences, -1});
  b.table_width = pages.size(1);
  AttentionArgs a{};
  a.q_starts = b.q_starts, a.kv_lengths = b.kv_lengths;
  a.sequences = b.sequences, a.table_width = b.table_width, a.page_size = b.page_size;
  for (int64_t g = 0; g < groups; ++g) {
    a.page_table = pages.const_data_ptr<int32_t>() + g * b.sequences * b.table_width;
    a.window = 0;
    for (size_t l = 0; l < m.layers.size(); ++l) {
      if (program.homes[l].group == g && m.layers[l].window > a.window) a.window = m.layers[l].window;
    }
    check_tables(op, a, b.rows, program.pages[size_t(g)]);
    pass.groups[size_t(g)].page_table = a.page_table;
  }
  b.groups = pass.groups.data();
  program.lora.spread(op, b);
  pass.table = pages;
  pass.batch = b;
  pass.x.resize(size_t(b.rows * m.hidden));
}

std::tuple<Tensor, bool> op_step_run(int64_t number, std::vector<int64_t> plan, const Tensor& pages, int64_t first,
                                     int64_t last) {
  const char* op = "step_run";
  const auto program = step_program(op, number);
  const StepModel& m = program->model;
  const int64_t layers = int64_t(m.layers.size());
  EXL_CHECK(!program->bound.empty(), "exl::", op, ": no pages are bound");
  program->halt();
  if (first == 0) {
    program->next_layer = -1;  // until everything is known to be good
    step_begin(op, *program, std::move(plan), pages);
    program->next_layer = 0;
  }
  EXL_CHECK(first == program->next_layer && first <= last && last <= layers, "exl::", op, ": layers ", first, " to ",
            last, " of ", layers, ", layer ", program->next_layer, " comes next");
  const bool ends = last == layers;
  StepPass& pass = program->pass;
  Tensor logits = empty_cpu({ends ? pass.batch.logits : 0, m.head.outputs}, ScalarType::Float);
  float* to = ends ? logits.mutable_data_ptr<float>() : nullptr;
  step_cpu(m, pass.batch, first, last, pass.x.data(), to, program->timed ? &program->times : nullptr);
  program->next_layer = ends ? -1 : last;
  return {logits, all_finite(to, ends ? logits.numel() : 0)};
}

// The page table of the passes of step_draw.
void op_step_pages(int64_t number, const Tensor& pages) {
  const auto program = step_program("step_pages", number);
  program->halt();
  program->draw_pages = pages;
}

// How `rows` rows of logits are drawn from, as the drawing kernel wants it: it reads `how` itself.
std::vector<Draw> step_hows(const char* op, const StepDraws& how, int64_t rows, int64_t width) {
  const std::vector<int64_t>& banned = how.banned;
  const int64_t given = int64_t(banned.size());
  EXL_CHECK(int64_t(how.draws.size()) == 3 * rows, "exl::", op, ": wanted 3 numbers for each of ", rows, " draws, got ",
            how.draws.size());
  std::vector<Draw> hows;
  int64_t at = 0;
  for (int64_t r = 0; r < rows; ++r) {
    EXL_CHECK(at < given && banned[size_t(at)] >= 0 && banned[size_t(at)] < given - at, "exl::", op, ": the ", given,
              " numbers of banned ids end within those of draw ", r);
    const double* d = how.draws.data() + 3 * r;
    hows.push_back({d[0], d[1], d[2], {banned.data() + at + 1, banned[size_t(at)]}});
    check_draw(op, hows.back(), width);
    at += 1 + hows.back().banned.count;
  }
  return hows;
}

// All layers, and a token behind each row of logits. `pass.how` has been looked at by step_hows.
void step_compute(const StepModel& m, StepPass& pass, const std::atomic<bool>* stop) {
  const int64_t rows = pass.batch.logits, width = m.head.outputs;
  StepTimes* times = pass.timed ? &pass.times : nullptr;
  pass.times = {};
  pass.logits.resize(size_t(rows * width));
  pass.tokens.assign(size_t(rows), -1);
  float* logits = pass.logits.data();
  if (!step_cpu(m, pass.batch, 0, int64_t(m.layers.size()), pass.x.data(), logits, times, stop)) return;
  const auto started = std::chrono::steady_clock::now();
  const bool good = all_finite(logits, rows * width);
  const int64_t* banned = pass.how.banned.data();
  for (int64_t r = 0; good && r < rows; ++r) {
    const double* d = pass.how.draws.data() + 3 * r;
    pass.tokens[size_t(r)] = draw(logits + r * width, width, {d[0], d[1], d[2], {banned + 1, banned[0]}});
    banned += 1 + banned[0];
  }
  const std::chrono::duration<double> spent = std::chrono::steady_clock::now() - started;
  pass.times.seconds[int(Phase::draw)] += spent.count();
}

void StepAhead::run(const std::atomic<bool>& stop) {
  try {
    step_compute(model_, pass, &stop);
  } catch (const std::bad_alloc&) {  // the owner computes such a pass again, and hears of it then
    std::fill(pass.tokens.begin(), pass.tokens.end(), -1);
  }
}

bool StepAhead::next() {
  tokens = pass.tokens;
  times = pass.timed ? pass.times : StepTimes{};
  return advance();
}

bool StepAhead::follow(const StepPass& before) {
  const StepBatch& b = before.batch;
  if (onward.draws.empty() || b.rows != b.sequences || b.rows != b.logits || b.share_count > 0) return false;
  for (int64_t s = 0; s < b.sequences; ++s) {
    if (before.q_starts[size_t(s)] != s || b.logit_rows[s] != s) return false;
  }
  pass.plan = before.plan, pass.kv_lengths = before.kv_lengths, pass.q_starts = before.q_starts;
  pass.table = before.table, pass.tokens = before.tokens, pass.groups = before.groups;
  pass.batch = b;
  pass.batch.groups = pass.groups.data();
  pass.x.resize(before.x.size());
  return advance();
}

// `pass`, of one token of every sequence, becomes the one behind it.
bool StepAhead::advance() {
  StepBatch& b = pass.batch;
  const int64_t rows = b.rows;
  if (int64_t(onward.draws.size()) != 3 * rows) return false;
  int64_t *token = pass.plan.data() + 3, *place = token + rows, *slots = place + rows;
  int64_t* length = slots + int64_t(pass.groups.size()) * rows + rows + 1;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t drawn = pass.tokens[size_t(r)], index = length[r], column = index / b.page_size;
    if (drawn < 0 || std::find(ends.begin(), ends.end(), drawn) != ends.end()) return false;
    if (place[r] + 1 >= angle_rows_ || column >= b.table_width || index == std::numeric_limits<int32_t>::max()) {
      return false;
    }
    for (size_t g = 0; g < pass.groups.size(); ++g) {
      const int64_t page = pass.groups[g].page_table[r * b.table_width + column];
      if (page < 0 || page >= pages_[g]) return false;
      slots[int64_t(g) * rows + r] = page * b.page_size + index % b.page_size;
    }
    token[r] = drawn;
    place[r] += 1;
    length[r] += 1;
    pass.kv_lengths[size_t(r)] += 1;
  }
  for (size_t g = 0; g < pass.groups.size(); ++g) pass.groups[g].slots = slots + int64_t(g) * rows;
  b.tokens = token, b.places = place, b.logit_rows = length + rows;
  b.kv_lengths = pass.kv_lengths.data(), b.q_starts = pass.q_starts.data();
  pass.how = std::move(onward);
  onward = {};
  pass.timed = timed;
  return true;
}

// Whether a pass is to run beside the owner. With a CPU to spare, always. Without one the two take from each other what
// they win, until the owner stays away for long, or waits for the interpreter (LOG.md, "one pass ahead").
constexpr double kLongAway = 1e-3, kLongest = 1e-2;  // seconds; the second: nobody waits for tokens meanwhile
bool step_may_run_ahead(const StepProgram& program) {
  static const int cpus = usable_cpus();
  return threads() < cpus || (cpus > 1 && program.away > kLongAway);
}

// A whole pass, and a token drawn behind each of its rows of logits, with how the pass behind it is drawn, which the
// thread begins. No next_draws: there is none; there also is none behind a token of `ends`, and none but of one token of
// every sequence whose next slot lies in the page table. A token of -1: its logits are no distribution.
std::vector<int64_t> op_step_draw(int64_t number, std::vector<int64_t> plan, std::vector<double> draws,
                                  std::vector<int64_t> banned, std::vector<double> next_draws,
                                  std::vector<int64_t> next_banned, std::vector<int64_t> ends) {
  const char* op = "step_draw";
  const auto program = step_program(op, number);
  const StepModel& m = program->model;
  EXL_CHECK(!program->bound.empty() && program->draw_pages, "exl::", op, ": no pages are bound");
  const auto called = std::chrono::steady_clock::now();
  const std::chrono::duration<double> away = called - program->returned;
  program->away += (std::min(away.count(), kLongest) - program->away) / 8;
  StepAhead& behind = program->behind;
  StepDraws onward{std::move(next_draws), std::move(next_banned)};
  if (!step_may_run_ahead(*program)) onward = {};
  if (!onward.draws.empty()) step_hows(op, onward, int64_t(onward.draws.size()) / 3, m.head.outputs);
  const auto go_on = [&] {
    behind.onward = std::move(onward);
    behind.ends = std::move(ends);
    behind.timed = program->timed;
  };
  const auto count = [&](const StepTimes& times) {
    for (int i = 0; program->timed && i < int(Phase::count); ++i) program->times.seconds[i] += times.seconds[i];
  };
  program->next_layer = -1;
  if (program->ahead.pending()) {
    const StepDraws& how = behind.pass.how;
    if (program->lora.next.empty() && behind.pass.plan == plan && how.draws == draws && how.banned == banned) {
      go_on();
      program->ahead.take();
      ++program->taken;
      count(behind.times);
      program->returned = std::chrono::steady_clock::now();
      return behind.tokens;
    }
    program->halt();
  }
  StepPass& pass = program->pass;
  step_begin(op, *program, std::move(plan), *program->draw_pages);
  pass.how = {std::move(draws), std::move(banned)};
  step_hows(op, pass.how, pass.batch.logits, m.head.outputs);
  pass.timed = program->timed;
  step_compute(m, pass, nullptr);
  count(pass.times);
  go_on();
  if (behind.follow(pass)) program->ahead.start();
  program->returned = std::chrono::steady_clock::now();
  return pass.tokens;
}

// Nothing runs ahead any more, and nothing is kept of what did.
void op_step_halt(int64_t number) { step_program("step_halt", number)->halt(); }

// How many passes ran ahead and were asked for afterwards, and how many were halted.
std::tuple<int64_t, int64_t> op_step_counts(int64_t number) {
  const auto program = step_program("step_counts", number);
  return {program->taken, program->halted};
}

// Seconds by phase since the last call, of passes that were asked for, and their names; from now on passes are timed, or
// not.
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

}  // namespace
}  // namespace exl

STABLE_TORCH_LIBRARY_FRAGMENT(exl, m) {
  m.def("step_run(int program, int[] plan, Tensor pages, int first, int last) -> (Tensor, bool)");
  m.def("step_pages(int program, Tensor pages) -> ()");
  m.def(
      "step_draw(int program, int[] plan, float[] draws, int[] banned, float[] next_draws, int[] next_banned, "
      "int[] ends) -> int[]");
  m.def("step_halt(int program) -> ()");
  m.def("step_counts(int program) -> (int, int)");
  m.def("step_times(int program, bool timed) -> (Tensor, str)");
}

STABLE_TORCH_LIBRARY_IMPL(exl, CPU, m) {
  m.impl("step_run", TORCH_BOX(&exl::op_step_run));
  m.impl("step_pages", TORCH_BOX(&exl::op_step_pages));
}

STABLE_TORCH_LIBRARY_IMPL(exl, CompositeExplicitAutograd, m) {
  m.impl("step_draw", TORCH_BOX(&exl::op_step_draw));
  m.impl("step_halt", TORCH_BOX(&exl::op_step_halt));
  m.impl("step_counts", TORCH_BOX(&exl::op_step_counts));
  m.impl("step_times", TORCH_BOX(&exl::op_step_times));
}
