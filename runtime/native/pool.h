// Threads that share one ticket. A call hands out task numbers until none are left; the caller works too.
//
// Tasks are claimed one by one, so a thread whose core another program has taken costs its own share and no more. The
// caller waits for tasks, never for threads: one that wakes up late finds the ticket exhausted and goes back. Whoever
// waits spins for a moment and then sleeps, so that its core is free for a thread that was pushed off another.
#pragma once
#include <atomic>
#include <cassert>
#include <cstdint>
#include <thread>
#include <vector>

namespace kimi {

class Pool {
 public:
  explicit Pool(int n_threads) : n_threads_(n_threads) {
    for (int i = 1; i < n_threads; ++i) workers_.emplace_back([this, i] { work(i); });
  }
  ~Pool() {
    stop_.store(true, std::memory_order_relaxed);
    publish(0);
    for (auto& worker : workers_) worker.join();
  }
  int n_threads() const { return n_threads_; }

  // Calls task(i, thread) for every i in [0, n). Returns when all are done.
  template <typename Task>
  void run(int n, const Task& task) {
    if (n_threads_ == 1 || n <= 1) {
      for (int i = 0; i < n; ++i) task(i, 0);
      return;
    }
    assert(n < 1 << 19);
    call_ = [](const void* what, int i, int thread) { (*static_cast<const Task*>(what))(i, thread); };
    task_ = &task;
    done_.store(0, std::memory_order_relaxed);
    publish(n);
    claim(0);
    for (int spin = 0; done_.load(std::memory_order_acquire) != n;) {
      if (++spin < kSpin) {
        pause();
      } else {
        const int seen = done_.load(std::memory_order_acquire);
        if (seen != n) done_.wait(seen, std::memory_order_acquire);
      }
    }
  }

 private:
  // A ticket is one number: call (24 bits), tasks of that call (20), next task (20). Claiming adds one, so whether a
  // claim is good, and whose it is, can be read from the claim alone. task_ and call_ stay until all its tasks are done.
  static constexpr int kSpin = 4000;  // of about 20 ns
  static uint64_t n_of(uint64_t ticket) { return ticket >> 20 & 0xfffff; }
  static uint64_t next_of(uint64_t ticket) { return ticket & 0xfffff; }
  static void pause() {
#if defined(__x86_64__) || defined(_M_X64)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }
  void publish(int n) {
    const uint64_t call = (ticket_.load(std::memory_order_relaxed) >> 40) + 1;
    ticket_.store(call << 40 | static_cast<uint64_t>(n) << 20, std::memory_order_seq_cst);
    ticket_.notify_all();  // no system call while nobody sleeps
  }
  void claim(int thread) {
    for (;;) {
      if (const uint64_t seen = ticket_.load(std::memory_order_acquire); next_of(seen) >= n_of(seen)) return;
      const uint64_t mine = ticket_.fetch_add(1, std::memory_order_acq_rel);
      if (next_of(mine) >= n_of(mine)) return;
      call_(task_, static_cast<int>(next_of(mine)), thread);
      if (done_.fetch_add(1, std::memory_order_acq_rel) + 1 == static_cast<int>(n_of(mine))) done_.notify_one();
    }
  }
  void work(int thread) {
    for (uint64_t seen = 0;;) {
      uint64_t now = ticket_.load(std::memory_order_acquire);
      for (int spin = 0; spin < kSpin && now >> 40 == seen; ++spin, now = ticket_.load(std::memory_order_acquire)) pause();
      for (; now >> 40 == seen; now = ticket_.load(std::memory_order_acquire)) ticket_.wait(now, std::memory_order_acquire);
      if (stop_.load(std::memory_order_relaxed)) return;
      seen = now >> 40;
      claim(thread);
    }
  }

  const int n_threads_;
  std::vector<std::thread> workers_;
  void (*call_)(const void*, int, int) = nullptr;
  const void* task_ = nullptr;
  alignas(64) std::atomic<uint64_t> ticket_{0};
  alignas(64) std::atomic<int> done_{0};
  std::atomic<bool> stop_{false};
};

}  // namespace kimi
