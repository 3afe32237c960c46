// A small persistent team of threads for the CPU kernels. No torch and no OpenMP here: torch brings its own OpenMP
// runtime, and two of them in one process fight for the cores.
//
//   parallel_for(tasks, body)            calls body(begin, end) on disjoint ranges that cover [0, tasks): as many
//                                        as there are threads, cut by (tasks, threads) alone
//   parallel_for(tasks, body, grain)     never gives a thread fewer than `grain` tasks; small work stays on the caller
//   parallel_steal(tasks, chunk, body)   as parallel_for, but a thread takes its range `chunk` tasks at a time from the
//                                        front, and one that is through goes on at the backs of the others': memory is
//                                        read in long runs, and a thread that lost its CPU holds up one chunk
//   parallel_chunks(tasks, chunk, body)  ranges of `chunk` tasks are handed out as threads become free: for unequal
//                                        work or unequal cores
//
// Rules
//   - A task's result must not depend on which thread runs it or on how the tasks were cut: then results are the same
//     bits for every thread count.
//   - `body` must not throw. Check arguments before the region.
//   - A call from inside a body runs inline on that thread. So does a call made while another caller uses the team (two
//     Python threads). A child process starts a team of its own after fork().
//   - The caller takes part, and takes over the ranges that no worker has begun when its own is done: a thread may run
//     more than one. All memory effects of the bodies are visible to it when the call returns.
//   - Workers spin for a moment after a region before they sleep: back-to-back regions start in a few microseconds. While
//     an `Awake` lives they do not sleep at all, whatever the caller does between its regions.
//
// Scratch memory of a body: on its stack, `thread_local`, or sliced from a buffer of the caller by task index.
// Test: tests/ext/test_threads.py
#pragma once

#include <cstdint>

namespace exl {

// Size of the team, the caller included. The default is the number of physical cores this process may run on.
int threads();

// 1 <= count <= 256; other values are clamped. Takes effect with the next region.
void set_threads(int count);

// For a chain of regions: while one lives, the workers wait for the next region awake, and the caller for the end of one.
// Cheap to make; may be nested; without effect on a team of one.
class Awake {
 public:
  Awake();
  ~Awake();
  Awake(const Awake&) = delete;
  Awake& operator=(const Awake&) = delete;

 private:
  void* team_;  // a child after fork() has another
};

// Mean cost of an empty region of all threads, in nanoseconds.
double region_cost_ns(int64_t repeats);

namespace detail {

using RangeFn = void (*)(void* context, int64_t begin, int64_t end);

void run_static(int64_t tasks, int64_t grain, RangeFn body, void* context);
void run_chunks(int64_t tasks, int64_t chunk, RangeFn body, void* context);
void run_steal(int64_t tasks, int64_t chunk, RangeFn body, void* context);

}  // namespace detail

namespace {  // internal linkage: see cpu/isa.h

template <class Body>
void call_range(void* context, int64_t begin, int64_t end) {
  (*static_cast<const Body*>(context))(begin, end);
}

template <class Body>
inline void parallel_for(int64_t tasks, const Body& body, int64_t grain = 1) {
  detail::run_static(tasks, grain, &call_range<Body>, const_cast<Body*>(&body));
}

template <class Body>
inline void parallel_chunks(int64_t tasks, int64_t chunk, const Body& body) {
  detail::run_chunks(tasks, chunk, &call_range<Body>, const_cast<Body*>(&body));
}

template <class Body>
inline void parallel_steal(int64_t tasks, int64_t chunk, const Body& body) {
  detail::run_steal(tasks, chunk, &call_range<Body>, const_cast<Body*>(&body));
}

}  // namespace
}  // namespace exl
