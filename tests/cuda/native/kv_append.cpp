// Rotating and storing: every width of codes and odd sizes of heads, in buffers of the exact size. test_kv_append.py
// compares all values with the reference; here is an independent check that codes stand for what was stored.
// kernels: kv_append.cu
#include "../../../ext/cuda/kv_append.h"

#include "../../../ext/common/kv_rows.h"
#include "check.h"

namespace {

int code_at(const uint8_t* step, int bits, int j) {
  int code = 0;
  for (int width = 8; width > 0; width /= 2) {
    if ((bits & width) == 0) continue;
    const int at = exl::kv_code_bit(width, j);
    code = code << width | (step[at / 8] >> at % 8 & ((1 << width) - 1));
    step += 2 * width;
  }
  return code;
}

std::string append(int head_dim, int bits) {
  const int tokens = 3, kv_heads = 2, slots = 5, stride = kv_heads * head_dim + 3;
  std::mt19937 random{unsigned(head_dim + bits)};
  std::normal_distribution<float> normal;
  check::Buffer<float> x(size_t(tokens) * size_t(stride)), q(size_t(tokens) * size_t(head_dim));
  for (size_t i = 0; i < x.size(); ++i) x[i] = normal(random);
  for (size_t i = 0; i < q.size(); ++i) q[i] = normal(random);
  const size_t half = size_t(head_dim / 4), row = size_t(exl::kv_row_bytes(head_dim, bits));
  check::Buffer<float> cos(std::vector<float>(size_t(tokens) * half, 0.6f)), sin(std::vector<float>(cos.size(), 0.8f));
  check::Buffer<uint8_t> keys(size_t(slots * kv_heads) * row), values(keys.size());
  check::Buffer<int64_t> slot(std::vector<int64_t>{4, -1, 0});
  exl::KvAppend a{};
  a.q = q.data(), a.k = x.data(), a.v = x.data();
  a.q_stride = head_dim, a.k_stride = a.v_stride = stride;
  a.tokens = tokens, a.heads = 1, a.kv_heads = kv_heads, a.head_dim = head_dim, a.rotary_dim = int(2 * half);
  a.cos = cos.data(), a.sin = sin.data();
  a.k_pages = keys.data(), a.v_pages = values.data(), a.key_bits = a.value_bits = bits;
  a.slots = slot.data(), a.slot_count = slots;
  exl::kv_append_cuda(a, nullptr);
  const double middle = 1 << (bits - 1);
  for (int t : {0, 2}) {
    for (int h = 0; h < kv_heads; ++h) {
      const uint8_t* held = values.data() + size_t(slot[size_t(t)] * kv_heads + h) * row;
      double kept = 0, given = 0;  // the rotation keeps the length of a head
      for (int d = 0; d < head_dim; ++d) {
        uint16_t scale;
        std::memcpy(&scale, held + d / 32 * 2, 2);
        const int code = code_at(held + 2 * exl::kv_groups(head_dim) + d / 16 * 2 * bits, bits, d % 16);
        const double v = (code - middle + 0.5) * double(exl::half_to_float(scale)) / middle;
        const double from = x[size_t(t * stride + h * head_dim + d)];
        kept += v * v, given += from * from;
      }
      check::near(std::sqrt(kept / given), 1.0, 1.0 / middle, "length of a head", t);
    }
  }
  std::string bytes;
  q.append_to(bytes), keys.append_to(bytes), values.append_to(bytes);
  return bytes;
}

}  // namespace

int main(int argc, char** argv) {
  return check::every_order(argc, argv, [] {
    std::string bytes;
    for (int head_dim : {20, 64, 80}) {
      for (int bits = 2; bits <= 8; ++bits) bytes += append(head_dim, bits);
    }
    return bytes;
  });
}
