#include "ahead.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>

#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

namespace exl {
namespace {

std::atomic<unsigned> forks{0};  // of this process: threads of before do not exist any more

void count_fork() { forks.fetch_add(1); }

}  // namespace

// What the thread uses; it is the thread's to destroy once its owner has left.
struct AheadThread::Shared {
  enum class State { idle, wanted, ended };

  AheadWork* work;
  unsigned born = forks.load();
  std::mutex mutex;
  std::condition_variable wake, over;
  State state = State::idle;
  bool taking = false;  // the owner waits in take()
  bool left = false;    // the owner is gone
  std::atomic<bool> stop{false};

  void drive() {
    {
      std::unique_lock<std::mutex> hold(mutex);
      for (;;) {
        wake.wait(hold, [this] { return state == State::wanted || left; });
        if (left) break;
        hold.unlock();
        work->run(stop);
        hold.lock();
        state = State::ended;
        if (taking) {
          go_on();
          taking = false;
        }
        over.notify_one();
      }
    }
    delete this;
  }

  // With the mutex held: the result is handed over.
  void go_on() { state = work->next() ? State::wanted : State::idle; }
};

AheadThread::~AheadThread() {
  if (shared_ == nullptr || shared_->born != forks.load()) return;  // of another process: its lock may be held for ever
  halt();
  const std::lock_guard<std::mutex> hold(shared_->mutex);
  shared_->left = true;
  shared_->wake.notify_one();
}

bool AheadThread::pending() const {
  if (shared_ == nullptr || shared_->born != forks.load()) return false;
  const std::lock_guard<std::mutex> hold(shared_->mutex);
  return shared_->state != Shared::State::idle;
}

bool AheadThread::open() {
  if (shared_ != nullptr && shared_->born == forks.load()) return true;
  static const int registered = pthread_atfork(nullptr, nullptr, &count_fork);
  (void)registered;
  shared_ = nullptr;  // that of the parent is left as it is
  Shared* fresh = new Shared;
  fresh->work = work_;
  sigset_t all, before;  // signals belong to the main thread
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  try {
    std::thread([fresh] {
#if defined(__linux__)
      pthread_setname_np(pthread_self(), "exl-ahead");
#endif
      fresh->drive();
    }).detach();
    shared_ = fresh;
  } catch (const std::system_error&) {
    delete fresh;
  }
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  return shared_ != nullptr;
}

bool AheadThread::start() {
  if (!open()) return false;
  const std::lock_guard<std::mutex> hold(shared_->mutex);
  shared_->state = Shared::State::wanted;
  shared_->wake.notify_one();
  return true;
}

void AheadThread::take() {
  std::unique_lock<std::mutex> hold(shared_->mutex);
  if (shared_->state == Shared::State::ended) {
    shared_->go_on();
    if (shared_->state == Shared::State::wanted) shared_->wake.notify_one();
    return;
  }
  shared_->taking = true;
  shared_->over.wait(hold, [this] { return !shared_->taking; });
}

int usable_cpus() {
#if defined(__linux__)
  cpu_set_t allowed;
  CPU_ZERO(&allowed);
  if (sched_getaffinity(0, sizeof allowed, &allowed) == 0) return CPU_COUNT(&allowed);
#endif
  return int(std::thread::hardware_concurrency());
}

void AheadThread::halt() {
  if (!pending()) return;
  std::unique_lock<std::mutex> hold(shared_->mutex);
  shared_->stop.store(true);
  shared_->over.wait(hold, [this] { return shared_->state == Shared::State::ended; });
  shared_->stop.store(false);
  shared_->state = Shared::State::idle;
}

}  // namespace exl
