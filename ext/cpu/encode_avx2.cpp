// The quantizer's inner loops: AVX2 with FMA and F16C.
#include "encode_kernel.h"
#include "lanes_avx2.h"

namespace exl {
namespace {

struct Avx2 {
  using Part = Part256;
  static constexpr int registers = 2;
  static constexpr int block = 4;
};

constexpr EncodeIsa table = encode_isa<Avx2>();

}  // namespace

const EncodeIsa& encode_avx2() { return table; }

}  // namespace exl
