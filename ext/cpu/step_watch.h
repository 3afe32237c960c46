// Where the time of a pass goes, see StepTimes.
#pragma once

#include <chrono>

#include "step.h"

namespace exl {

class Stopwatch {
 public:
  explicit Stopwatch(StepTimes* to) : to_(to) {
    if (to_ != nullptr) last_ = Clock::now();
  }
  // What passed since the last call belongs to `phase`.
  void lap(Phase phase) {
    if (to_ == nullptr) return;
    const Clock::time_point now = Clock::now();
    to_->seconds[int(phase)] += std::chrono::duration<double>(now - last_).count();
    last_ = now;
  }

 private:
  using Clock = std::chrono::steady_clock;
  StepTimes* to_;
  Clock::time_point last_;
};

}  // namespace exl
