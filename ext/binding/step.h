// What the operators of the native pass share: step.cpp builds a model and binds memory to it, step_run.cpp runs passes.
#pragma once

#include <chrono>
#include <map>
#include <memory>
#include <mutex>

#include "../cpu/ahead.h"
#include "../cpu/step.h"
#include "shared.h"
#include "step_lora.h"

namespace exl {
namespace {

// How the tokens of a pass are drawn. draws: temperature (0: the best), min_p, u of each row. banned: how many, then
// which, for each row.
struct StepDraws {
  std::vector<double> draws;
  std::vector<int64_t> banned;
};

// A pass, and what its `batch` points into. plan: T, S, L, tokens, places, slots of every group, q_starts, kv_lengths,
// logit_rows.
struct StepPass {
  std::vector<int64_t> plan;
  std::vector<int32_t> q_starts, kv_lengths;
  std::optional<Tensor> table;
  std::vector<StepGroup> groups;
  StepBatch batch{};
  std::vector<float> x, logits;
  StepDraws how;
  std::vector<int64_t> tokens;  // drawn
  bool timed = false;
  StepTimes times{};
};

// The passes behind one, computed while their owner looks at the tokens of it. No adapter takes part in them.
class StepAhead final : public AheadWork {
 public:
  StepAhead(const StepModel& model, const int64_t& angle_rows, const std::vector<int64_t>& pages)
      : model_(model), angle_rows_(angle_rows), pages_(pages) {}

  // AheadWork
  void run(const std::atomic<bool>& stop) override;
  bool next() override;

  // Makes `pass` the one behind `before`, whose tokens are drawn. False if there is none.
  bool follow(const StepPass& before);

  StepPass pass;  // under way
  // How the pass behind `pass` is drawn, and tokens behind which there is none. No draws: there is none at all.
  StepDraws onward;
  std::vector<int64_t> ends;
  bool timed = false;  // whether that one is
  // Handed over.
  std::vector<int64_t> tokens;
  StepTimes times{};

 private:
  bool advance();

  const StepModel& model_;
  const int64_t& angle_rows_;
  const std::vector<int64_t>& pages_;
};

struct StepProgram {
  StepModel model;
  std::vector<Tensor> kept;
  // From step_bind.
  std::vector<Tensor> bound;
  std::vector<StepRope> ropes;
  int64_t angle_rows = 0;
  std::vector<int64_t> pages;     // of each group
  std::vector<StepGroup> groups;  // without slots and tables
  std::vector<StepHome> homes;
  StepBatch batch{};
  std::optional<Tensor> draw_pages;  // from step_pages
  StepPass pass;                     // under way
  int64_t next_layer = -1;           // of it; -1: there is none
  StepLora lora;
  StepTimes times{};
  bool timed = false;
  int64_t taken = 0, halted = 0;  // passes that ran ahead
  std::chrono::steady_clock::time_point returned{};  // from the last step_draw
  double away = 0;  // seconds from there to the next call: a mean that forgets
  StepAhead behind{model, angle_rows, pages};
  AheadThread ahead{behind};  // destroyed first: nothing runs any more then

  // Before anything that a pass under way depends on changes.
  void halt() {
    if (!ahead.pending()) return;
    ahead.halt();
    ++halted;
  }
};

std::mutex step_guard;
std::map<int64_t, std::shared_ptr<StepProgram>> step_programs;

std::shared_ptr<StepProgram> step_program(const char* op, int64_t program) {
  const std::lock_guard<std::mutex> hold(step_guard);
  const auto found = step_programs.find(program);
  EXL_CHECK(found != step_programs.end(), "exl::", op, ": there is no program ", program);
  return found->second;
}

}  // namespace
}  // namespace exl
