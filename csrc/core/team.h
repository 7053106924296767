// A team is who runs an algorithm of csrc/core: one thread, a warp, the threads of a CUDA block, or, in tests, host
// threads behind barriers. It offers
//
//     rank(), size()          of how many
//     sync()                  barrier, and memory written before it is seen after it
//     each(n, f)              f(i) for i in [0, n), shared out over the team; no f(i) may depend on another
//     sums(n, f, …)           Σ f(i) for every function given, the same values on every member; every f(i) must be
//     maxima(n, f, …)         readable by every member; likewise max(0, f(0), …)
//     few_sums, few_maxima    the same for n ≤ kSumLanes, without a barrier
//     any(bit)                whether any member passed true; a barrier
//     warp()                  the member's warp; n_warps(), warp_index()
//     first_warp(f)           f(warp) on the first warp alone, then sync()
//
// and a warp, which is a team as well, also
//
//     get(value, member)      the value that another member passed
//     across(value, step)     that of the member whose number differs in the bit `step`
//     ballot(bit)             the members' bits
//     largest(x), unite(x)    maximum and union of the members' words
//     add(p, x)               *p += x, when several members may do so at once
//
// Teams that are not one thread further have note(p, x), *p = x for eyes outside of the team; blocks have fresh(p),
// what another block of the launch wrote, and their warps match(x), the members that passed the same x.
//
// All members of a warp make the same calls. One thread is a warp of one member. Sums run over a fixed tree by index,
// whatever the team's size, so a plan has the same bits everywhere.
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

// Independent iterations: lets the compiler use vector registers without proving that arrays do not overlap.
#if defined(__CUDACC__)
#define LPLB_INDEPENDENT
#elif defined(__clang__)
#define LPLB_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#elif defined(__GNUC__)
#define LPLB_INDEPENDENT _Pragma("GCC ivdep")
#else
#define LPLB_INDEPENDENT
#endif

// On a GPU arrays stay in registers only where loops over them are unrolled. Other loops are short; unrolled as well,
// they would fill the instruction cache.
#ifdef __CUDA_ARCH__
#define LPLB_UNROLL _Pragma("unroll")
#define LPLB_UNROLL_16 _Pragma("unroll 16")
#define LPLB_LOOP _Pragma("unroll 1")
#else
#define LPLB_UNROLL
#define LPLB_UNROLL_16
#define LPLB_LOOP
#endif

