// Sets of ranks of one group as bit masks, and the questions a warp answers about many things at once.
#pragma once

#include "team.h"

namespace lplb {
inline namespace LPLB_ISA {

#if defined(__CUDA_ARCH__)
LPLB_HD inline int lowest_bit(uint64_t x) { return __ffsll(static_cast<long long>(x)) - 1; }
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
  LPLB_HD bool has(int r) const { return word_of(r) >> (r % 64) & 1; }
  LPLB_HD void add(int r) {
    LPLB_UNROLL
    for (int i = 0; i < kWords; ++i) word[i] |= r / 64 == i ? uint64_t{1} << (r % 64) : 0;
  }
  LPLB_HD void drop(int r) {
    LPLB_UNROLL
    for (int i = 0; i < kWords; ++i) word[i] &= ~(r / 64 == i ? uint64_t{1} << (r % 64) : 0);
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

// The least i in [begin, end) with wanted(i). There is one.
template <class Warp, class F>
LPLB_HD inline int first_where(Warp& warp, int begin, int end, F wanted) {
  for (;; begin += warp.size()) {
    const int i = begin + warp.rank();
    const uint32_t found = warp.ballot(i < end && wanted(i));
    if (found != 0) return begin + lowest_bit(found);
  }
}

// The i in [begin, end) with the largest key(i), the first of equals; -1 where every key is 0.
template <class Warp, class F>
LPLB_HD inline int first_of_largest(Warp& warp, int begin, int end, F key) {
  uint64_t most = 0;
  int where = -1;
  for (int i = begin + warp.rank(); i < end; i += warp.size()) {
    const uint64_t k = key(i);
    if (k > most) most = k, where = i;
  }
  if constexpr (!Warp::kSolo) {
    const uint32_t high = warp.largest(static_cast<uint32_t>(most >> 32));
    const bool as_high = static_cast<uint32_t>(most >> 32) == high;
    const uint32_t low = warp.largest(as_high ? static_cast<uint32_t>(most) : 0);
    const bool is_most = as_high && static_cast<uint32_t>(most) == low && where >= 0;
    const uint32_t first = ~warp.largest(is_most ? ~static_cast<uint32_t>(where) : 0);  // least where
    where = static_cast<int32_t>(first);                                                // ~0 is -1: nobody has a key
  }
  return where;
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
  for (int i = warp.rank(); i < n; i += warp.size()) sum += f(i);
  return fold(warp, sum, [](int64_t a, int64_t b) { return a + b; });
}

}  // namespace LPLB_ISA
}  // namespace lplb
