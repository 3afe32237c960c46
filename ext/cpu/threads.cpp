#include "threads.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <mutex>
#include <set>
#include <string>
#include <system_error>
#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace exl {
namespace {

using detail::RangeFn;

constexpr int kMaxThreads = 256;
constexpr auto kSpin = std::chrono::microseconds(60);  // longer than the gap between two regions of an operator
constexpr int kHeldSpins = 16;  // of kSpin: how long a caller that holds its team awake waits for it without sleeping

thread_local bool inside_region = false;

inline void pause_cpu() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Spins for up to kSpin. True as soon as `ready` is.
template <class Ready>
bool spin_until(const Ready& ready) {
  const auto deadline = std::chrono::steady_clock::now() + kSpin;
  do {
    for (int i = 0; i < 64; ++i) {
      if (ready()) return true;
      pause_cpu();
    }
  } while (std::chrono::steady_clock::now() < deadline);
  return ready();
}

// One region: which ranges there are, and who runs them.
struct Job {
  RangeFn body = nullptr;
  void* context = nullptr;
  int64_t tasks = 0;
  int64_t chunk = 0;  // 0: one contiguous range per thread
  int parts = 1;
  std::atomic<int64_t> next{0};

  void run(int part) {
    if (chunk == 0) {
      const int64_t begin = tasks * part / parts, end = tasks * (part + 1) / parts;
      if (begin < end) body(context, begin, end);
      return;
    }
    for (;;) {
      const int64_t begin = next.fetch_add(chunk, std::memory_order_relaxed);
      if (begin >= tasks) return;
      body(context, begin, begin + chunk < tasks ? begin + chunk : tasks);
    }
  }
};

// `claim_` is one word: the serial number of the region, how many parts it has, and the next part that nobody has
// taken. Whoever advances the last field owns that part, and only an owner reads the job: the region cannot end, nor the
// job be rewritten, before that part is done. Part 0 is the caller's; when it is through, it also takes whatever no
// worker has begun, so a worker that sleeps or lost its CPU to another program holds nobody up.
class Team {
 public:
  bool try_enter() { return !busy_.exchange(true, std::memory_order_acquire); }
  void leave() { busy_.store(false, std::memory_order_release); }

  // Workers are only ever added; a smaller count leaves some asleep. Fewer than wanted if the system refuses threads.
  int ensure(int parts) {
    while (workers_ < parts - 1) {
      sigset_t all, before;  // signals belong to the main thread: a worker would swallow the interruption of its reads
      sigfillset(&all);
      pthread_sigmask(SIG_SETMASK, &all, &before);
      bool started = true;
      try {
        std::thread([this, index = workers_ + 1] { work(index); }).detach();
      } catch (const std::system_error&) {
        started = false;
      }
      pthread_sigmask(SIG_SETMASK, &before, nullptr);
      if (!started) break;
      ++workers_;
    }
    return parts < workers_ + 1 ? parts : workers_ + 1;
  }

  void hold() {
    held_.fetch_add(1);
    if (asleep_.load() > 0) {
      std::lock_guard<std::mutex> guard(mutex_);
      wake_.notify_all();
    }
  }
  void let_go() { held_.fetch_sub(1); }

  void run(RangeFn body, void* context, int64_t tasks, int64_t chunk, int parts) {
    job_.body = body;
    job_.context = context;
    job_.tasks = tasks;
    job_.chunk = chunk;
    job_.parts = parts;
    job_.next.store(0, std::memory_order_relaxed);
    pending_.store(parts - 1, std::memory_order_relaxed);
    const uint64_t serial = (claim_.load() >> 32) + 1;
    claim_.store(serial << 32 | uint64_t(parts) << 16 | 1);
    if (asleep_.load() > 0) {
      std::lock_guard<std::mutex> hold(mutex_);
      wake_.notify_all();
    }
    job_.run(0);
    for (int part; (part = take()) != 0;) {
      job_.run(part);
      pending_.fetch_sub(1);
    }
    const auto done = [this] { return pending_.load(std::memory_order_acquire) == 0; };
    bool ended = spin_until(done);
    // A worker that lost its CPU in the middle of a part may be away for long; until then this is its caller's affair.
    for (int i = 0; i < kHeldSpins && !ended && held_.load(std::memory_order_relaxed) > 0; ++i) {
      sched_yield();
      ended = spin_until(done);
    }
    if (!ended) {
      std::unique_lock<std::mutex> hold(mutex_);
      caller_asleep_.store(true);
      finished_.wait(hold, [this] { return pending_.load() == 0; });
      caller_asleep_.store(false);
    }
  }

