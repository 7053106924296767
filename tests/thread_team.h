// A team of host threads behind a barrier: the code that a CUDA block runs in parallel, on a machine without a GPU and
// under ThreadSanitizer. Fulfils the contract at the top of csrc/core/team.h.
#pragma once

#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <mutex>
#include <thread>
#include <vector>

#include "../csrc/core/reduce.h"

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

// What any team can do to memory that others see.
struct SeenMemory {
  template <class T>
  void note(T* p, std::common_type_t<T> value) {
    __atomic_store_n(p, value, __ATOMIC_RELAXED);
  }
  template <class T>
  void add(T* p, T x) {
    __atomic_fetch_add(p, x, __ATOMIC_RELAXED);
  }
  template <class T>
  T fresh(const T* p) {
    return *p;
  }
};

// What the members of a warp pass to each other. On a GPU values go from register to register, which orders no memory;
// so ThreadSanitizer must not see that this does, or it would miss a sync() that is missing.
class WarpMemory {
 public:
  Barrier barrier{kWarpSize};

  // All members' words into `all`, once every member has given its own. `round` counts a member's calls.
  __attribute__((no_sanitize("thread"), noinline)) void exchange(int member, uint64_t word, unsigned& round,
                                                                 uint64_t* all) {
    uint64_t* words = words_[round % 2];
    __atomic_store_n(&words[member], word, __ATOMIC_RELAXED);
    const unsigned everybody = ++round * kWarpSize;
    __atomic_fetch_add(&arrived_, 1u, __ATOMIC_ACQ_REL);
    while (static_cast<int>(__atomic_load_n(&arrived_, __ATOMIC_ACQUIRE) - everybody) < 0) sched_yield();
    for (int i = 0; i < kWarpSize; ++i) all[i] = __atomic_load_n(&words[i], __ATOMIC_RELAXED);
  }

 private:
  uint64_t words_[2][kWarpSize];  // a member is at most one round ahead of another
  unsigned arrived_ = 0;
};

// One member of a warp of kWarpSize host threads.
class ThreadWarp : public SeenMemory {
 public:
  static constexpr bool kSolo = false;

  ThreadWarp(WarpMemory& memory, int rank) : memory_(memory), rank_(rank) {}
  int rank() const { return rank_; }
  int size() const { return kWarpSize; }
  int n_warps() const { return 1; }
  int warp_index() const { return 0; }
  bool any(bool bit) {
    sync();
    return ballot(bit) != 0;
  }
  ThreadWarp& warp() { return *this; }
  void sync() { memory_.barrier.wait(); }
  template <class F>
  void each(int n, F f) {
    for (int i = rank_; i < n; i += kWarpSize) f(i);
  }
  template <class... F>
  Values<sizeof...(F)> sums(int n, F... f) {
    return reduce::warp_sums(*this, n, f...);
  }
  template <class... F>
  Values<sizeof...(F)> maxima(int n, F... f) {
    return reduce::warp_maxima(*this, n, f...);
  }
  template <class... F>
  Values<sizeof...(F)> few_sums(int n, F... f) {
    return reduce::warp_sums(*this, n, f...);
  }
  template <class... F>
  Values<sizeof...(F)> few_maxima(int n, F... f) {
    return reduce::warp_maxima(*this, n, f...);
  }
  template <class F>
  void first_warp(F f) {
    f(*this);
    sync();
  }
  template <class T>
  T get(T value, int member) {
    static_assert(sizeof(T) <= sizeof(uint64_t));
    uint64_t word = 0;
    std::memcpy(&word, &value, sizeof value);
    exchange(word, [&](const uint64_t* all) { std::memcpy(&value, &all[member], sizeof value); });
    return value;
  }
  template <class T>
  T across(T value, int step) {
    return get(value, rank_ ^ step);
  }
  uint32_t ballot(bool bit) {
    uint32_t bits = 0;
    exchange(bit, [&](const uint64_t* all) {
      for (int i = 0; i < kWarpSize; ++i) bits |= static_cast<uint32_t>(all[i]) << i;
    });
    return bits;
  }
  uint32_t match(uint32_t x) {
    uint32_t same = 0;
    exchange(x, [&](const uint64_t* all) {
      for (int i = 0; i < kWarpSize; ++i) same |= static_cast<uint32_t>(all[i] == x) << i;
    });
    return same;
  }
  uint32_t largest(uint32_t x) {
    exchange(x, [&](const uint64_t* all) { x = static_cast<uint32_t>(*std::max_element(all, all + kWarpSize)); });
    return x;
  }
  uint64_t unite(uint64_t x) {
    exchange(x, [&](const uint64_t* all) {
      for (int i = 0; i < kWarpSize; ++i) x |= all[i];
    });
    return x;
  }

