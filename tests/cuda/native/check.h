// For the programs that run CUDA kernels by emulation outside Python, plain and under sanitizers (test_sanitizers.py).
//
// A program is one file here. A comment line `// kernels: a.cu b.cu` names the files of ext/cuda that it links, and
// main() returns every_order(argc, argv, function), where `function` makes its inputs, launches, compares with a
// double-precision loop, and returns the bytes that must not depend on the order of threads.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "../../../ext/cuda/exl_cuda.h"

namespace check {

// An array of exactly `count` elements, aligned to 256 bytes, so that AddressSanitizer sees every access out of range.
template <class T>
class Buffer {
 public:
  explicit Buffer(size_t count) : count_(count) {
    if (posix_memalign(&memory_, 256, count * sizeof(T) + (count == 0))) std::abort();
    std::memset(memory_, 0xff, count * sizeof(T));
  }
  explicit Buffer(const std::vector<T>& values) : Buffer(values.size()) {
    std::memcpy(memory_, values.data(), values.size() * sizeof(T));
  }
  Buffer(const Buffer&) = delete;
  ~Buffer() { std::free(memory_); }
  T* data() { return static_cast<T*>(memory_); }
  T& operator[](size_t i) { return data()[i]; }
  size_t size() const { return count_; }
  void append_to(std::string& bytes) { bytes.append(static_cast<const char*>(memory_), count_ * sizeof(T)); }

 private:
  void* memory_ = nullptr;
  size_t count_;
};

[[noreturn]] inline void wrong(const std::string& what) { throw std::runtime_error("WRONG: " + what); }

// |value - wanted| <= tolerance; NaN fails.
inline void near(double value, double wanted, double tolerance, const char* what, int64_t where) {
  if (std::fabs(value - wanted) <= tolerance) return;
  char text[200];
  std::snprintf(text, sizeof text, "%s[%lld] is %.9g, wanted %.9g within %.3g", what, static_cast<long long>(where),
                value, wanted, tolerance);
  wrong(text);
}

// Runs `function` in argv[1] orders (default 4: forward, reverse, two random ones). It returns the result's bytes.
// Prints PASS, or what was wrong, and returns the exit status.
template <class Function>
int every_order(int argc, char** argv, Function function) {
  const int orders = argc > 1 ? std::atoi(argv[1]) : 4;
  std::string first;
  for (int i = 0; i < orders; ++i) {
    exl_emu::set_order(i == 0 ? exl_emu::Order::forward : i == 1 ? exl_emu::Order::reverse : exl_emu::Order::random,
                       uint64_t(i));
    try {
      const std::string now = function();
      if (i == 0) first = now;
      if (now != first) wrong("the result depends on the order of threads");
    } catch (const exl_emu::KernelError& error) {
      std::printf("order %d: STOPPED: %s\n", i, error.what());
      return 1;
    } catch (const std::exception& error) {
      std::printf("order %d: %s\n", i, error.what());
      return 1;
    }
  }
  std::printf("PASS\n");
  return 0;
}

}  // namespace check
