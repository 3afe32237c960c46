// What the programs in this folder share. Each one drives a family of CPU kernels over many shapes and compares the
// results with plain loops in double; test_sanitizers.py builds and runs them under the sanitizers.
//
//   argument "threads"   only what shows whether threads disturb each other: one instruction set, few shapes
//
// Every case is named before it runs. The first comparison that fails is printed and ends the program with exit code 1.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "common/half.h"
#include "cpu/gated.h"
#include "cpu/isa.h"
#include "cpu/threads.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(start, size) ((void)(start), (void)(size))
#define ASAN_UNPOISON_MEMORY_REGION(start, size) ((void)(start), (void)(size))
#endif

namespace check {

inline std::string& what() {  // the case under way, for messages
  static std::string text;
  return text;
}

// Printed as well: the last line tells where a program died.
inline void begin(const std::string& name) {
  what() = name;
  std::printf("%s\n", name.c_str());
  std::fflush(stdout);
}

template <class... Args>
[[noreturn]] void fail(const char* format, Args... args) {
  std::printf("wrong: %s: ", what().c_str());
  std::printf(format, args...);
  std::printf("\n");
  std::exit(1);
}

#define EXPECT(condition)                                                        \
  do {                                                                           \
    if (!(condition)) check::fail("%s:%d: %s", __FILE__, __LINE__, #condition);  \
  } while (0)

// |got - wanted| <= bound; a NaN fails.
inline void expect_near(double got, double wanted, double bound, const char* name, int64_t row, int64_t column) {
  if (std::fabs(got - wanted) <= bound) return;
  fail("%s[%lld, %lld] is %.9g, wanted %.9g within %.3g", name, (long long)row, (long long)column, got, wanted, bound);
}

// Memory of exactly `count` elements that ends where a page ends which nobody may touch, and begins behind poison: what
// reads or writes outside is caught, even by instructions that a sanitizer does not look at. Filled with 0xff: NaN for
// floats, and nothing that a kernel could have meant.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t count, int fill = 0xff) : count_(count) {
    const size_t page = size_t(sysconf(_SC_PAGESIZE)), bytes = size_t(count) * sizeof(T);
    room_ = (bytes + page - 1) / page * page + page;
    void* memory = mmap(nullptr, room_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) std::abort();
    start_ = static_cast<char*>(memory);
    char* guard = start_ + room_ - page;
    if (mprotect(guard, page, PROT_NONE) != 0) std::abort();
    data_ = reinterpret_cast<T*>(guard - bytes);
    std::memset(static_cast<void*>(data_), fill, bytes);
    ASAN_POISON_MEMORY_REGION(start_, size_t(reinterpret_cast<char*>(data_) - start_));
  }
  Buffer(Buffer&& other) noexcept { *this = static_cast<Buffer&&>(other); }
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(start_, other.start_), std::swap(data_, other.data_);
    std::swap(room_, other.room_), std::swap(count_, other.count_);
    return *this;
  }
  ~Buffer() {
    if (start_ == nullptr) return;
    ASAN_UNPOISON_MEMORY_REGION(start_, size_t(reinterpret_cast<char*>(data_) - start_));
    munmap(start_, room_);
  }

  T* data() { return data_; }
  const T* data() const { return data_; }
  int64_t size() const { return count_; }
  T& operator[](int64_t i) { return data_[i]; }
  const T& operator[](int64_t i) const { return data_[i]; }
  T* begin() { return data_; }
  T* end() { return data_ + count_; }

 private:
  char* start_ = nullptr;
  T* data_ = nullptr;
  size_t room_ = 0;
  int64_t count_ = 0;
};

// A copy that ends at a guard page.
template <class T>
Buffer<T> guarded(const std::vector<T>& from) {
  Buffer<T> to(int64_t(from.size()));
  if (!from.empty()) std::memcpy(static_cast<void*>(to.data()), from.data(), from.size() * sizeof(T));
  return to;
}

