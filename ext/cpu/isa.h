// Which instruction set the CPU kernels use. No torch here.
//
// A kernel that pays for it has one file per instruction set; the suffix of the file name sets its compiler flags:
//
//   foo.cpp             baseline of the architecture: the public entry, the threading, the portable loop, the choice
//   foo_avx2.cpp        -mavx2 -mfma -mf16c
//   foo_avx512.cpp      -mavx512{f,bw,vl,dq} and the above
//   foo_avx512vnni.cpp  -mavx512vnni and the above
//   foo_avxvnni.cpp     -mavxvnni and those of AVX2; only where EXL_AVXVNNI is 1: GCC from 11, Clang from 12 on
//
// The suffixed files are left out on other architectures and with compilers that lack the flags; EXL_X86_ISA is 1
// exactly where they are part of the build (the build driver defines it). So a choice reads:
//
//   #if EXL_X86_ISA
//     if (isa() == Isa::avx512) return foo_avx512(...);
//     if (isa() == Isa::avx2) return foo_avx2(...);
//   #endif
//     return foo_portable(...);
//
// Suffixed files define plain functions on raw pointers. They must not instantiate shared `inline` functions or
// templates with external linkage (std::vector, std::sort, ...): the linker keeps one copy of those for the whole
// library, and it may be the one with the instructions this CPU lacks. Use anonymous namespaces, `static inline`, or
// plain arrays. tests/ext/test_isa.py looks for such symbols.
#pragma once

#ifndef EXL_X86_ISA
#define EXL_X86_ISA 0
#endif
#ifndef EXL_AVXVNNI
#define EXL_AVXVNNI 0
#endif

namespace exl {

enum class Isa : int { portable = 0, avx2 = 1, avx512 = 2 };

// The one in use: the best the CPU and the operating system support, unless set_isa lowered it.
Isa isa();

// True when the running CPU supports it and its files are part of this build.
bool isa_supported(Isa wanted);

// Tests and debugging. False, and no change, if the CPU does not support it.
bool set_isa(Isa wanted);

// An extension on top of Isa::avx2. False if isa() is portable.
bool use_avxvnni();

// Extensions on top of Isa::avx512. False whenever isa() is lower than avx512, so that set_isa covers them as well.
bool use_avx512vnni();
bool use_avx512bf16();

const char* isa_name(Isa which);  // "portable", "avx2", "avx512"

}  // namespace exl
