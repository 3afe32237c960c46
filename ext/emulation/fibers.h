// Stackful fibers: a few lines of assembly on x86-64, ucontext elsewhere (its switches take fifteen times as long).
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <new>

#if !defined(__x86_64__) || defined(EXL_EMU_UCONTEXT)
#include <ucontext.h>
#define EXL_EMU_USES_UCONTEXT 1
#endif

namespace exl_emu {

#if !defined(EXL_EMU_USES_UCONTEXT)
// Keeps the callee-saved registers on the running stack, its pointer in *save_sp, and goes on at load_sp.
extern "C" __attribute__((visibility("hidden"))) void exl_emu_swap(void** save_sp, void* load_sp);
#endif

// One stack with a guard page below it. `enter` and `leave` switch between it and the scheduler's own stack.
class FiberStack {
 public:
  // (Re)start: the next `enter` runs `entry` from its beginning; `entry` must never return.
  void make(size_t bytes, void (*entry)()) {
    if (!bottom_) map(bytes);
#if defined(EXL_EMU_USES_UCONTEXT)
    getcontext(&context_);
    context_.uc_stack.ss_sp = bottom_;
    context_.uc_stack.ss_size = bytes_;
    context_.uc_link = nullptr;
    makecontext(&context_, entry, 0);
#else
    auto* top = reinterpret_cast<void**>(bottom_ + bytes_);
    *--top = nullptr;
    *--top = reinterpret_cast<void*>(entry);  // at entry the stack pointer is 8 modulo 16, as after a call
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    sp_ = top;
#endif
  }

#if defined(EXL_EMU_USES_UCONTEXT)
  void enter() { swapcontext(&scheduler(), &context_); }
  void leave() { swapcontext(&context_, &scheduler()); }
#else
  void enter() { exl_emu_swap(&scheduler(), sp_); }
  void leave() { exl_emu_swap(&sp_, scheduler()); }
#endif

  void* bottom() const { return bottom_; }
  size_t bytes() const { return bytes_; }

 private:
  void map(size_t bytes) {
    constexpr size_t kPage = 4096;
    bytes_ = (bytes + kPage - 1) / kPage * kPage;
    void* m = mmap(nullptr, bytes_ + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (m == MAP_FAILED) throw std::bad_alloc();
    mprotect(m, kPage, PROT_NONE);
    bottom_ = static_cast<unsigned char*>(m) + kPage;
  }

  unsigned char* bottom_ = nullptr;
  size_t bytes_ = 0;
#if defined(EXL_EMU_USES_UCONTEXT)
  ucontext_t context_;
  static ucontext_t& scheduler() {
    static ucontext_t context;
    return context;
  }
#else
  void* sp_ = nullptr;
  static void*& scheduler() {
    static void* sp = nullptr;
    return sp;
  }
#endif
};

}  // namespace exl_emu
