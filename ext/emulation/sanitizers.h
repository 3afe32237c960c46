// The entry points of AddressSanitizer and ThreadSanitizer that the runtime calls, as weak symbols: one runtime, never
// built with a sanitizer itself, serves programs with and without them.
#pragma once

#include <cstddef>

#define EXL_EMU_WEAK extern "C" __attribute__((weak))
EXL_EMU_WEAK void __sanitizer_start_switch_fiber(void**, const void*, size_t);
EXL_EMU_WEAK void __sanitizer_finish_switch_fiber(void*, const void**, size_t*);
EXL_EMU_WEAK void __asan_unpoison_memory_region(const volatile void*, size_t);
EXL_EMU_WEAK void* __asan_region_is_poisoned(void*, size_t);
EXL_EMU_WEAK void __asan_report_load_n(void*, size_t);
EXL_EMU_WEAK void __asan_report_store_n(void*, size_t);
EXL_EMU_WEAK void* __tsan_create_fiber(unsigned);
EXL_EMU_WEAK void __tsan_destroy_fiber(void*);
EXL_EMU_WEAK void* __tsan_get_current_fiber();
EXL_EMU_WEAK void __tsan_switch_to_fiber(void*, unsigned);
EXL_EMU_WEAK void __tsan_acquire(void*);
EXL_EMU_WEAK void __tsan_release(void*);
EXL_EMU_WEAK void __tsan_read_range(void*, size_t);
EXL_EMU_WEAK void __tsan_write_range(void*, size_t);
EXL_EMU_WEAK void AnnotateIgnoreReadsBegin(const char*, int);
EXL_EMU_WEAK void AnnotateIgnoreReadsEnd(const char*, int);

namespace exl_emu {
namespace {

inline bool asan() { return &__sanitizer_start_switch_fiber != nullptr; }
inline bool tsan() { return &__tsan_create_fiber != nullptr; }
inline void acquire(void* p) {
  if (tsan()) __tsan_acquire(p);
}
inline void release(void* p) {
  if (tsan()) __tsan_release(p);
}

// While one lives, ThreadSanitizer ignores what the runtime reads and writes (templates of the standard library are
// shared with instrumented code at link time), and memory obtained meanwhile starts with a clean history.
struct Quiet {
  Quiet() {
    if (tsan()) AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
  }
  ~Quiet() {
    if (tsan()) AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
  }
};

}  // namespace
}  // namespace exl_emu
