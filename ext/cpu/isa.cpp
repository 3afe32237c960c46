#include "isa.h"

#include <atomic>

#if EXL_X86_ISA
#include <cpuid.h>
#endif

namespace exl {
namespace {

constexpr int kUnset = -1;
std::atomic<int> active{kUnset};

Isa best() {
  if (isa_supported(Isa::avx512)) return Isa::avx512;
  return isa_supported(Isa::avx2) ? Isa::avx2 : Isa::portable;
}

}  // namespace

bool isa_supported(Isa wanted) {
  if (wanted == Isa::portable) return true;
#if EXL_X86_ISA
  // The compiler's run-time check also asks the operating system whether it saves the wide registers. Every CPU with
  // AVX2 and FMA has F16C, whose name older compilers do not take here.
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (wanted == Isa::avx2) return avx2;
  return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#else
  return false;
#endif
}

Isa isa() {
  int now = active.load(std::memory_order_relaxed);
  if (now == kUnset) {
    now = int(best());
    active.store(now, std::memory_order_relaxed);
  }
  return Isa(now);
}

bool set_isa(Isa wanted) {
  if (!isa_supported(wanted)) return false;
  active.store(int(wanted), std::memory_order_relaxed);
  return true;
}

bool use_avxvnni() {
#if EXL_X86_ISA && EXL_AVXVNNI
  static const bool supported = [] {  // leaf 7.1, EAX bit 4; not every compiler that has it knows its name
    unsigned a = 0, b = 0, c = 0, d = 0;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0 && (a >> 4 & 1u) != 0;
  }();
  return supported && isa() != Isa::portable;
#else
  return false;
#endif
}

bool use_avx512vnni() {
#if EXL_X86_ISA
  static const bool supported = __builtin_cpu_supports("avx512vnni");
  return supported && isa() == Isa::avx512;
#else
  return false;
#endif
}

bool use_avx512bf16() {
#if EXL_X86_ISA
  static const bool supported = __builtin_cpu_supports("avx512bf16");
  return supported && isa() == Isa::avx512;
#else
  return false;
#endif
}

const char* isa_name(Isa which) {
  switch (which) {
    case Isa::avx512: return "avx512";
    case Isa::avx2: return "avx2";
    default: return "portable";
  }
}

}  // namespace exl
