// The attention kernels over cases that wrap the rings, cross chunks and end in tails, against double.
// The kernels are compiled here, for two sizes of heads: rows of codes of an odd length, and queries that are not held.
// kernels:
#define EXL_ATTENTION_DIMS(one) one(80) one(256)
#include "../../../ext/cuda/attention_decode.cu"
#include "../../../ext/cuda/attention_decode_codes.cu"
#include "../../../ext/cuda/attention_decode_floats.cu"
#include "../../../ext/cuda/attention_prefill.cu"
#include "../../../ext/cuda/attention_prefill_codes.cu"
#include "../../../ext/cuda/attention_prefill_floats.cu"
#include "attention_case.h"

using exl::PageKind;

constexpr int all = INT32_MAX;
const std::vector<Case> cases = {
    {"one token", {{1, 1}}, 4, 2, 80, PageKind::float16, 0, 0, 16, all, 0},
    {"decode", {{1, 300}, {1, 5}, {0, 9}, {1, 129}}, 4, 2, 80, PageKind::float16, 0, 0, 256, all, 0},
    {"several rows", {{3, 257}, {2, 2}}, 6, 2, 80, PageKind::bfloat16, 0, 0, 32, all, 0},
    {"window", {{2, 700}, {1, 90}}, 2, 1, 80, PageKind::float16, 0, 0, 16, 150, 0},
    {"large heads", {{1, 140}}, 3, 1, 256, PageKind::bfloat16, 0, 0, 256, all, 20.0f},
    {"4 bits", {{1, 300}, {1, 16}}, 4, 2, 256, PageKind::codes, 4, 4, 256, all, 0},
    {"8 and 3 bits", {{2, 280}}, 6, 2, 80, PageKind::codes, 8, 3, 16, all, 0},
    {"5 and 7 bits", {{1, 290}}, 2, 2, 80, PageKind::codes, 5, 7, 32, 260, 0},
    {"6 and 2 bits", {{1, 140}}, 4, 1, 80, PageKind::codes, 6, 2, 16, all, 30.0f},
    {"prefill", {{70, 200}, {17, 17}, {1, 40}}, 4, 2, 80, PageKind::float16, 0, 0, 16, all, 0},
    {"prefill, window", {{60, 170}}, 3, 1, 80, PageKind::bfloat16, 0, 0, 32, 50, 0},
    {"prefill, large heads", {{20, 50}}, 2, 1, 256, PageKind::float16, 0, 0, 16, all, 15.0f},
    {"prefill, codes", {{40, 130}, {20, 20}}, 4, 2, 256, PageKind::codes, 4, 8, 16, all, 0},
    {"prefill, odd codes", {{33, 90}}, 2, 1, 80, PageKind::codes, 7, 5, 16, 64, 0},
};

int main(int argc, char** argv) {
  const std::string only = argc > 2 ? argv[2] : "";  // part of a case's name
  return check::every_order(argc, argv, [&] {
    std::string bytes;
    for (const Case& c : cases) {
      if (std::string(c.name).find(only) == std::string::npos) continue;
      bytes += Batch(c).check([](const exl::CudaAttention& a) {
        exl::attention_decode_cuda(a, nullptr);
        exl::attention_prefill_cuda(a, nullptr);
      });
    }
    return bytes;
  });
}
