// Threads that share one counter. A call hands out task numbers until none are left; the caller works too.
//
// Tasks are claimed one by one, so a thread whose core another program has taken costs its own share and no more:
// nobody waits for a fixed part of the work. Workers spin for a moment between calls and then sleep.
#pragma once
#include <atomic>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace kimi {

class Pool {
 public:
  explicit Pool(int n_threads) : n_threads_(n_threads) {
    for (int i = 1; i < n_threads; ++i) workers_.emplace_back([this, i] { work(i); });
  }
  ~Pool() {
    {
      std::lock_guard<std::mutex> hold(mutex_);
      stop_ = true;
      ++generation_;
    }
    wake_.notify_all();
    for (auto& worker : workers_) worker.join();
  }
  int n_threads() const { return n_threads_; }

  // Calls task(i, thread) for every i in [0, n). Returns when all are done.
  void run(int n, const std::function<void(int, int)>& task) {
    if (n_threads_ == 1 || n <= 1) {
      for (int i = 0; i < n; ++i) task(i, 0);
      return;
    }
    {
      std::lock_guard<std::mutex> hold(mutex_);
      task_ = &task;
      n_ = n;
      next_.store(0, std::memory_order_relaxed);
      busy_.store(n_threads_ - 1, std::memory_order_relaxed);
      generation_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    claim(0);
    while (busy_.load(std::memory_order_acquire)) std::this_thread::yield();
  }

 private:
  void claim(int thread) {
    for (int i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < n_;) (*task_)(i, thread);
  }
  void work(int thread) {
    for (unsigned seen = 0;;) {
      for (int spin = 0; spin < 2000 && generation_.load(std::memory_order_acquire) == seen; ++spin) {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
      }
      {
        std::unique_lock<std::mutex> hold(mutex_);
        wake_.wait(hold, [&] { return generation_.load(std::memory_order_relaxed) != seen; });
        seen = generation_.load(std::memory_order_relaxed);
        if (stop_) return;
      }
      claim(thread);
      busy_.fetch_sub(1, std::memory_order_release);
    }
  }

  const int n_threads_;
  std::vector<std::thread> workers_;
  std::mutex mutex_;
  std::condition_variable wake_;
  const std::function<void(int, int)>* task_ = nullptr;
  int n_ = 0;
  std::atomic<int> next_{0}, busy_{0};
  std::atomic<unsigned> generation_{0};
  bool stop_ = false;
};

}  // namespace kimi
