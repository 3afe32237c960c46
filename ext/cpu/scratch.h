// Working memory that outlives a call: grown by the caller of a kernel, never inside a parallel region.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

namespace exl {
namespace {  // internal linkage: see isa.h

// Uninitialised floats on a 64-byte boundary. One per thread and purpose (`static thread_local Scratch`).
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(data_); }

  // At least `count` floats, contents undefined. Throws std::bad_alloc.
  float* floats(int64_t count) {
    if (count > size_) {
      std::free(data_);
      data_ = nullptr;
      size_ = 0;
      const size_t bytes = (size_t(count) * sizeof(float) + 63) / 64 * 64;
      data_ = static_cast<float*>(std::aligned_alloc(64, bytes));
      if (data_ == nullptr) throw std::bad_alloc();
      size_ = count;
    }
    return data_;
  }

 private:
  float* data_ = nullptr;
  int64_t size_ = 0;
};

}  // namespace
}  // namespace exl
