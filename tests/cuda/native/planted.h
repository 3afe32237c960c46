// A small kernel with mistakes that can be switched on: what the emulation has to notice (test_planted.py).
#pragma once

#include <cstdint>

#include "../../../ext/cuda/stream.h"

// The mistake of the next launches. 0: none.
enum Bug : int {
  kNone = 0,
  kNoBarrierAfterStaging = 1,
  kNoWaitForCopies = 2,
  kWrongHalfOfK = 3,
  kRingIndexOffByOne = 4,
  kOneTileTooMany = 5,
  kNoSyncwarpAroundRing = 6,
  kNoBarrierBeforeReduction = 7,
  kBarrierInBranch = 8,
  kScaleOfNeighbour = 9,
  kWarpReturnsEarly = 10,
  kNoFenceBeforeTicket = 11,
  kNoTailGuard = 12,
  kOneGroupTooFew = 14,
  kNoRowGuard = 15,
  kNoBarrierBeforeTicket = 16,
  kNoFenceAfterTicket = 17,
  kTicketNotPutBack = 18,
  kTooLittleSharedMemory = 19,
};
extern int planted_bug;

// y (m, n) half = x (m, k) half times 4-bit weights, m <= 8; k a multiple of 64.
//   weights  [ceil(n/32)][k/32][32 lanes] of 16 bytes, nibbles in the order of mma fragments
//   scale    [ceil(n/32)][k/64][32] half     zero  the same, bytes
//   part     [ceil(n/32)][splits][32][8] float, workspace      ticket  [ceil(n/32)] int, zero before and after
void planted_matmul(const void* weights, const uint16_t* scale, const uint8_t* zero, const uint16_t* x, float* part,
                    int* ticket, uint16_t* y, int m, int k, int n, int splits, cudaStream_t stream);
