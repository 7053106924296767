// A team of host threads behind a barrier: the code that a CUDA block runs in parallel, on a machine without a GPU and
// under ThreadSanitizer. Fulfils the contract at the top of csrc/core/team.h.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#include "../csrc/core/team.h"

namespace lplb {

// Lets every thread wait for all others; acquire and release on `phase_` order the memory before and after it.
//
// With more members than cores a waiting thread had best yield to the next one: 10 to 100 times faster than sleeping.
// But where another process wants the cores, a yield lasts one of its time slices. After such a yield threads sleep.
class Barrier {
 public:
  explicit Barrier(int size) : size_(size) {}

  void wait() {
    const unsigned phase = phase_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
      arrived_.store(0, std::memory_order_relaxed);
      {
        std::lock_guard<std::mutex> lock(mutex_);
        phase_.store(phase + 1, std::memory_order_release);
      }
      next_phase_.notify_all();
      return;
    }
    const auto passed = [&] { return phase_.load(std::memory_order_acquire) != phase; };
    while (!passed()) {
      if (naps_.load(std::memory_order_relaxed) > 0) {
        naps_.fetch_sub(1, std::memory_order_relaxed);
        std::unique_lock<std::mutex> lock(mutex_);
        next_phase_.wait(lock, passed);
      } else {
        const auto before = std::chrono::steady_clock::now();
        std::this_thread::yield();
        if (std::chrono::steady_clock::now() - before > kLongYield)
          naps_.store(kNaps * size_, std::memory_order_relaxed);
      }
    }
  }

 private:
  static constexpr std::chrono::milliseconds kLongYield{1};
  static constexpr int kNaps = 1000;  // phases to sleep through before yielding is tried again

  const int size_;
  std::atomic<int> arrived_{0}, naps_{0};
  std::atomic<unsigned> phase_{0};
  std::mutex mutex_;
  std::condition_variable next_phase_;
};

// One member. sum and max are computed by every member for itself, so they need no barrier.
class ThreadTeam {
 public:
  static constexpr bool kSolo = false;

  ThreadTeam(Barrier& barrier, int rank, int size) : barrier_(barrier), rank_(rank), size_(size) {}
  int rank() const { return rank_; }
  int size() const { return size_; }
  void sync() { barrier_.wait(); }
  template <class F>
  void each(int n, F f) {
    for (int i = rank_; i < n; i += size_) f(i);
  }
  template <class F>
  double sum(int n, F f) {
    return fixed_sum(n, f);
  }
  template <class F>
  double max(int n, F f) {
    return fixed_max(n, f);
  }

 private:
  Barrier& barrier_;
  const int rank_, size_;
};

// Runs f(team) on `size` threads and waits for them.
template <class F>
void run_team(int size, F f) {
  Barrier barrier(size);
  std::vector<std::thread> threads;
  for (int rank = 0; rank < size; ++rank)
    threads.emplace_back([&barrier, &f, rank, size] {
      ThreadTeam team(barrier, rank, size);
      f(team);
    });
  for (std::thread& t : threads) t.join();
}

}  // namespace lplb
