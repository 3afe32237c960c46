// The quantizer's inner loops: AVX-512.
#include "encode_kernel.h"
#include "lanes_avx512.h"

namespace exl {
namespace {

struct Avx512 {
  using Part = Part512;
  static constexpr int registers = 2;
  static constexpr int block = 8;
};

constexpr EncodeIsa table = encode_isa<Avx512>();

}  // namespace

const EncodeIsa& encode_avx512() { return table; }

}  // namespace exl