 private:
  static bool open(uint64_t claim) { return (claim & 0xffff) < (claim >> 16 & 0xffff); }

  // The next part of the region under way, now the caller's of this function; 0 if there is none.
  int take() {
    uint64_t claim = claim_.load(std::memory_order_acquire);
    while (open(claim)) {
      if (claim_.compare_exchange_weak(claim, claim + 1, std::memory_order_acq_rel)) return int(claim & 0xffff);
    }
    return 0;
  }

  void work(int index) {
    inside_region = true;  // a body that opens a region runs it inline
#if defined(__linux__)
    pthread_setname_np(pthread_self(), "exl-worker");
#endif
    const auto work_waits = [this] { return open(claim_.load()); };
    // Those that a smaller team does without sleep on.
    const auto held = [this, index] { return held_.load() > 0 && index < threads(); };
    for (;;) {
      if (!spin_until(work_waits)) {
        if (held()) {
          sched_yield();  // to whoever else wants this CPU
          continue;
        }
        std::unique_lock<std::mutex> hold(mutex_);
        asleep_.fetch_add(1);
        wake_.wait(hold, [&] { return work_waits() || held(); });
        asleep_.fetch_sub(1);
      }
      for (int part; (part = take()) != 0;) {
        job_.run(part);
        if (pending_.fetch_sub(1) == 1 && caller_asleep_.load()) {
          std::lock_guard<std::mutex> hold(mutex_);
          finished_.notify_one();
        }
      }
    }
  }

  Job job_;
  int workers_ = 0;
  std::atomic<bool> busy_{false};
  alignas(64) std::atomic<uint64_t> claim_{0};
  alignas(64) std::atomic<int> pending_{0};
  alignas(64) std::atomic<int> asleep_{0};
  std::atomic<int> held_{0};
  std::atomic<bool> caller_asleep_{false};
  std::mutex mutex_;
  std::condition_variable wake_, finished_;
};

std::atomic<Team*> current{nullptr};
std::atomic<int> wanted{0};

// The threads of the parent do not exist in a forked child, and its locks may be held for ever: start afresh there.
void forget_team() {
  current.store(nullptr);
  inside_region = false;
}

// Never destroyed: workers may still be waiting on its members while the process exits.
Team& team() {
  Team* now = current.load(std::memory_order_acquire);
  if (now != nullptr) return *now;
  static const int registered = pthread_atfork(nullptr, nullptr, &forget_team);
  (void)registered;
  Team* fresh = new Team;
  if (current.compare_exchange_strong(now, fresh)) return *fresh;
  delete fresh;
  return *now;
}

#if defined(__linux__)
std::string first_line(const std::string& path) {
  char text[256] = {0};
  if (std::FILE* file = std::fopen(path.c_str(), "r")) {
    if (std::fgets(text, sizeof text, file) == nullptr) text[0] = 0;
    std::fclose(file);
  }
  return text;
}
#endif

// Physical cores among the CPUs this process may use: two hyper-threads of a core share what these kernels need. A
// container's CPU quota lowers it further.
int default_threads() {
  int count = int(std::thread::hardware_concurrency());
#if defined(__linux__)
  cpu_set_t allowed;
  CPU_ZERO(&allowed);
  if (sched_getaffinity(0, sizeof allowed, &allowed) == 0) {
    std::set<std::string> cores;
    for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
      if (!CPU_ISSET(cpu, &allowed)) continue;
      const std::string name = std::to_string(cpu);
      const std::string siblings = first_line("/sys/devices/system/cpu/cpu" + name + "/topology/thread_siblings_list");
      cores.insert(siblings.empty() ? name : siblings);
    }
    if (!cores.empty()) count = int(cores.size());
  }
  long long quota = 0, period = 0;
  if (std::sscanf(first_line("/sys/fs/cgroup/cpu.max").c_str(), "%lld %lld", &quota, &period) == 2 && period > 0) {
    const long long whole = (quota + period - 1) / period;
    if (whole >= 1 && whole < count) count = int(whole);
  }
#endif
  return count < 1 ? 1 : count > kMaxThreads ? kMaxThreads : count;
}

