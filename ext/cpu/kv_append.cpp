#include "kv_append.h"

#include <cstring>

#include "row_kernels.h"
#include "threads.h"

namespace exl {

int64_t bad_slot(const int64_t* slots, int64_t tokens, int64_t slot_count) {
  for (int64_t t = 0; t < tokens; ++t) {
    if (slots[t] < 0 || slots[t] >= slot_count) return t;
  }
  return -1;
}

void kv_append(const void* x, Dtype from_dtype, void* pages, Dtype to_dtype, const int64_t* slots, int64_t tokens,
               int64_t width, int64_t x_stride) {
  const RowKernels& kernels = row_kernels();
  const int64_t from_bytes = element_bytes(from_dtype), to_bytes = element_bytes(to_dtype);
  const auto body = [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const char* from = static_cast<const char*>(x) + t * x_stride * from_bytes;
      char* to = static_cast<char*>(pages) + slots[t] * width * to_bytes;
      if (from_dtype == to_dtype) {
        std::memcpy(to, from, size_t(width * to_bytes));
      } else {
        kernels.convert(from, from_dtype, to, to_dtype, width);
      }
    }
  };
  parallel_for(tokens, body, 1 + 32768 / (width + 1));
}

}  // namespace exl
