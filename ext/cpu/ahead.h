// A thread that computes results one ahead of their owner, who does something else between asking for two of them.
// No torch here.
//
//   start()   run() begins on the thread
//   take()    its result: waits for the end of run(). By then next() has handed it over and said whether there is another
//             to compute. Where the owner waits, the thread goes on by itself: nothing lies between two results
//   halt()    run() is told to stop; back when it has ended. Nothing of it is handed over
//
// Rules
//   - One owner at a time: start, take, halt and the destructor are never called at once, nor by the work itself.
//   - next() runs on either thread, never beside run().
//   - Neither throws.
//   - After take() no more than one run() follows until the next call: who loses interest costs that much at most.
//   - The thread starts with the first start() and sleeps while there is nothing to do. It has all signals blocked, and
//     calls parallel regions like any caller (threads.h). In a child after fork() nothing is pending, and start() makes
//     a thread of its own.
//
// Test: tests/native_checks/ahead.cpp
#pragma once

#include <atomic>

namespace exl {

// CPUs that this process may use.
int usable_cpus();

class AheadWork {
 public:
  // On the thread. Ends early, the sooner the better, once `stop` is true.
  virtual void run(const std::atomic<bool>& stop) = 0;

  // What run() computed goes to where the owner reads it after take(). True: run() is to be called again.
  virtual bool next() = 0;

 protected:
  ~AheadWork() = default;
};

class AheadThread {
 public:
  explicit AheadThread(AheadWork& work) : work_(&work) {}
  ~AheadThread();  // halts
  AheadThread(const AheadThread&) = delete;
  AheadThread& operator=(const AheadThread&) = delete;

  // False, and nothing happens, if the system has no thread to give. Only while nothing is pending.
  bool start();

  // Whether there is a result to take or to halt.
  bool pending() const;

  // Only while one is pending.
  void take();

  void halt();

 private:
  struct Shared;
  bool open();

  AheadWork* work_;
  Shared* shared_ = nullptr;
};

}  // namespace exl
