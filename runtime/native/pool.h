// Threads that share the tasks of a call; the caller works too.
//
// Each thread has a lane, a contiguous share of the task numbers: weights that lie together are read by one thread, which
// memory rewards (two threads taking turns on one stream reach three quarters of the speed). A thread whose lane is empty
// takes tasks from the others', one by one, so a thread whose core another program has taken costs its own share and no
// more. The caller waits for tasks, never for threads: one that wakes up late finds the lanes empty and goes back.
// Whoever waits spins for a moment and then sleeps, so that its core is free for a thread that was pushed off another.
#pragma once
#include <atomic>
#include <chrono>
#include <cstdint>
#include <thread>
#include <vector>

namespace kimi {

class Pool {
 public:
  explicit Pool(int n_threads) : n_threads_(n_threads), lanes_(n_threads) {
    for (int i = 1; i < n_threads; ++i) workers_.emplace_back([this, i] { work(i); });
  }
  ~Pool() {
    stop_.store(true, std::memory_order_relaxed);
    publish(0);
    for (auto& worker : workers_) worker.join();
  }
  int n_threads() const { return n_threads_; }
  // How many calls there were, and how long the caller was inside them; what is left of a token's time is serial.
  struct Times { uint64_t calls = 0, ns = 0; };
  Times times() const { return times_; }

  // Calls task(i, thread) for every i in [0, n). Returns when all are done.
  template <typename Task>
  void run(int n, const Task& task) {
    const Timer timer{times_};
    if (n_threads_ == 1 || n <= 1) {
      for (int i = 0; i < n; ++i) task(i, 0);
      return;
    }
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
  struct Timer {
    Times& times;
    std::chrono::steady_clock::time_point begin = std::chrono::steady_clock::now();
    ~Timer() {
      ++times.calls;
      times.ns += std::chrono::nanoseconds(std::chrono::steady_clock::now() - begin).count();
    }
  };
  // A lane is one number: end (32 bits) and next task (32). Claiming adds one, so whether a claim is good can be read from
  // the claim alone; and since done_ cannot reach n before a good claim's task is done, task_ and call_ are then its own.
  struct alignas(64) Lane { std::atomic<uint64_t> ticket{0}; };
  static constexpr int kSpin = 4000;  // of about 20 ns
  static bool has_next(uint64_t ticket) { return static_cast<uint32_t>(ticket) < ticket >> 32; }
  static void pause() {
#if defined(__x86_64__) || defined(_M_X64)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }
  void publish(int n) {
    n_ = n;
    for (int i = 0; i < n_threads_; ++i) {
      const uint64_t from = static_cast<uint64_t>(n) * i / n_threads_, end = static_cast<uint64_t>(n) * (i + 1) / n_threads_;
      lanes_[i].ticket.store(end << 32 | from, std::memory_order_release);
    }
    generation_.fetch_add(1, std::memory_order_seq_cst);
    generation_.notify_all();  // no system call while nobody sleeps
  }
  void claim(int thread) {
    int n = 0, finished = 0;  // said once: whoever says it takes done_ out of another core's cache
    for (int k = 0; k < n_threads_; ++k) {
      std::atomic<uint64_t>& lane = lanes_[(thread + k) % n_threads_].ticket;
      while (has_next(lane.load(std::memory_order_acquire))) {
        const uint64_t mine = lane.fetch_add(1, std::memory_order_acq_rel);
        if (!has_next(mine)) break;
        n = n_;
        call_(task_, static_cast<int>(static_cast<uint32_t>(mine)), thread);
        ++finished;
      }
    }
    if (finished && done_.fetch_add(finished, std::memory_order_acq_rel) + finished == n) done_.notify_one();
  }
  void work(int thread) {
    for (uint32_t seen = 0;;) {
      uint32_t now = generation_.load(std::memory_order_acquire);
      for (int spin = 0; spin < kSpin && now == seen; ++spin, now = generation_.load(std::memory_order_acquire)) pause();
      for (; now == seen; now = generation_.load(std::memory_order_acquire)) generation_.wait(now, std::memory_order_acquire);
      if (stop_.load(std::memory_order_relaxed)) return;
      seen = now;
      claim(thread);
    }
  }

  const int n_threads_;
  Times times_;
  std::vector<std::thread> workers_;
  void (*call_)(const void*, int, int) = nullptr;
  const void* task_ = nullptr;
  int n_ = 0;
  std::vector<Lane> lanes_;
  alignas(64) std::atomic<uint32_t> generation_{0};
  alignas(64) std::atomic<int> done_{0};
  std::atomic<bool> stop_{false};
};

}  // namespace kimi
