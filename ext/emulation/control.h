// The emulation's switches, for code that must not see the CUDA names of cuda_host.h.
#pragma once

#include <cstdint>

namespace exl_emu {

// In which order the threads of a block, and the blocks, get to run.
enum class Order : int { forward = 0, reverse = 1, random = 2 };

// For the launches that follow; `seed` is for Order::random.
void set_order(Order order, uint64_t seed);

// Launches so far.
uint64_t launches();

}  // namespace exl_emu
