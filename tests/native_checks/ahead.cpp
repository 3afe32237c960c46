// A chain of results that a thread computes ahead of their owner (cpu/ahead.h): each follows from the one before, so one
// that was skipped, computed twice or seen half done shows.
#include "cpu/ahead.h"

#include <sys/wait.h>

#include <atomic>
#include <chrono>
#include <memory>
#include <thread>

#include "check.h"

using namespace exl;
using check::Random;

namespace {

constexpr int64_t kParts = 6, kWidth = 3000;

// Value n + 1 of a chain from value n: a sum over a row that value n fills, by regions of the team.
uint64_t following(uint64_t value, std::vector<uint64_t>& row, const std::atomic<bool>* stop) {
  for (int64_t part = 0; part < kParts; ++part) {
    if (stop != nullptr && stop->load(std::memory_order_relaxed)) return 0;
    parallel_for(kWidth, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) row[size_t(i)] = (value + uint64_t(i)) * 0x9e3779b97f4a7c15ull + uint64_t(part);
    });
    for (uint64_t each : row) value = (value ^ each) * 0x100000001b3ull;
  }
  return value | 1;  // 0: stopped
}

struct Chain final : AheadWork {
  uint64_t at = 1;     // what run() begins with
  uint64_t found = 0;  // what it leaves
  int64_t left = 0;    // how many more next() may begin
  uint64_t said = 0;   // handed over
  std::atomic<int> runs{0};
  std::vector<uint64_t> row = std::vector<uint64_t>(kWidth);

  void run(const std::atomic<bool>& stop) override {
    runs.fetch_add(1);
    found = following(at, row, &stop);
  }
  bool next() override {
    said = found;
    if (left <= 0) return false;
    --left;
    at = found;
    return true;
  }
};

struct Owner {
  Chain chain;
  AheadThread thread{chain};
};

void pass_time(Random& random) {
  switch (random.below(4)) {
    case 0: std::this_thread::sleep_for(std::chrono::microseconds(random.below(300))); break;
    case 1: std::this_thread::yield(); break;
    default: break;  // at once
  }
}

// Asks for `count` values, computes by itself what does not run ahead, and now and then wants something else.
void walk(uint64_t seed, int64_t count) {
  Random random(seed);
  auto owner = std::make_unique<Owner>();
  std::vector<uint64_t> row(kWidth), other(kWidth);
  uint64_t value = seed;
  for (int64_t i = 0; i < count; ++i) {
    const uint64_t wanted = following(value, row, nullptr);
    const bool ends = random.below(8) == 0;
    owner->chain.left = ends ? 0 : 1;
    if (owner->thread.pending()) {
      owner->thread.take();
      EXPECT(owner->chain.said == wanted);
      EXPECT(owner->thread.pending() == !ends);
    } else if (!ends) {
      owner->chain.at = wanted;
      EXPECT(owner->thread.start());
    }
    value = wanted;
    pass_time(random);
    if (random.below(6) == 0) {
      owner->thread.halt();
      EXPECT(!owner->thread.pending());
      owner->chain.row.assign(kWidth, 0);  // nobody else's now
      const int runs = owner->chain.runs.load();
      pass_time(random);
      EXPECT(owner->chain.runs.load() == runs);
    }
    if (random.below(16) == 0) owner = std::make_unique<Owner>();  // the old one goes, whatever it is doing
  }
}

// A result that nobody takes is the last one.
void nobody_asks() {
  Owner owner;
  owner.chain.left = 100;
  EXPECT(owner.thread.start());
  owner.thread.take();  // the one behind it may begin
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  EXPECT(owner.chain.runs.load() == 2 && owner.thread.pending());
}

// In a child nothing is pending, and it has a thread of its own.
void forked() {
  Owner owner;
  owner.chain.left = 1;
  EXPECT(owner.thread.start());
  const pid_t child = fork();
  if (child == 0) {
    std::vector<uint64_t> row(kWidth);
    if (owner.thread.pending()) _exit(2);
    owner.thread.halt();
    owner.chain.at = 7, owner.chain.left = 0, owner.chain.row.assign(kWidth, 0);
    if (!owner.thread.start()) _exit(3);
    owner.thread.take();
    _exit(owner.chain.said == following(7, row, nullptr) ? 0 : 4);
  }
  int status = 0;
  EXPECT(child > 0 && waitpid(child, &status, 0) == child && WIFEXITED(status));
  EXPECT(WEXITSTATUS(status) == 0);
  owner.thread.take();
  std::vector<uint64_t> row(kWidth);
  EXPECT(owner.chain.said == following(1, row, nullptr));
}

}  // namespace

int main(int argc, char** argv) {
  const check::Ways ways(argc, argv);
  EXPECT(usable_cpus() >= 1);
  const int64_t count = ways.threads_only ? 150 : 400;
  for (const int team : {1, 3}) {
    set_threads(team);
    check::begin("a chain, " + std::to_string(team) + " threads");
    walk(3, count);
    check::begin("two chains beside each other, " + std::to_string(team) + " threads");
    std::thread beside([&] { walk(5, count); });
    walk(7, count);
    beside.join();
    check::begin("nobody asks");
    nobody_asks();
  }
  if (!ways.threads_only) {
    check::begin("a child");
    forked();
  }
  return 0;
}
