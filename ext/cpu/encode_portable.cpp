// The quantizer's inner loops: plain C++.
#include "encode_kernel.h"
#include "lanes_portable.h"

namespace exl {
namespace {

struct Portable {
  using Part = Part128;
  static constexpr int registers = 2;
  static constexpr int block = 4;
};

constexpr EncodeIsa table = encode_isa<Portable>();

}  // namespace

const EncodeIsa& encode_portable() { return table; }

}  // namespace exl
