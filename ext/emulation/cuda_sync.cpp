// What a running CUDA thread calls: shared memory, barriers, meetings of a warp, fences, cp.async (see cuda_host.h).
#include "runtime.h"

namespace exl_emu {

void* shared_slot(const void* key, size_t bytes, size_t align, const char* file, int line) {
  Quiet quiet;
  size_t total = g_dyn_bytes + bytes;
  for (Slot& s : g_slots) {
    if (s.key == key) return s.memory;
    total += s.bytes;
  }
  if (total > g_config.smem_limit) fail(file, line, "too much shared memory");
  void* memory = shared_alloc(align, bytes);
  g_slots.push_back({key, bytes, memory});
  return memory;
}

void* dyn_smem() { return g_dyn; }

int sync_block(bool predicate, const char* file, int line) {
  Quiet quiet;
  Fiber* f = me();
  f->file = file;
  f->line = line;
  f->state = State::at_block;
  if (g_waiting) {  // all threads must stand at the same barrier
    for (const Fiber* other : g_block) {
      if (other == f || other->state != State::at_block) continue;
      if (other->line != line || std::strcmp(other->file, file)) {
        fail(file, line, "divergent __syncthreads: thread " + std::to_string(other->linear) + " is at " +
                             where(other->file, other->line));
      }
      break;
    }
  }
  if (g_config.strict_exit && g_done) {
    fail(file, line, "__syncthreads after " + std::to_string(g_done) + " threads of the block exited");
  }
  const unsigned generation = g_generation;
  void* order = &g_sync[g_turn % kPool][generation & 1];
  release(order);
  g_count[generation & 1] += predicate;
  ++g_waiting;
  release_block();
  suspend(f);
  acquire(order);
  return g_count[generation & 1];
}

void warp_op(Kind kind, unsigned mask, void* arg, WarpFn exec, const char* file, int line) {
  Quiet quiet;
  Fiber* f = me();
  ++g_stats.warp_ops;
  const unsigned base = unsigned(f->warp) * 32, lanes = std::min(32u, g_threads - base);
  const unsigned full = lanes == 32 ? ~0u : (1u << lanes) - 1;
  if (!(mask >> f->lane & 1)) fail(file, line, "warp operation: the calling lane is not in its mask");
  mask &= full;
  if (full != ~0u && (kind == Kind::mma || kind == Kind::ldmatrix)) {
    fail(file, line, "mma or ldmatrix in a partial warp");
  }
  for (unsigned i = 0; i < lanes; ++i) {
    if ((mask >> i & 1) && g_block[base + i]->state == State::done) {
      fail(file, line, "warp operation: lane " + std::to_string(i) + " in the mask has exited");
    }
  }
  auto& meetings = g_meetings[size_t(f->warp)];
  size_t which = meetings.size();
  for (size_t i = 0; i < meetings.size(); ++i) {
    if (meetings[i].mask == mask) {
      which = i;
    } else if (meetings[i].mask & mask) {
      fail(file, line, "warp operation: overlapping masks, other lanes are at " +
                           where(meetings[i].file, meetings[i].line));
    }
  }
  if (which == meetings.size()) meetings.push_back({mask, 0, kind, exec, file, line});
  Meeting& meeting = meetings[which];
  if (meeting.kind != kind || meeting.line != line || std::strcmp(meeting.file, file)) {
    fail(file, line, "divergent warp operation: other lanes are at " + where(meeting.file, meeting.line));
  }
  f->file = file;
  f->line = line;
  f->arg = arg;
  f->state = State::at_warp;
  meeting.arrived |= 1u << f->lane;
  void* order = nullptr;
  if (kind == Kind::sync) {  // the others exchange registers and order no memory
    order = &g_sync[g_turn % kPool][2 + f->warp];
    release(order);
  }
  if (meeting.arrived == mask) {
    meetings.erase(meetings.begin() + std::ptrdiff_t(which));
    void* args[32];
    for (unsigned i = 0; i < 32; ++i) args[i] = mask >> i & 1 ? g_block[base + i]->arg : nullptr;
    if (exec) exec(args, mask);
    for (unsigned i = 0; i < lanes; ++i) {
      const unsigned lane = g_config.order == Order::reverse ? lanes - 1 - i : i;
      if (mask >> lane & 1) push(g_block[base + lane]);
    }
  }
  suspend(f);
  if (order) acquire(order);
}

// ThreadSanitizer: an atomic publishes what its thread did before its last fence, and a fence takes in what the atomics
// before it have seen.
void fence() {
  Quiet quiet;
  for (const void* a : g_atomics) acquire(const_cast<void*>(a));
  me()->fenced = true;
  yield_sometimes();
}

void note_atomic(const void* address) {
  Quiet quiet;
  yield_sometimes();
  if (!tsan()) return;
  if (me()->fenced) release(const_cast<void*>(address));
  if (std::find(g_atomics.begin(), g_atomics.end(), address) == g_atomics.end()) g_atomics.push_back(address);
}

void cp_async(void* dst, const void* src, int bytes, int src_bytes, const char* file, int line) {
  Fiber* f = me();
  const bool reads = src_bytes > 0;
  if (src_bytes < 0 || src_bytes > bytes) fail(file, line, "cp.async: more bytes to read than to write");
  if ((uintptr_t(dst) | (reads ? uintptr_t(src) : 0)) & uintptr_t(bytes - 1)) {
    fail(file, line, "cp.async: address not aligned to its size");
  }
  if (asan()) {
    void* from = const_cast<void*>(src);
    if (reads && __asan_region_is_poisoned(from, size_t(src_bytes))) __asan_report_load_n(from, size_t(src_bytes));
    if (__asan_region_is_poisoned(dst, size_t(bytes))) __asan_report_store_n(dst, size_t(bytes));
  }
  if (tsan()) {
    if (reads) __tsan_read_range(const_cast<void*>(src), size_t(src_bytes));
    __tsan_write_range(dst, size_t(bytes));
  }
  Quiet quiet;
  Copy copy = {dst, bytes, f->group, {}};
  if (reads) std::memcpy(copy.data, src, size_t(src_bytes));
  std::memset(dst, 0xff, size_t(bytes));  // until it is waited for, the destination holds rubbish
  f->copies.push_back(copy);
  yield_sometimes();
}

void cp_commit() { ++me()->group; }

void cp_wait(int newest_left) {
  Fiber* f = me();
  size_t finished = 0;
  while (finished < f->copies.size() && f->copies[finished].group < f->group - newest_left) {
    Copy& copy = f->copies[finished++];
    if (tsan()) __tsan_write_range(copy.dst, size_t(copy.bytes));
    Quiet quiet;
    std::memcpy(copy.dst, copy.data, size_t(copy.bytes));
  }
  Quiet quiet;
  f->copies.erase(f->copies.begin(), f->copies.begin() + std::ptrdiff_t(finished));
}

}  // namespace exl_emu
