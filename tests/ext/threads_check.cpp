// A program that uses cpu/threads.h in every way it promises to work. Prints what fails; exit code 0 if nothing does.
#include "cpu/threads.h"

#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <set>
#include <thread>
#include <vector>

using namespace exl;

#define EXPECT(condition)                                                  \
  do {                                                                     \
    if (!(condition)) {                                                    \
      std::printf("line %d: %s\n", __LINE__, #condition);                  \
      std::exit(1);                                                        \
    }                                                                      \
  } while (0)

// Every task once, whatever the numbers.
enum class Cut { evenly, chunks, steal };
void covers(int64_t tasks, int64_t grain, Cut cut) {
  std::vector<std::atomic<int>> hits(size_t(tasks) + 1);
  const auto body = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) hits[size_t(i)].fetch_add(1, std::memory_order_relaxed);
  };
  if (cut == Cut::chunks) {
    parallel_chunks(tasks, grain, body);
  } else if (cut == Cut::steal) {
    parallel_steal(tasks, grain, body);
  } else {
    parallel_for(tasks, body, grain);
  }
  for (int64_t i = 0; i < tasks; ++i) EXPECT(hits[size_t(i)].load() == 1);
}

int64_t triangle(int64_t n) {
  std::atomic<int64_t> sum{0};
  parallel_for(n, [&](int64_t begin, int64_t end) {
    int64_t part = 0;
    for (int64_t i = begin; i < end; ++i) part += i;
    sum += part;
  });
  return sum;
}

int main() {
  EXPECT(threads() >= 1);
  set_threads(0);
  EXPECT(threads() == 1);
  for (int count : {1, 2, 3, 7}) {
    set_threads(count);
    EXPECT(threads() == count);
    for (int64_t tasks : {0, 1, 2, 3, 5, 64, 1000}) {
      for (int64_t grain : {1, 2, 17, 5000}) {
        for (Cut cut : {Cut::evenly, Cut::chunks, Cut::steal}) covers(tasks, grain, cut);
      }
    }
  }

  // Plain writes of the bodies are visible afterwards; many regions back to back and with pauses.
  set_threads(3);
  std::vector<int> plain(300);
  for (int round = 0; round < 2000; ++round) {
    parallel_for(300, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) plain[size_t(i)] += 1;
    });
    if (round % 500 == 0) usleep(2000);  // long enough for the workers to fall asleep
  }
  for (int value : plain) EXPECT(value == 2000);

  // Held awake, over pauses in which the workers would have slept; nested, and with a team that shrinks and grows.
  for (int round = 0; round < 40; ++round) {
    set_threads(1 + round % 4);
    const Awake outer;
    const Awake inner;
    for (int i = 0; i < 20; ++i) {
      if (i % 10 == 0) usleep(300);
      EXPECT(triangle(500 + i) == int64_t(500 + i) * (499 + i) / 2);
    }
  }
  usleep(2000);  // asleep again
  set_threads(3);
  EXPECT(triangle(100) == 4950);

  // The cut depends on the numbers alone, and a grain bounds the parts.
  std::atomic<int> parts{0};
  parallel_for(10, [&](int64_t, int64_t) { ++parts; }, 6);
  EXPECT(parts == 2);

  // A thread that is held up keeps one chunk; the others do the rest.
  std::atomic<int> done{0}, late{0};
  parallel_steal(64, 2, [&](int64_t begin, int64_t end) {
    if (begin == 0) {
      for (int i = 0; i < 2000 && done.load() < 62; ++i) usleep(1000);
      late = done.load();
    }
    done += int(end - begin);
  });
  EXPECT(done == 64 && late == 62);

  // Nested: inline on the same thread.
  std::atomic<int64_t> nested{0};
  parallel_for(6, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const auto outer = std::this_thread::get_id();
      parallel_for(4, [&](int64_t b, int64_t e) {
        EXPECT(std::this_thread::get_id() == outer);
        nested += e - b;
      });
    }
  });
  EXPECT(nested == 24);

  // Several callers at once, while the number of threads changes.
  std::vector<std::thread> callers;
  std::atomic<bool> good{true};
  for (int c = 0; c < 3; ++c) {
    callers.emplace_back([&good, c] {
      for (int i = 0; i < 500; ++i) {
        if (triangle(1000 + c) != int64_t(1000 + c) * (999 + c) / 2) good = false;
        if (c == 0) set_threads(1 + i % 4);
      }
    });
  }
  for (auto& caller : callers) caller.join();
  EXPECT(good);

  // A child has none of the workers and must not wait for them.
  set_threads(3);
  EXPECT(triangle(100) == 4950);
  const pid_t child = fork();
  if (child == 0) {
    alarm(10);
    _exit(triangle(100) == 4950 && threads() == 3 ? 0 : 1);
  }
  int status = -1;
  waitpid(child, &status, 0);
  EXPECT(WIFEXITED(status) && WEXITSTATUS(status) == 0);
  EXPECT(triangle(100) == 4950);
  return 0;
}
