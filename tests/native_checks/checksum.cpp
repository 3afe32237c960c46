// The checksum of packed models, cpu/checksum.h: its definition, bytes read where they are, none behind them.
#include "cpu/checksum.h"

#include "check.h"

using check::Buffer;
using check::Random;

namespace {

uint64_t step(uint64_t lane, uint64_t word) {
  const uint64_t mixed = (lane ^ word) * 0x9e3779b97f4a7c15ull;
  return mixed << 29 | mixed >> 35;
}

uint64_t defined(const uint8_t* bytes, int64_t count) {
  uint64_t lanes[8] = {1, 2, 3, 4, 5, 6, 7, 8};
  for (int64_t at = 0; at < (count + 63) / 64 * 64; at += 8) {
    uint64_t word = 0;
    for (int64_t i = 7; i >= 0; --i) word = word << 8 | (at + i < count ? bytes[at + i] : 0);
    lanes[at / 8 % 8] = step(lanes[at / 8 % 8], word);
  }
  uint64_t result = 0;
  for (uint64_t lane : lanes) result = step(result, lane);
  return step(result, uint64_t(count));
}

}  // namespace

int main(int, char**) {
  Random random(5);
  for (int64_t count = 0; count < 300; ++count) {
    check::begin("checksum of " + std::to_string(count) + " bytes");
    Buffer<uint8_t> bytes(count);  // ends at a guard page, so it begins at any address
    for (uint8_t& byte : bytes) byte = uint8_t(random.next());
    const uint64_t wanted = defined(bytes.data(), count);
    EXPECT(exl::checksum_cpu(bytes.data(), count) == wanted);
    if (count == 0) continue;
    bytes[random.below(count)] ^= uint8_t(1 << random.below(8));
    EXPECT(exl::checksum_cpu(bytes.data(), count) != wanted);
  }
  return 0;
}
