// What a launch plan has to know of the current device.
#pragma once

namespace exl {

// Streaming multiprocessors of the current device; 4 in the emulation, so that small tests split their work too.
int multiprocessors_cuda();

}  // namespace exl
