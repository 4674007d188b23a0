// A small pool of threads that share out tasks one by one.
//
// A step is some hundred short phases, each as long as its slowest task. A thread that the system has put aside
// holds up nobody unless it is in the middle of a task, for the others take what it would have taken; with fixed
// shares and a spinning barrier, one busy neighbour process makes every phase wait for a time slice.
// Idle threads spin for a few dozen microseconds, the time between two phases, and sleep after that.
// A thread that finds itself on the core of the one that hands out the tasks moves away: systems put a thread that is
// woken onto its waker's core and may leave the two there for seconds, taking turns, with another core idle.
#pragma once

#include <pthread.h>
#include <sched.h>

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>

namespace dijiang {

constexpr int kMaxThreads = 64;
constexpr int64_t kMaxTasks = 0xffff;
constexpr int kPhasesBetweenMoves = 256;  // about a step: where all cores are busy, moving more often is of no use

static inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

static inline int current_core() {
#if defined(__linux__)
  return sched_getcpu();
#else
  return -1;
#endif
}

// Makes this thread go on elsewhere, if it may; it may come back later.
static inline void leave_core(int core) {
#if defined(__linux__)
  cpu_set_t allowed;
  if (sched_getaffinity(0, sizeof(allowed), &allowed) != 0 || CPU_COUNT(&allowed) < 2) return;
  cpu_set_t others = allowed;
  CPU_CLR(core, &others);
  if (sched_setaffinity(0, sizeof(others), &others) == 0) sched_setaffinity(0, sizeof(allowed), &allowed);
#else
  (void)core;
#endif
}

class Pool {
 public:
  // Never destroyed: its threads live as long as the process.
  static Pool& instance() {
    static Pool* pool = new Pool();
    return *pool;
  }

  // Held while a step runs; steps of different models take turns.
  std::mutex& turn() { return turn_; }

  // Calls task(index, thread) for index 0 ... num_tasks - 1, thread < num_threads; returns when all are done.
  template <class Task>
  void run(int64_t num_tasks, int num_threads, const Task& task) {
    if (num_threads <= 1 || num_tasks <= 1) {
      for (int64_t index = 0; index < num_tasks; ++index) task(index, 0);
      return;
    }
    for (int64_t first = 0; first < num_tasks; first += kMaxTasks) {
      auto shifted = [&](int64_t index, int thread) { task(first + index, thread); };
      int64_t count = num_tasks - first < kMaxTasks ? num_tasks - first : kMaxTasks;
      share(count, num_threads, &call<decltype(shifted)>, &shifted);
    }
  }

 private:
  using Call = void (*)(const void*, int64_t, int);

  Pool() { pthread_atfork(nullptr, nullptr, [] { instance().abandon(); }); }

  template <class Task>
  static void call(const void* task, int64_t index, int thread) {
    (*static_cast<const Task*>(task))(index, thread);
  }

  void share(int64_t num_tasks, int num_threads, Call call, const void* task) {
    grow(num_threads < kMaxThreads ? num_threads : kMaxThreads);
    call_ = call;
    task_ = task;
    limit_.store(num_threads, std::memory_order_relaxed);
    core_.store(current_core(), std::memory_order_relaxed);
    done_.store(0, std::memory_order_relaxed);
    epoch_ += 1;
    ticket_.store((static_cast<uint64_t>(epoch_) << 32) | (static_cast<uint64_t>(num_tasks) << 16));
    if (sleepers_.load() > 0) {
      std::lock_guard<std::mutex> lock(sleep_);
      wake_.notify_all();
    }
    work(0);
    for (int spins = 0; done_.load(std::memory_order_acquire) < num_tasks; ++spins) {
      if (spins < 4000) {
        relax();
      } else {
        sched_yield();
      }
    }
  }

  // Takes tasks until none is left. The task may be read once one of it is claimed: it cannot end before that one.
  void work(int thread) {
    uint64_t ticket = ticket_.load(std::memory_order_acquire);
    while (is_open(ticket)) {
      if (ticket_.compare_exchange_weak(ticket, ticket + 1, std::memory_order_acq_rel, std::memory_order_acquire)) {
        call_(task_, static_cast<int64_t>(ticket & 0xffff), thread);
        done_.fetch_add(1, std::memory_order_release);
        ticket = ticket_.load(std::memory_order_acquire);
      }
    }
  }

  static bool is_open(uint64_t ticket) { return (ticket & 0xffff) < ((ticket >> 16) & 0xffff); }

  void serve(int thread) {
    for (int phases = 0;; ++phases) {
      int spins = 0;
      while (!is_mine(thread)) {
        if (++spins < 3000) {
          relax();
          continue;
        }
        std::unique_lock<std::mutex> lock(sleep_);
        sleepers_.fetch_add(1);
        wake_.wait(lock, [&] { return is_mine(thread); });
        sleepers_.fetch_sub(1);
      }
      const int core = current_core();
      if (core >= 0 && core == core_.load(std::memory_order_relaxed) && phases >= kPhasesBetweenMoves) {
        leave_core(core);
        phases = 0;
      }
      work(thread);
    }
  }

  bool is_mine(int thread) const { return is_open(ticket_.load()) && thread < limit_.load(std::memory_order_relaxed); }

  void grow(int num_threads) {
    for (; num_started_ < num_threads; ++num_started_) {
      std::thread(&Pool::serve, this, num_started_).detach();
    }
  }

  // In a forked child the threads are gone, and a lock may be held by one of them.
  void abandon() {
    num_started_ = 1;
    sleepers_.store(0);
    ticket_.store(0);
    new (&sleep_) std::mutex();
    new (&turn_) std::mutex();
    new (&wake_) std::condition_variable();
  }

  std::mutex turn_;
  std::mutex sleep_;
  std::condition_variable wake_;
  std::atomic<int> sleepers_{0};
  alignas(64) std::atomic<uint64_t> ticket_{0};  // epoch | number of tasks | next task
  alignas(64) std::atomic<int64_t> done_{0};
  alignas(64) std::atomic<int> limit_{0};
  std::atomic<int> core_{-1};  // where the thread that hands out the tasks runs
  Call call_ = nullptr;
  const void* task_ = nullptr;
  uint32_t epoch_ = 0;
  int num_started_ = 1;
};

}  // namespace dijiang
