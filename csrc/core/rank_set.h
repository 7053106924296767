// Sets of ranks of one group as bit masks, and the questions a warp answers about many things at once.
#pragma once

#include "team.h"

namespace lplb {
inline namespace LPLB_ISA {

#if defined(__CUDA_ARCH__)
LPLB_HD inline int lowest_bit(uint64_t x) {  // __ffsll is a longer chain of instructions
  const auto low = static_cast<uint32_t>(x), high = static_cast<uint32_t>(x >> 32);
  const int in_low = __ffs(static_cast<int>(low)) - 1, in_high = __ffs(static_cast<int>(high)) + 31;
  return low != 0 ? in_low : in_high;
}
LPLB_HD inline int count_bits(uint64_t x) { return __popcll(x); }
#else
LPLB_HD inline int lowest_bit(uint64_t x) { return __builtin_ctzll(x); }
LPLB_HD inline int count_bits(uint64_t x) { return __builtin_popcountll(x); }
#endif

// kWords is 1 up to 64 ranks and 2 up to 128.
template <int kWords>
struct RankSet {
  uint64_t word[kWords];

  LPLB_HD static RankSet none() {
    RankSet s;
    LPLB_UNROLL
    for (int i = 0; i < kWords; ++i) s.word[i] = 0;
    return s;
  }
  LPLB_HD static RankSet first(int n) {
    RankSet s = none();
    LPLB_UNROLL
    for (int i = 0; i < kWords; ++i)
      if (n >= 64 * (i + 1))
        s.word[i] = ~uint64_t{0};
      else if (n > 64 * i)
        s.word[i] = (uint64_t{1} << (n - 64 * i)) - 1;
    return s;
  }
  LPLB_HD static RankSet read(const uint64_t* p) {
    RankSet s;
    LPLB_UNROLL
    for (int i = 0; i < kWords; ++i) s.word[i] = p[i];
    return s;
  }
  LPLB_HD void write(uint64_t* p) const {
    LPLB_UNROLL
    for (int i = 0; i < kWords; ++i) p[i] = word[i];
  }
  LPLB_HD bool has(int r) const { return word_of(r) >> (r & 63) & 1; }
  LPLB_HD void add(int r) {
    LPLB_UNROLL
    for (int i = 0; i < kWords; ++i) word[i] |= bit_in(i, r);
  }
  LPLB_HD void drop(int r) {
    LPLB_UNROLL
    for (int i = 0; i < kWords; ++i) word[i] &= ~bit_in(i, r);
  }
  LPLB_HD bool empty() const {
    uint64_t any = 0;
    LPLB_UNROLL
    for (int i = 0; i < kWords; ++i) any |= word[i];
    return any == 0;
  }
  LPLB_HD int lowest() const {
    LPLB_UNROLL
    for (int i = 0; i < kWords - 1; ++i)
      if (word[i] != 0) return 64 * i + lowest_bit(word[i]);
    return 64 * (kWords - 1) + lowest_bit(word[kWords - 1]);
  }
  LPLB_HD int count_below(int r) const {
    int n = 0;
    LPLB_UNROLL
    for (int i = 0; i < kWords; ++i)
      if (kWords == 1 || r >= 64 * i)
        n += count_bits(r < 64 * (i + 1) ? word[i] & ((uint64_t{1} << (r & 63)) - 1) : word[i]);
    return n;
  }
  LPLB_HD RankSet operator|(RankSet o) const {
    LPLB_UNROLL
    for (int i = 0; i < kWords; ++i) o.word[i] |= word[i];
    return o;
  }
  LPLB_HD RankSet operator&(RankSet o) const {
    LPLB_UNROLL
    for (int i = 0; i < kWords; ++i) o.word[i] &= word[i];
    return o;
  }
  LPLB_HD RankSet without(RankSet o) const {
    LPLB_UNROLL
    for (int i = 0; i < kWords; ++i) o.word[i] = word[i] & ~o.word[i];
    return o;
  }

 private:
  LPLB_HD static uint64_t bit_in(int i, int r) { return kWords == 1 || r >> 6 == i ? uint64_t{1} << (r & 63) : 0; }
  LPLB_HD uint64_t word_of(int r) const {  // no run-time index: it would put the set into memory
    if (kWords == 1) return word[0];
    return r < 64 ? word[0] : word[kWords - 1];
  }
};

// The ranks r < n with wanted(r).
template <int kWords, class Warp, class F>
LPLB_HD inline RankSet<kWords> ranks_where(Warp& warp, int n, F wanted) {
  RankSet<kWords> s = RankSet<kWords>::none();
  LPLB_UNROLL
  for (int w = 0; w < kWords; ++w)
    for (int base = 64 * w; base < n && base < 64 * (w + 1); base += warp.size()) {
      const int r = base + warp.rank();
      s.word[w] |= uint64_t{warp.ballot(r < n && wanted(r))} << (base % 64);
    }
  return s;
}

// The same among the members of a set, the others are not asked.
template <int kWords, class Warp, class F>
LPLB_HD inline RankSet<kWords> ranks_within(Warp& warp, RankSet<kWords> set, int n, F wanted) {
  if constexpr (Warp::kSolo) {
    RankSet<kWords> s = RankSet<kWords>::none();
    while (!set.empty()) {
      const int r = set.lowest();
      set.drop(r);
      if (wanted(r)) s.add(r);
    }
    return s;
  } else {
    return ranks_where<kWords>(warp, n, [&](int r) { return set.has(r) && wanted(r); });
  }
}

// The least of the values that members 0 … n - 1 pass, on those members.
template <class Warp, class T>
LPLB_HD inline T least_of_first(Warp& warp, int n, T value) {
  LPLB_LOOP
  for (int step = 1; step < n && step < warp.size(); step *= 2) {
    const T other = warp.across(value, step);
    value = other < value ? other : value;
  }
  return value;
}

// op over all members' values, in any order.
template <class Warp, class T, class Op>
LPLB_HD inline T fold(Warp& warp, T value, Op op) {
  for (int step = warp.size() / 2; step > 0; step /= 2) value = op(value, warp.across(value, step));
  return value;
}

// Σ f(i) of whole numbers.
template <class Warp, class F>
LPLB_HD inline int64_t whole_sum(Warp& warp, int n, F f) {
  int64_t sum = 0;
  LPLB_LOOP
  for (int i = warp.rank(); i < n; i += warp.size()) sum += f(i);
  return fold(warp, sum, [](int64_t a, int64_t b) { return a + b; });
}

}  // namespace LPLB_ISA
}  // namespace lplb
