#include "kv_append.h"

#include <cstring>

#include "../common/kv_rows.h"
#include "row_kernels.h"
#include "scratch.h"
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

void kv_append_codes(const void* x, Dtype from_dtype, uint8_t* pages, int bits, const int64_t* slots, int64_t tokens,
                     int64_t kv_heads, int64_t head_dim, int64_t x_stride) {
  const RowKernels& kernels = row_kernels();
  const int64_t from_bytes = element_bytes(from_dtype), row = kv_row_bytes(head_dim, bits), heads = tokens * kv_heads;
  static thread_local Scratch memory;
  float* wide = memory.floats(heads * head_dim);
  const auto body = [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const int64_t t = n / kv_heads, head = n % kv_heads;
      const char* from = static_cast<const char*>(x) + (t * x_stride + head * head_dim) * from_bytes;
      kernels.convert(from, from_dtype, wide + n * head_dim, Dtype::float32, head_dim);
      kernels.quantize(wide + n * head_dim, head_dim, bits, pages + (slots[t] * kv_heads + head) * row);
    }
  };
  parallel_for(heads, body, 1 + 4096 / head_dim);
}

}  // namespace exl
