// The runtime of the emulation: fibers, the scheduler, barriers, shared memory, cp.async. Never built with a sanitizer;
// see sanitizers.h. One launch at a time, on the calling thread.
#include "runtime.h"

#include <cstdio>

#if !defined(EXL_EMU_USES_UCONTEXT)
asm(".text\n.globl exl_emu_swap\n.hidden exl_emu_swap\n.type exl_emu_swap,@function\nexl_emu_swap:\n"
    "push %rbp\npush %rbx\npush %r12\npush %r13\npush %r14\npush %r15\n"
    "mov %rsp,(%rdi)\nmov %rsi,%rsp\n"
    "pop %r15\npop %r14\npop %r13\npop %r12\npop %rbx\npop %rbp\nret\n.size exl_emu_swap,.-exl_emu_swap\n");
#endif

namespace exl_emu {

Ctx* cur;
Config& config() { return g_config; }
Stats& stats() { return g_stats; }

void set_order(Order order, uint64_t seed) {
  g_config.order = order;
  g_config.seed = seed;
}

uint64_t launches() { return g_stats.launches; }

namespace {

uint64_t random_number() {
  g_random ^= g_random << 13;
  g_random ^= g_random >> 7;
  g_random ^= g_random << 17;
  return g_random * 0x2545F4914F6CDD1Dull >> 11;
}

}  // namespace

void suspend(Fiber* f) {  // fiber to scheduler
  if (asan()) __sanitizer_start_switch_fiber(&f->fake_stack, g_main_bottom, g_main_size);
  f->stack.leave();
  if (asan()) __sanitizer_finish_switch_fiber(f->fake_stack, &g_main_bottom, &g_main_size);
}

void release_block() {
  // not strict: threads that have exited count as arrived
  if (!g_waiting || g_waiting + (g_config.strict_exit ? 0 : g_done) != g_threads) return;
  g_waiting = 0;
  ++g_generation;
  g_count[g_generation & 1] = 0;
  for (unsigned j = 0; j < g_threads; ++j) {
    Fiber* f = g_block[g_config.order == Order::reverse ? g_threads - 1 - j : j];
    if (f->state == State::at_block) push(f);
  }
}

std::string where(const char* file, int line) {
  const char* slash = file ? std::strrchr(file, '/') : nullptr;
  return std::string(slash ? slash + 1 : file ? file : "") + ":" + std::to_string(line);
}

void yield_sometimes() {
  if (g_config.order == Order::random && (random_number() & 3) == 0) {
    push(me());
    suspend(me());
  }
}

namespace {

void resume(Fiber* f) {  // scheduler to fiber
  ++g_stats.switches;
  cur = f;
  if (tsan()) __tsan_switch_to_fiber(f->tsan_fiber, 1);
  if (asan()) __sanitizer_start_switch_fiber(&g_main_fake, f->stack.bottom(), f->stack.bytes());
  f->stack.enter();
  if (asan()) __sanitizer_finish_switch_fiber(g_main_fake, nullptr, nullptr);
  if (tsan()) __tsan_switch_to_fiber(g_main_tsan, 1);
}

void fiber_main() {
  if (asan()) __sanitizer_finish_switch_fiber(nullptr, &g_main_bottom, &g_main_size);
  for (;;) {
    acquire(&g_launch_sync);
    g_fn(g_arg);
    Fiber* f = me();
    if (g_config.strict_cp_async && !f->copies.empty()) {
      fail("", 0, "thread exits with cp.async copies never waited for");
    }
    release(&g_end_sync);
    f->state = State::done;
    ++g_done;
    {
      Quiet quiet;
      release_block();
    }
    suspend(f);
  }
}

void make_fiber(Fiber* f) {
  if (tsan() && !f->tsan_fiber) f->tsan_fiber = __tsan_create_fiber(0);
  f->stack.make(g_config.stack_bytes, fiber_main);
  if (asan()) __asan_unpoison_memory_region(f->stack.bottom(), f->stack.bytes());
  f->born = true;
}

std::string who(const Ctx* c) {
  char text[160];
  std::snprintf(text, sizeof text, "%.60s block(%u,%u,%u) thread(%u,%u,%u)", g_name, c->bid.x, c->bid.y, c->bid.z,
                c->tid.x, c->tid.y, c->tid.z);
  return text;
}

void describe_deadlock() {
  unsigned at_block = 0, at_warp = 0, done = 0;
  for (const Fiber* f : g_block) {
    at_block += f->state == State::at_block;
    at_warp += f->state == State::at_warp;
    done += f->state == State::done;
  }
  g_error = who(g_block[0]) + ": deadlock: " + std::to_string(at_block) + " at __syncthreads, " +
            std::to_string(at_warp) + " in a warp operation, " + std::to_string(done) + " exited";
  const Fiber* last = nullptr;
  int shown = 0;
  for (unsigned i = 0; i < g_threads && shown < 6; ++i) {
    const Fiber* f = g_block[i];
    if (f->state == State::done) continue;
    if (last && f->file == last->file && f->line == last->line && f->state == last->state) continue;
    g_error += "\n    thread " + std::to_string(i) +
               (f->state == State::at_block ? " waits at __syncthreads " : " waits for its warp at ") +
               where(f->file, f->line);
    last = f;
    ++shown;
  }
  g_failed = true;
}

void start_block(unsigned number, uint3 block_index, dim3 grid, dim3 block) {
  g_done = g_waiting = g_generation = 0;
  g_count[0] = g_count[1] = 0;
  g_queue.clear();
  g_head = 0;
  g_atomics.clear();
  g_meetings.assign((g_threads + 31) / 32, {});
  {
    Quiet quiet;
    g_dyn = g_dyn_bytes ? shared_alloc(128, g_dyn_bytes) : nullptr;
  }
  g_block.resize(g_threads);
  ++g_turn;
  const size_t set = tsan() ? number % g_config.race_sets : 0;  // nothing orders two blocks but atomics and fences
  for (unsigned i = 0; i < g_threads; ++i) {
    Fiber* f = g_block[i] = g_fibers[set * g_threads + i].get();
    if (!f->born) make_fiber(f);
    f->linear = int(i);
    f->lane = int(i & 31);
    f->warp = int(i >> 5);
    f->bid = block_index;
    f->bdim = block;
    f->gdim = grid;
    f->tid = {i % block.x, i / block.x % block.y, i / (block.x * block.y)};
    f->copies.clear();
    f->group = 0;
    f->fenced = false;
  }
  for (unsigned i = 0; i < g_threads; ++i) push(g_block[g_config.order == Order::reverse ? g_threads - 1 - i : i]);
}

void end_block() {
  g_stats.threads += g_threads;
  ++g_stats.blocks;
  if (g_dyn) g_slots.push_back({nullptr, g_dyn_bytes, g_dyn});
  for (Slot& s : g_slots) {
    if (!g_failed && !guards_are_whole(s)) {
      g_error = who(g_block[0]) + ": a thread wrote outside a shared array of " + std::to_string(s.bytes) + " bytes";
      g_failed = true;
    }
    if (tsan()) {
      g_graveyard.push_back(s.memory);
    } else {
      shared_free(s.memory);
    }
  }
  g_slots.clear();
}

void run_block(unsigned number, uint3 block_index, dim3 grid, dim3 block) {
  start_block(number, block_index, grid, block);
  while (!g_failed && g_done < g_threads) {
    if (g_head == g_queue.size()) {
      describe_deadlock();
      break;
    }
    if (g_config.order == Order::random) {
      std::swap(g_queue[g_head], g_queue[g_head + random_number() % (g_queue.size() - g_head)]);
    }
    Fiber* f = g_block[g_queue[g_head++]];
    if (g_head == g_queue.size()) {
      g_queue.clear();
      g_head = 0;
    }
    resume(f);
    if (!g_failed && f->state == State::done && g_config.strict_exit && g_waiting) {
      g_error = who(f) + ": thread exits while others wait at __syncthreads";
      g_failed = true;
    }
  }
  end_block();
}

void check_launch(const char* name, dim3 grid, dim3 block, size_t smem) {
  const auto refuse = [&](const char* why) { throw KernelError(std::string(name) + ": " + why); };
  const size_t threads = size_t(block.x) * block.y * block.z;
  if (!threads || threads > 1024 || block.z > 64) refuse("bad block size");
  if (!grid.x || !grid.y || !grid.z) refuse("bad grid size");
  if (grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) refuse("bad grid size");
  if (smem > g_config.smem_limit) refuse("too much dynamic shared memory");
}

}  // namespace

void fail(const char* file, int line, const std::string& message) {
  Quiet quiet;
  g_error = who(cur) + ": " + message + (line ? " (" + where(file, line) + ")" : "");
  g_failed = true;
  for (;;) suspend(me());
}

void launch_raw(const char* name, dim3 grid, dim3 block, size_t smem, Thunk fn, void* arg) {
  Quiet quiet;
  const std::lock_guard<std::mutex> one(g_one_launch);
  check_launch(name, grid, block, smem);
  g_threads = block.x * block.y * block.z;
  g_name = name;
  while (g_fibers.size() < size_t(g_threads) * (tsan() ? g_config.race_sets : 1)) g_fibers.emplace_back(new Fiber());
  g_fn = fn;
  g_arg = arg;
  g_failed = false;
  g_random = g_config.seed * 0x9E3779B97F4A7C15ull + 0x1234567;
  g_dyn_bytes = smem;
  ++g_stats.launches;
  if (tsan()) g_main_tsan = __tsan_get_current_fiber();
  release(&g_launch_sync);
  const size_t blocks = size_t(grid.x) * grid.y * grid.z;
  std::vector<size_t> order(blocks);
  for (size_t i = 0; i < blocks; ++i) order[i] = g_config.order == Order::reverse ? blocks - 1 - i : i;
  if (g_config.order == Order::random) {
    for (size_t i = blocks; i > 1; --i) std::swap(order[i - 1], order[random_number() % i]);
  }
  unsigned number = 0;
  for (size_t i : order) {
    const uint3 index = {unsigned(i % grid.x), unsigned(i / grid.x % grid.y), unsigned(i / (size_t(grid.x) * grid.y))};
    run_block(number++, index, grid, block);
    if (g_failed) break;
  }
  if (g_failed && tsan()) {
    for (Fiber* f : g_block) {
      __tsan_switch_to_fiber(f->tsan_fiber, 1);
      release(&g_end_sync);
      __tsan_switch_to_fiber(g_main_tsan, 1);
    }
  }
  acquire(&g_end_sync);
  for (void* p : g_graveyard) shared_free(p);
  g_graveyard.clear();
  cur = nullptr;
  if (!g_failed) return;
  for (auto& f : g_fibers) {  // abandoned in the middle: they start over next time
    if (f->born) make_fiber(f.get());
  }
  throw KernelError(g_error);
}

}  // namespace exl_emu