 private:
  template <class Read>
  void exchange(uint64_t word, Read read) {
    uint64_t all[kWarpSize];
    memory_.exchange(rank_, word, round_, all);
    read(all);
  }

  WarpMemory& memory_;
  const int rank_;
  unsigned round_ = 0;
};

// What the members of a block share.
struct BlockMemory {
  explicit BlockMemory(int size) : barrier(size), warps(size / kWarpSize) {}
  Barrier barrier;
  std::vector<WarpMemory> warps;
  double buffer[reduce::kBufferSize];
  std::atomic<bool> raised{false};
};

// One member of a block of host threads, a multiple of kWarpSize.
class ThreadBlock : public SeenMemory {
 public:
  static constexpr bool kSolo = false;

  ThreadBlock(BlockMemory& memory, int rank, int size)
      : memory_(memory), rank_(rank), size_(size), warp_(memory.warps[rank / kWarpSize], rank % kWarpSize) {}
  int rank() const { return rank_; }
  int size() const { return size_; }
  int n_warps() const { return size_ / kWarpSize; }
  int warp_index() const { return rank_ / kWarpSize; }
  bool any(bool bit) {
    if (bit) memory_.raised.store(true, std::memory_order_relaxed);
    sync();
    const bool all = memory_.raised.load(std::memory_order_relaxed);
    sync();
    if (rank_ == 0) memory_.raised.store(false, std::memory_order_relaxed);
    sync();
    return all;
  }
  ThreadWarp& warp() { return warp_; }
  void sync() { memory_.barrier.wait(); }
  template <class F>
  void each(int n, F f) {
    for (int i = rank_; i < n; i += size_) f(i);
  }
  template <class... F>
  Values<sizeof...(F)> sums(int n, F... f) {
    return reduce::block_sums(*this, memory_.buffer, round_, n, f...);
  }
  template <class... F>
  Values<sizeof...(F)> maxima(int n, F... f) {
    return reduce::block_maxima(*this, memory_.buffer, round_, n, f...);
  }
  template <class... F>
  Values<sizeof...(F)> few_sums(int n, F... f) {
    return reduce::warp_sums(warp_, n, f...);
  }
  template <class... F>
  Values<sizeof...(F)> few_maxima(int n, F... f) {
    return reduce::warp_maxima(warp_, n, f...);
  }
  template <class F>
  void first_warp(F f) {
    if (warp_index() == 0) f(warp_);
    sync();
  }

 private:
  BlockMemory& memory_;
  const int rank_, size_;
  ThreadWarp warp_;
  int round_ = 0;
};

// Runs f(block) on `size` threads and waits for them.
template <class F>
void run_block(int size, F f) {
  BlockMemory memory(size);
  std::vector<std::thread> threads;
  for (int rank = 0; rank < size; ++rank)
    threads.emplace_back([&memory, &f, rank, size] {
      ThreadBlock block(memory, rank, size);
      f(block);
    });
  for (std::thread& t : threads) t.join();
}

// Runs f(warp) on the threads of one warp and waits for them.
template <class F>
void run_warp(F f) {
  WarpMemory memory;
  std::vector<std::thread> threads;
  for (int rank = 0; rank < kWarpSize; ++rank)
    threads.emplace_back([&memory, &f, rank] {
      ThreadWarp warp(memory, rank);
      f(warp);
    });
  for (std::thread& t : threads) t.join();
}

}  // namespace lplb
