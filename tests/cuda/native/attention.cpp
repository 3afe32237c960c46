// The attention kernels over cases that wrap the rings, cross chunks and end in tails, against double.
// kernels: attention_decode.cu attention_decode_floats.cu attention_decode_codes.cu attention_prefill.cu attention_prefill_floats.cu attention_prefill_codes.cu
#include "attention_case.h"

using exl::PageKind;

constexpr int all = INT32_MAX;
const std::vector<Case> cases = {
    {"one token", {{1, 1}}, 4, 2, 64, PageKind::float16, 0, 0, 16, all, 0},
    {"decode", {{1, 300}, {1, 5}, {0, 9}, {1, 129}}, 4, 2, 64, PageKind::float16, 0, 0, 256, all, 0},
    {"several rows", {{3, 257}, {2, 2}}, 6, 2, 32, PageKind::bfloat16, 0, 0, 32, all, 0},
    {"window", {{2, 700}, {1, 90}}, 2, 1, 80, PageKind::float16, 0, 0, 16, 150, 0},
    {"softcap", {{1, 200}}, 2, 2, 96, PageKind::bfloat16, 0, 0, 64, all, 20.0f},
    {"large heads", {{1, 140}}, 3, 1, 256, PageKind::float16, 0, 0, 256, all, 0},
    {"4 bits", {{1, 300}, {1, 16}}, 4, 2, 128, PageKind::codes, 4, 4, 256, all, 0},
    {"8 and 3 bits", {{2, 280}}, 6, 2, 64, PageKind::codes, 8, 3, 16, all, 0},
    {"5 and 7 bits, small heads", {{1, 290}}, 2, 2, 32, PageKind::codes, 5, 7, 32, 260, 0},
    {"6 and 2 bits, odd groups", {{1, 140}}, 4, 1, 80, PageKind::codes, 6, 2, 16, all, 30.0f},
    {"3 bits, large heads", {{1, 130}}, 2, 1, 256, PageKind::codes, 3, 8, 16, all, 0},
    {"prefill", {{70, 200}, {17, 17}, {1, 40}}, 4, 2, 64, PageKind::float16, 0, 0, 16, all, 0},
    {"prefill, window", {{60, 170}}, 3, 1, 96, PageKind::bfloat16, 0, 0, 32, 50, 0},
    {"prefill, large heads", {{20, 50}}, 2, 1, 256, PageKind::float16, 0, 0, 16, all, 15.0f},
    {"prefill, codes", {{40, 130}, {20, 20}}, 4, 2, 64, PageKind::codes, 4, 8, 16, all, 0},
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
