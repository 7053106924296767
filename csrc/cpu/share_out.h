// Layers or batches, each by itself, shared out over threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>

namespace lplb::cpu {

// Every thread makes its own run = start() and calls run(i) for the i in [0, n) that it takes. No exception may leave
// an OpenMP region: one ends the work of all, and is thrown again afterwards. Hence no `omp for` either, which every
// thread would have to reach.
template <class Start>
void share_out(int64_t n, int threads, Start start) {
  threads = static_cast<int>(std::min<int64_t>(threads, n));
  std::atomic<int64_t> next{0};
  std::exception_ptr failure;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    try {
      auto run = start();
      for (int64_t i; (i = next.fetch_add(1)) < n;) run(i);
    } catch (...) {
      next = n;
#pragma omp critical
      failure = std::current_exception();
    }
  }
  if (failure) std::rethrow_exception(failure);
}

}  // namespace lplb::cpu
