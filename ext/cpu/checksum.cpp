#include "checksum.h"

#include <cstring>

namespace exl {
namespace {

constexpr int kLanes = 8;

inline uint64_t step(uint64_t lane, uint64_t word) {
  lane = (lane ^ word) * 0x9e3779b97f4a7c15ull;
  return lane << 29 | lane >> 35;
}

inline void step_all(uint64_t* lanes, const uint8_t* from) {
  uint64_t words[kLanes];
  std::memcpy(words, from, sizeof(words));
  for (int i = 0; i < kLanes; ++i) lanes[i] = step(lanes[i], words[i]);
}

}  // namespace

uint64_t checksum_cpu(const uint8_t* bytes, int64_t count) {
  constexpr int64_t kStep = kLanes * 8;
  uint64_t lanes[kLanes];
  for (int i = 0; i < kLanes; ++i) lanes[i] = uint64_t(i) + 1;
  int64_t at = 0;
  for (; at + kStep <= count; at += kStep) step_all(lanes, bytes + at);
  if (at < count) {
    uint8_t last[kStep] = {};
    std::memcpy(last, bytes + at, size_t(count - at));
    step_all(lanes, last);
  }
  uint64_t result = 0;
  for (int i = 0; i < kLanes; ++i) result = step(result, lanes[i]);
  return step(result, uint64_t(count));
}

}  // namespace exl
