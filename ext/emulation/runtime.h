// The state of the emulation's runtime, shared by its scheduler (cuda_host.cpp) and by what a running CUDA thread calls
// (cuda_sync.cpp). One launch at a time; all of it belongs to the thread that launches.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <new>
#include <vector>

#include "cuda_host.h"
#include "fibers.h"
#include "sanitizers.h"

namespace exl_emu {

enum class State : uint8_t { ready, at_block, at_warp, done };

struct Copy {  // of cp.async: issued, not yet waited for
  void* dst;
  int bytes, group;
  alignas(16) unsigned char data[16];
};

struct Fiber : Ctx {
  FiberStack stack;
  void* fake_stack = nullptr;   // AddressSanitizer's
  void* tsan_fiber = nullptr;
  bool born = false;
  State state = State::ready;
  const char* file = "";
  int line = 0;
  void* arg = nullptr;          // of the warp operation it waits in
  bool fenced = false;
  std::vector<Copy> copies;
  int group = 0;                // of the copies issued now
};

struct Slot {
  const void* key;
  size_t bytes;
  void* memory;
};

struct Meeting {
  unsigned mask, arrived;
  Kind kind;
  WarpFn exec;
  const char* file;
  int line;
};

constexpr size_t kPool = 4096;

inline Config g_config;
inline Stats g_stats;
inline std::mutex g_one_launch;
inline std::vector<std::unique_ptr<Fiber>> g_fibers;
inline std::vector<Fiber*> g_block;                   // by thread index
inline std::vector<int> g_queue;                      // runnable threads
inline size_t g_head;
inline unsigned g_turn;                               // counts blocks over all launches
inline std::vector<std::vector<Meeting>> g_meetings;  // per warp
inline std::vector<Slot> g_slots;                     // shared arrays of the running block
inline std::vector<void*> g_graveyard;                // those of earlier blocks, kept so that addresses are not reused
inline std::vector<const void*> g_atomics;
inline void* g_dyn;
inline size_t g_dyn_bytes;
inline void *g_main_tsan, *g_main_fake;
inline const void* g_main_bottom;
inline size_t g_main_size;
inline Thunk g_fn;
inline void* g_arg;
inline const char* g_name;
inline unsigned g_threads, g_done, g_waiting, g_generation;
inline int g_count[2];                                // predicates of __syncthreads_count, by generation
inline char g_launch_sync, g_end_sync;
// ThreadSanitizer hangs its sync objects on addresses. An address reused by the next block would order the two blocks
// and hide a missing fence, so neighbours in time never share one.
inline uint64_t g_sync[kPool][64];
inline bool g_failed;
inline std::string g_error;
inline uint64_t g_random;

inline Fiber* me() { return static_cast<Fiber*>(cur); }

// Shared memory: exactly `bytes` for AddressSanitizer, else between two guards that tell of a write outside.
constexpr size_t kGuard = 1024;
constexpr unsigned char kGuardByte = 0x5a, kRubbish = 0xff;  // rubbish is NaN as floating point

inline void* shared_alloc(size_t align, size_t bytes) {
  const size_t guard = asan() ? 0 : kGuard;
  void* p = nullptr;
  if (posix_memalign(&p, std::max(align, size_t(128)), bytes + 2 * guard)) throw std::bad_alloc();
  auto* start = static_cast<unsigned char*>(p);
  std::memset(start, kGuardByte, guard);
  std::memset(start + guard, kRubbish, bytes);
  std::memset(start + guard + bytes, kGuardByte, guard);
  return start + guard;
}

inline bool guards_are_whole(const Slot& slot) {
  if (asan()) return true;
  const auto* memory = static_cast<const unsigned char*>(slot.memory);
  for (size_t i = 1; i <= kGuard; ++i) {
    if (memory[-std::ptrdiff_t(i)] != kGuardByte || memory[slot.bytes + i - 1] != kGuardByte) return false;
  }
  return true;
}

inline void shared_free(void* memory) { std::free(static_cast<unsigned char*>(memory) - (asan() ? 0 : kGuard)); }

inline void push(Fiber* f) {
  f->state = State::ready;
  g_queue.push_back(f->linear);
}

void suspend(Fiber* f);   // fiber to scheduler
void release_block();     // let the threads at the barrier go on, if all have come
void yield_sometimes();   // random order only: let another thread run here
std::string where(const char* file, int line);

}  // namespace exl_emu