namespace lplb {
inline namespace LPLB_ISA {

// use(i, load(i)) for i in [begin, end), in order. On a GPU several loads are under way before the first is used, so
// load must not depend on use. With kRepeat the last i is loaded again beyond the end: without branches loads overlap
// better, which pays for loads from far away and for loads by an index that is loaded as well.
template <int kAtOnce, bool kRepeat = false, class Load, class Use>
LPLB_HD inline void in_order(int begin, int end, Load load, Use use) {
#ifdef __CUDA_ARCH__
  LPLB_LOOP
  for (int first = begin; first < end; first += kAtOnce) {
    decltype(load(begin)) value[kAtOnce];
    LPLB_UNROLL
    for (int k = 0; k < kAtOnce; ++k)
      if (kRepeat || first + k < end) value[k] = load(first + k < end ? first + k : end - 1);
    // NOTE: never taken. Without a branch here ptxas moves every load to its use, behind the uses before it, in kernels
    // that want many registers.
    if (kRepeat && first == INT32_MAX) __trap();
    LPLB_UNROLL
    for (int k = 0; k < kAtOnce; ++k)
      if (first + k < end) use(first + k, value[k]);
  }
#else
  for (int i = begin; i < end; ++i) use(i, load(i));
#endif
}

// What sums and maxima return.
template <int kCount>
struct Values {
  double v[kCount];
  LPLB_HD double operator[](int i) const { return v[i]; }
};

// The fixed tree of sums has 128 lanes: lane l adds f(l), f(l + 128), f(l + 256), … in this order; then the lanes fold
// in halves, 64, 32, 16, 8, 4, 2, 1. Lanes beyond n hold zeros, which add nothing.
inline constexpr int kSumLanes = 128;
inline constexpr int kWarpSize = 32;

#ifndef __CUDACC__  // teams of host threads are compiled by the host's compiler alone

// Four doubles: one register with AVX2, two where registers are narrower.
typedef double Vec __attribute__((vector_size(32)));
inline constexpr int kVec = 4;

struct Lanes8 {
  Vec lo, hi;
  void operator+=(const Lanes8& o) { lo += o.lo, hi += o.hi; }
};

struct Lanes32 {
  Lanes8 part[4];
  void operator+=(const Lanes32& o) {
    for (int i = 0; i < 4; ++i) part[i] += o.part[i];
  }
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

static inline Lanes8 zeros() {
  const Vec zero = {0.0, 0.0, 0.0, 0.0};
  return {zero, zero};
}

// Lanes [i, i + 32) take one more term each.
template <class F>
static inline __attribute__((always_inline)) void add(Lanes32& lanes, int i, int n, F& f) {
  if (i + 32 <= n) {
    for (int l = 0; l < 4; ++l) lanes.part[l] += block(i + 8 * l, f);
    return;
  }
  for (int l = 0; i < n; i += 8, ++l) lanes.part[l] += i + 8 <= n ? block(i, f) : part(i, n, f);
}

static inline __attribute__((always_inline)) double fold(Lanes32& lanes) {
  Lanes8 *p = lanes.part, a = p[0], b = p[1];
  a += p[2];
  b += p[3];
  a += b;
  const Vec half = a.lo + a.hi;
  return (half[0] + half[2]) + (half[1] + half[3]);
}

}  // namespace lanes

template <class F>
inline double fixed_sum(int n, F f) {
  const Lanes8 z = lanes::zeros();
  Lanes32 lanes = {{z, z, z, z}};
  lanes::add(lanes, 0, n, f);
  if (n > 32) {
    Lanes32 more[3] = {{{z, z, z, z}}, {{z, z, z, z}}, {{z, z, z, z}}};
    for (int i = 32; i < n; i += 32) lanes::add(i % kSumLanes == 0 ? lanes : more[i / 32 % 4 - 1], i, n, f);
    lanes += more[1];
    more[0] += more[2];
    lanes += more[0];
  }
  return lanes::fold(lanes);
}

// max(0, f(0), …, f(n-1)); the order cannot matter. A NaN is passed over: callers check what they divide.
template <class F>
inline double fixed_max(int n, F f) {
  Lanes8 most = lanes::zeros();
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
  static constexpr int n_warps() { return 1; }
  static constexpr int warp_index() { return 0; }
  static void sync() {}
  template <class F>
  static void each(int n, F f) {
    LPLB_INDEPENDENT
    for (int i = 0; i < n; ++i) f(i);
  }
  template <class... F>
  static Values<sizeof...(F)> sums(int n, F... f) {
    return {{fixed_sum(n, f)...}};
  }
  template <class... F>
  static Values<sizeof...(F)> maxima(int n, F... f) {
    return {{fixed_max(n, f)...}};
  }
  template <class... F>
  static Values<sizeof...(F)> few_sums(int n, F... f) {
    return sums(n, f...);
  }
  template <class... F>
  static Values<sizeof...(F)> few_maxima(int n, F... f) {
    return maxima(n, f...);
  }
  static bool any(bool bit) { return bit; }
  Solo& warp() { return *this; }
  template <class F>
  void first_warp(F f) {
    f(*this);
  }
  template <class T>
  static T get(T value, int) {
    return value;
  }
  template <class T>
  static T across(T value, int) {
    return value;
  }
  template <class T>
  static void add(T* p, T x) {
    *p += x;
  }
  static uint32_t ballot(bool bit) { return bit; }
  static uint32_t largest(uint32_t x) { return x; }
  static uint64_t unite(uint64_t x) { return x; }
};

#endif  // __CUDACC__

}  // namespace LPLB_ISA
}  // namespace lplb
