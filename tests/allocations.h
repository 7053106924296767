// How often a C++ test has called operator new. For the one source file of a program.
#pragma once

#include <atomic>
#include <cstdlib>
#include <new>
#include <string>

#include "check.h"

// Every operator new of the program ends here, also those for arrays. Not inlined, or g++ takes new and free for a
// mismatched pair.
#define LPLB_REPLACED __attribute__((noinline))

static std::atomic<long> allocations{0};

LPLB_REPLACED void* operator new(size_t bytes, const std::nothrow_t&) noexcept {
  allocations.fetch_add(1, std::memory_order_relaxed);
  return std::malloc(bytes > 0 ? bytes : 1);
}
LPLB_REPLACED void* operator new(size_t bytes) {
  if (void* p = ::operator new(bytes, std::nothrow)) return p;
  throw std::bad_alloc();
}
LPLB_REPLACED void* operator new(size_t bytes, std::align_val_t alignment) {
  allocations.fetch_add(1, std::memory_order_relaxed);
  const size_t a = static_cast<size_t>(alignment);
  if (void* p = std::aligned_alloc(a, (bytes + a - 1) / a * a)) return p;
  throw std::bad_alloc();
}
LPLB_REPLACED void operator delete(void* p) noexcept { std::free(p); }
LPLB_REPLACED void operator delete(void* p, size_t) noexcept { std::free(p); }
LPLB_REPLACED void operator delete(void* p, std::align_val_t) noexcept { std::free(p); }
LPLB_REPLACED void operator delete(void* p, size_t, std::align_val_t) noexcept { std::free(p); }

inline void check_allocations_are_counted() {
  const long before = allocations.load();
  void* volatile p = ::operator new(8);  // volatile, or g++ leaves the pair out
  ::operator delete(p);
  const long during = allocations.load() - before;
  check(during == 1, "one operator new was counted as " + std::to_string(during));
}
