// A team is who runs an algorithm of csrc/core: one thread, the threads of a CUDA block, or, in tests, host threads
// behind a barrier. It offers
//
//     rank(), size()       who of how many
//     sync()               barrier, and memory written before it is seen after it
//     each(n, f)           f(i) for i in [0, n), shared out over the team; no f(i) may depend on another
//     sum(n, f), max(n, f) the same value on every member; every f(i) must be readable by every member
//
// Sums run over a fixed tree by index, whatever the team's size, so a plan has the same bits everywhere.
#pragma once

#include <cmath>
#include <cstdint>

// The CPU backend compiles the algorithms once per instruction set and picks one at run time. Each copy lives in an
// inline namespace of its own, or the linker would fold them into one.
#ifndef LPLB_ISA
#define LPLB_ISA portable
#endif

#ifdef __CUDACC__
#define LPLB_HD __host__ __device__
#else
#define LPLB_HD
#endif

namespace lplb {
inline namespace LPLB_ISA {

// Independent iterations: lets the compiler use vector registers without proving that arrays do not overlap.
#if defined(__clang__)
#define LPLB_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#elif defined(__GNUC__)
#define LPLB_INDEPENDENT _Pragma("GCC ivdep")
#else
#define LPLB_INDEPENDENT
#endif

#ifndef __CUDACC__  // teams of host threads are compiled by the host's compiler alone

// Four doubles: one register with AVX2, two where registers are narrower.
typedef double Vec __attribute__((vector_size(32)));
inline constexpr int kVec = 4;

struct Lanes8 {
  Vec lo, hi;
  void operator+=(const Lanes8& o) { lo += o.lo, hi += o.hi; }
};

namespace lanes {

template <class F>
static inline __attribute__((always_inline)) Lanes8 block(int i, F& f) {
  return {Vec{f(i), f(i + 1), f(i + 2), f(i + 3)}, Vec{f(i + 4), f(i + 5), f(i + 6), f(i + 7)}};
}

// A last block of fewer than 8, filled up with zeros.
template <class F>
static inline __attribute__((noinline)) Lanes8 part(int i, int n, F& f) {
  double x[8] = {0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0};
  for (int l = 0; i + l < n; ++l) x[l] = f(i + l);
  return {Vec{x[0], x[1], x[2], x[3]}, Vec{x[4], x[5], x[6], x[7]}};
}

}  // namespace lanes

// The fixed tree of sums: lane l of 32 adds f(l), f(l + 32), f(l + 64), … in this order; then the lanes fold in halves.
template <class F>
inline double fixed_sum(int n, F f) {
  const Vec zero = {0.0, 0.0, 0.0, 0.0};
  Lanes8 a{zero, zero}, b{zero, zero}, c{zero, zero}, d{zero, zero};
  int i = 0;
  for (; i + 32 <= n; i += 32) {
    a += lanes::block(i, f);
    b += lanes::block(i + 8, f);
    c += lanes::block(i + 16, f);
    d += lanes::block(i + 24, f);
  }
  for (Lanes8* lane = &a; i < n; i += 8, lane = lane == &a ? &b : lane == &b ? &c : &d)
    *lane += i + 8 <= n ? lanes::block(i, f) : lanes::part(i, n, f);
  a += c;
  b += d;
  a += b;
  const Vec half = a.lo + a.hi;
  return (half[0] + half[2]) + (half[1] + half[3]);
}

// max(0, f(0), …, f(n-1)); the order cannot matter. A NaN is passed over: callers check what they divide.
template <class F>
inline double fixed_max(int n, F f) {
  const Vec zero = {0.0, 0.0, 0.0, 0.0};
  Lanes8 most{zero, zero};
  for (int i = 0; i < n; i += 8) {
    const Lanes8 x = i + 8 <= n ? lanes::block(i, f) : lanes::part(i, n, f);
    most.lo = x.lo > most.lo ? x.lo : most.lo;
    most.hi = x.hi > most.hi ? x.hi : most.hi;
  }
  most.lo = most.hi > most.lo ? most.hi : most.lo;
  const double x = most.lo[0] > most.lo[1] ? most.lo[0] : most.lo[1];
  const double y = most.lo[2] > most.lo[3] ? most.lo[2] : most.lo[3];
  return x > y ? x : y;
}

// The team of one: the CPU backend.
struct Solo {
  static constexpr bool kSolo = true;
  static constexpr int rank() { return 0; }
  static constexpr int size() { return 1; }
  static void sync() {}
  template <class F>
  static void each(int n, F f) {
    LPLB_INDEPENDENT
    for (int i = 0; i < n; ++i) f(i);
  }
  template <class F>
  static double sum(int n, F f) {
    return fixed_sum(n, f);
  }
  template <class F>
  static double max(int n, F f) {
    return fixed_max(n, f);
  }
};

#endif  // __CUDACC__

}  // namespace LPLB_ISA
}  // namespace lplb