template <class T>
bool same_bits(const T* a, const T* b, int64_t count) {
  return count == 0 || std::memcmp(a, b, size_t(count) * sizeof(T)) == 0;
}

class Random {  // SplitMix64
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t next() {
    uint64_t z = state_ += 0x9e3779b97f4a7c15ull;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
  }
  int64_t below(int64_t n) { return int64_t(next() % uint64_t(n)); }
  double uniform() { return double(next() >> 11) * 0x1p-53; }
  float normal() {
    const double u = 1.0 - uniform(), v = uniform();
    return float(std::sqrt(-2.0 * std::log(u)) * std::cos(6.283185307179586 * v));
  }
  template <class T>
  void shuffle(std::vector<T>& items) {
    for (int64_t i = int64_t(items.size()) - 1; i > 0; --i) std::swap(items[size_t(i)], items[size_t(below(i + 1))]);
  }

 private:
  uint64_t state_;
};

inline void fill_normal(Buffer<float>& x, Random& random, float size = 1.0f) {
  for (float& value : x) value = size * random.normal();
}

// Element i of memory of any dtype.
inline double element(const void* from, exl::Dtype dtype, int64_t i) {
  switch (dtype) {
    case exl::Dtype::float16: return exl::half_to_float(static_cast<const uint16_t*>(from)[i]);
    case exl::Dtype::bfloat16: return exl::bfloat16_to_float(static_cast<const uint16_t*>(from)[i]);
    default: return static_cast<const float*>(from)[i];
  }
}

inline void put_element(void* to, exl::Dtype dtype, int64_t i, float value) {
  switch (dtype) {
    case exl::Dtype::float16: static_cast<uint16_t*>(to)[i] = exl::float_to_half(value); break;
    case exl::Dtype::bfloat16: static_cast<uint16_t*>(to)[i] = exl::float_to_bfloat16(value); break;
    default: static_cast<float*>(to)[i] = value;
  }
}

// Half a unit in the last place of a number of this size, the smallest number of the dtype at least.
inline double rounding(exl::Dtype dtype, double size) {
  switch (dtype) {
    case exl::Dtype::float16: return std::fabs(size) * 0x1p-11 + 0x1p-25;
    case exl::Dtype::bfloat16: return std::fabs(size) * 0x1p-8 + 0x1p-133;
    default: return std::fabs(size) * 0x1p-24 + 0x1p-149;
  }
}

inline double activated(double x, exl::Activation activation) {
  switch (activation) {
    case exl::Activation::silu: return x / (1.0 + std::exp(-x));
    case exl::Activation::gelu: return 0.5 * x * std::erfc(-x * 0.7071067811865476);
    case exl::Activation::gelu_tanh:
      return 0.5 * x * (1.0 + std::tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)));
    default: return x > 0.0 ? x : 0.0;
  }
}

constexpr exl::Dtype kDtypes[] = {exl::Dtype::float32, exl::Dtype::float16, exl::Dtype::bfloat16};

// How the kernels are run.
struct Ways {
  bool threads_only;
  explicit Ways(int argc, char** argv) : threads_only(argc > 1 && std::strcmp(argv[1], "threads") == 0) {}

  // body(team) for each instruction set this CPU has: with a team of 4 threads, then alone.
  template <class Body>
  void each(const Body& body) const {
    const exl::Isa all[] = {exl::Isa::avx512, exl::Isa::avx2, exl::Isa::portable};
    for (const exl::Isa isa : all) {
      if (!exl::set_isa(isa)) continue;
      for (const int team : {4, 1}) {
        exl::set_threads(team);
        const std::string before = what();
        what() += std::string(", ") + exl::isa_name(isa) + ", " + std::to_string(team) + " threads";
        body(team);
        what() = before;
        if (threads_only) return;
      }
    }
  }
};

}  // namespace check
