// From a fractional split to whole tokens at the integer optimum (design.md §3, "Whole tokens").
#pragma once

#include "flow.h"

namespace lplb {
inline namespace LPLB_ISA {

struct WholeOutcome {
  int64_t max_load;  // with speeds ⌈max load_r / v_r⌉
  double level;      // max load_r / v_r
  double bound;      // the best load(A)/v(A) met on the way, in tokens; 0 if none
};

namespace rounding {

inline constexpr double kBoundNoise = 1e-9;                // a bound may be this much too high in its last digits
inline constexpr double kMostTokens = 9007199254740992.0;  // 2^53: more than there are, and 128 of them fit in 64 bits

// The most tokens k with k / speed ≤ level as the division rounds, so that a level k / speed has room for k.
LPLB_HD inline int64_t capacity(double level, double speed) {
  if (speed == 1.0 && level < kMostTokens) return static_cast<int64_t>(level);
  const double k = std::floor(level * speed);  // off by one at most
  if (!(k < kMostTokens)) return static_cast<int64_t>(kMostTokens);
  const double least = k / speed <= level ? k : k - 1.0;
  return static_cast<int64_t>((k + 1.0) / speed <= level ? k + 1.0 : least);
}

// The least level, not below `level`, at which the ranks in `set` can hold `tokens` whole tokens.
template <int kWords>
LPLB_HD inline double whole_level(const Group& g, RankSet<kWords> set, int64_t tokens, double level) {
  const double speed = flow::speed_of(g, set);
  if (g.unit_speed) {  // in whole numbers: a division of large doubles could round a fraction away
    const int64_t n_ranks = static_cast<int64_t>(speed);
    const double least = static_cast<double>((tokens + n_ranks - 1) / n_ranks);
    level = std::ceil(level);
    return least > level ? least : level;
  }
  const double least = static_cast<double>(tokens) / speed;
  if (least > level) level = least;
  for (;;) {
    int64_t room = 0;
    double next = 1e300;
    for (int r = 0; r < g.n_ranks; ++r) {
      if (!set.has(r)) continue;
      const int64_t c = capacity(level, g.speed[r]);
      room += c;
      const double step = static_cast<double>(c + 1) / g.speed[r];
      next = step < next ? step : next;
    }
    if (room >= tokens) return level;
    level = next;
  }
}

// Rounds down; what is left of an expert, fewer tokens than it has replicas, goes to its lightest rank.
LPLB_HD inline void round_down(const Group& g, const Workspace& x, double mean) {
  for (int r = 0; r < g.n_ranks; ++r) x.rank_tokens[r] = x.single_tokens[r];
  for (int e = 0; e < g.n_experts; ++e) {
    int64_t left = x.tokens[e];
    for (int p = g.expert_begin[e]; p < g.expert_begin[e + 1]; ++p) {
      int64_t q = static_cast<int64_t>(x.y[p] * mean);
      if (q > left) q = left;
      x.quota[p] = q;
      x.rank_tokens[g.replica_rank[p]] += q;
      left -= q;
    }
    x.tokens[e] = left;
  }
  for (int e = 0; e < g.n_experts; ++e) {
    const int64_t left = x.tokens[e];
    if (left == 0) continue;
    int lightest = g.expert_begin[e];
    for (int p = lightest + 1; p < g.expert_begin[e + 1]; ++p) {
      const int a = g.replica_rank[p], b = g.replica_rank[lightest];
      const bool lighter = g.unit_speed ? x.rank_tokens[a] < x.rank_tokens[b]
                                        : static_cast<double>(x.rank_tokens[a]) * g.speed[b] <
                                              static_cast<double>(x.rank_tokens[b]) * g.speed[a];
      if (lighter) lightest = p;
    }
    x.quota[lightest] += left;
    x.rank_tokens[g.replica_rank[lightest]] += left;
  }
}

}  // namespace rounding

// From y (scaled by mean) to quota and rank_tokens. `bound` is a lower bound in tokens, from which the level starts:
// while a set of ranks cannot get below the level, the level rises to what that set needs. Runs on one member.
template <int kWords>
LPLB_HD inline WholeOutcome whole_tokens(const Group& g, const Workspace& x, double mean, double bound) {
  rounding::round_down(g, x, mean);

  RankSet<kWords> set = RankSet<kWords>::none();
  int64_t total = 0;
  for (int r = 0; r < g.n_ranks; ++r) {
    set.add(r);
    total += x.rank_tokens[r];
  }
  Flow<int64_t, kWords> f{g, x.quota, x.rank_tokens, x.rank_capacity, x.reach, 0, {}, {}};
  double level = rounding::whole_level(g, set, total, bound * (1.0 - rounding::kBoundNoise));
  WholeOutcome out{0, 0.0, 0.0};
  for (bool ready = false;;) {
    for (int r = 0; r < g.n_ranks; ++r) f.limit[r] = rounding::capacity(level, g.speed[r]);
    f.classify();
    if (f.over.empty()) break;
    if (!ready)
      for (int r = 0; r < g.n_ranks; ++r) f.refresh_reach(r);
    ready = true;
    if (f.relieve(set)) break;
    int64_t stuck = 0;
    for (int r = 0; r < g.n_ranks; ++r)
      if (set.has(r)) stuck += f.load[r];
    const double ratio = static_cast<double>(stuck) / flow::speed_of(g, set);
    out.bound = ratio > out.bound ? ratio : out.bound;
    level = rounding::whole_level(g, set, stuck, level);
  }
  for (int r = 0; r < g.n_ranks; ++r) {
    const double l = static_cast<double>(f.load[r]) / g.speed[r];
    out.level = l > out.level ? l : out.level;
  }
  out.max_load = static_cast<int64_t>(std::ceil(out.level));
  return out;
}

}  // namespace LPLB_ISA
}  // namespace lplb