void run(int64_t tasks, int64_t chunk, int64_t most_parts, RangeFn body, void* context) {
  if (tasks <= 0) return;
  int parts = threads();
  if (int64_t(parts) > most_parts) parts = int(most_parts);
  if (parts > 1 && !inside_region) {
    Team& workers = team();
    if (workers.try_enter()) {
      parts = workers.ensure(parts);
      if (parts > 1) {
        inside_region = true;
        workers.run(body, context, tasks, chunk, parts);
        inside_region = false;
        workers.leave();
        return;
      }
      workers.leave();
    }
  }
  body(context, 0, tasks);
}

}  // namespace

int threads() {
  int count = wanted.load(std::memory_order_relaxed);
  if (count == 0) {
    count = default_threads();
    wanted.store(count, std::memory_order_relaxed);
  }
  return count;
}

void set_threads(int count) {
  wanted.store(count < 1 ? 1 : count > kMaxThreads ? kMaxThreads : count, std::memory_order_relaxed);
}

Awake::Awake() : team_(nullptr) {
  if (threads() <= 1 || inside_region) return;
  Team& workers = team();
  workers.hold();
  team_ = &workers;
}

Awake::~Awake() {
  if (team_ != nullptr) static_cast<Team*>(team_)->let_go();
}

double region_cost_ns(int64_t repeats) {
  std::atomic<int64_t> sink{0};  // keeps the region from being optimised away
  const auto start = std::chrono::steady_clock::now();
  for (int64_t i = 0; i < repeats; ++i) {
    parallel_for(threads(), [&](int64_t begin, int64_t) { sink.store(begin, std::memory_order_relaxed); });
  }
  const std::chrono::duration<double, std::nano> spent = std::chrono::steady_clock::now() - start;
  return spent.count() / double(repeats);
}

namespace detail {

void run_static(int64_t tasks, int64_t grain, RangeFn body, void* context) {
  run(tasks, 0, grain > 1 ? (tasks + grain - 1) / grain : tasks, body, context);
}

void run_steal(int64_t tasks, int64_t chunk, RangeFn body, void* context) {
  if (chunk < 1) chunk = 1;
  const int64_t pieces = (tasks + chunk - 1) / chunk;
  const int parts = int(pieces < threads() ? pieces : threads());
  if (parts <= 1 || inside_region || pieces > int64_t(UINT32_MAX)) return run(tasks, 0, 1, body, context);
  // What is left of every thread's range, in pieces: the first above the end, in one word.
  struct alignas(64) Rest {
    std::atomic<uint64_t> range;
  };
  Rest rest[kMaxThreads];
  for (int64_t p = 0; p < parts; ++p) {
    const uint64_t begin = uint64_t(pieces * p / parts), end = uint64_t(pieces * (p + 1) / parts);
    rest[p].range.store(begin << 32 | end, std::memory_order_relaxed);
  }
  const auto each = [&](int64_t own, int64_t) {
    const auto take = [&](int64_t from, bool front) {
      uint64_t range = rest[from].range.load(std::memory_order_relaxed);
      for (;;) {
        const uint64_t begin = range >> 32, end = range & UINT32_MAX;
        if (begin >= end) return false;
        const uint64_t left = front ? (begin + 1) << 32 | end : begin << 32 | (end - 1);
        if (!rest[from].range.compare_exchange_weak(range, left, std::memory_order_relaxed)) continue;
        const int64_t first = int64_t(front ? begin : end - 1) * chunk;
        body(context, first, first + chunk < tasks ? first + chunk : tasks);
        return true;
      }
    };
    while (take(own, true)) {
    }
    for (int64_t other = own + 1; other < own + parts; ++other) {
      while (take(other % parts, false)) {
      }
    }
  };
  run(parts, 0, parts, &call_range<decltype(each)>, const_cast<void*>(static_cast<const void*>(&each)));
}

void run_chunks(int64_t tasks, int64_t chunk, RangeFn body, void* context) {
  if (chunk < 1) chunk = 1;
  run(tasks, chunk, (tasks + chunk - 1) / chunk, body, context);
}

}  // namespace detail
}  // namespace exl
