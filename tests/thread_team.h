// A team of host threads behind a barrier: the code that a CUDA block runs in parallel, on a machine without a GPU and
// under ThreadSanitizer. Fulfils the contract at the top of csrc/core/team.h.
#pragma once

#include <atomic>
#include <thread>
#include <vector>

#include "../csrc/core/team.h"

namespace lplb {

// Lets every thread wait for all others. Acquire and release on `phase_` order the memory before and after it. Waiting
// threads yield: with more members than cores there is always another one to run.
class Barrier {
 public:
  explicit Barrier(int size) : size_(size) {}

  void wait() {
    const unsigned phase = phase_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
      arrived_.store(0, std::memory_order_relaxed);
      phase_.store(phase + 1, std::memory_order_release);
    } else {
      while (phase_.load(std::memory_order_acquire) == phase) std::this_thread::yield();
    }
  }

 private:
  const int size_;
  std::atomic<int> arrived_{0};
  std::atomic<unsigned> phase_{0};
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
