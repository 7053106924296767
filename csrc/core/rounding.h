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
inline constexpr int kBatch = 8;                           // experts whose left-over tokens are placed at once

// The most tokens k with k / speed ≤ level as the division rounds, so that a level k / speed has room for k.
LPLB_HD inline int64_t capacity(double level, double speed) {
  if (speed == 1.0 && level < kMostTokens) return static_cast<int64_t>(level);
  const double k = std::floor(level * speed);  // off by one at most
  if (!(k < kMostTokens)) return static_cast<int64_t>(kMostTokens);
  const double least = k / speed <= level ? k : k - 1.0;
  return static_cast<int64_t>((k + 1.0) / speed <= level ? k + 1.0 : least);
}

// The least level, not below `level`, at which the ranks in `set` can hold `tokens` whole tokens.
template <int kWords, class Warp, class AnyGroup>
LPLB_HD inline double whole_level(Warp& warp, const AnyGroup& g, RankSet<kWords> set, int64_t tokens, double level) {
  const double speed = flow::speed_of(warp, g, set);
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
    for (int r = warp.rank(); r < g.n_ranks; r += warp.size()) {
      if (!set.has(r)) continue;
      const int64_t c = capacity(level, g.speed[r]);
      room += c;
      const double step = static_cast<double>(c + 1) / g.speed[r];
      next = step < next ? step : next;
    }
    room = fold(warp, room, [](int64_t a, int64_t b) { return a + b; });
    next = fold(warp, next, [](double a, double b) { return a < b ? a : b; });
    if (room >= tokens) return level;
    level = next;
  }
}

// rank_tokens: what single_tokens and quota come to.
template <class Team, class AnyGroup>
LPLB_HD inline void add_up_ranks(Team& team, const AnyGroup& g, const Workspace& x) {
  team.each(g.n_ranks, [&](int r) {
    int64_t tokens = x.single_tokens[r];
    in_order<4>(
        g.rank_begin[r], g.rank_begin[r + 1], [&](int i) { return x.quota[g.rank_replica[i]]; },
        [&](int, int64_t quota) { tokens += quota; });
    x.rank_tokens[r] = tokens;
  });
  team.sync();
}

// Rounds down. x.tokens keeps what is left of each expert, fewer tokens than it has replicas.
template <class Team, class AnyGroup>
LPLB_HD inline void round_down(Team& team, const AnyGroup& g, const Workspace& x, double mean) {
  team.each(g.n_experts, [&](int e) {
    int64_t left = x.tokens[e];
    in_order<4>(
        g.expert_begin[e], g.expert_begin[e + 1], [&](int p) { return static_cast<int64_t>(x.y[p] * mean); },
        [&](int p, int64_t q) {
          if (q > left) q = left;
          x.quota[p] = q;
          left -= q;
        });
    x.tokens[e] = left;
  });
  team.sync();
  add_up_ranks(team, g, x);
}

// What is left of an expert goes to its lightest rank, the first of equals, as the ranks were before its batch.
template <class Warp, class AnyGroup>
LPLB_HD inline void place_left(Warp& warp, const AnyGroup& g, const Workspace& x) {
  constexpr int kPerMember = Warp::kSolo ? kBatch : 1;
  LPLB_LOOP
  for (int first = 0; first < g.n_experts; first += kBatch) {
    int chosen[kPerMember];
    LPLB_UNROLL
    for (int i = 0; i < kPerMember; ++i) {
      const int e = first + i * warp.size() + warp.rank();
      chosen[i] = -1;
      if (e >= g.n_experts || e >= first + kBatch || x.tokens[e] == 0) continue;
      double least = 0.0;
      in_order<4>(
          g.expert_begin[e], g.expert_begin[e + 1],
          [&](int p) {
            const int r = g.replica_rank[p];
            return static_cast<double>(x.rank_tokens[r]) * g.inv_speed[r];
          },
          [&](int p, double level) {
            if (chosen[i] < 0 || level < least) chosen[i] = p, least = level;
          });
    }
    warp.sync();
    LPLB_UNROLL
    for (int i = 0; i < kPerMember; ++i) {
      if (chosen[i] < 0) continue;
      const int64_t left = x.tokens[g.replica_expert[chosen[i]]];
      x.quota[chosen[i]] += left;
      warp.add(x.rank_tokens + g.replica_rank[chosen[i]], left);
    }
    warp.sync();
  }
}

}  // namespace rounding

// From quota, as round_down left it, to whole tokens at the best level. `bound` is a lower bound in tokens, from which
// the level starts: while a set of ranks cannot get below the level, the level rises to what that set needs.
template <int kWords, class Warp, class AnyGroup>
LPLB_HD inline WholeOutcome whole_tokens(Warp& warp, const AnyGroup& g, const Workspace& x, double bound) {
  rounding::place_left(warp, g, x);

  const int64_t total = whole_sum(warp, g.n_ranks, [&](int r) { return x.rank_tokens[r]; });
  Flow<int64_t, kWords, Warp, AnyGroup> f{
      warp, g, x.quota, x.rank_tokens, x.rank_capacity, x.reach, x.level, x.path, x.giver, x.taker, 0, {}, {}};
  RankSet<kWords> set = RankSet<kWords>::first(g.n_ranks);
  double level = rounding::whole_level(warp, g, set, total, bound * (1.0 - rounding::kBoundNoise));
  WholeOutcome out{0, 0.0, 0.0};
  for (bool ready = false;;) {
    warp.each(g.n_ranks, [&](int r) { f.limit[r] = rounding::capacity(level, g.speed[r]); });
    warp.sync();
    f.classify();
    if (f.over.empty()) break;
    if (!ready) f.find_reach();
    ready = true;
    if (f.relieve(set)) break;
    const int64_t stuck = whole_sum(warp, g.n_ranks, [&](int r) { return set.has(r) ? f.load[r] : 0; });
    const double ratio = static_cast<double>(stuck) / flow::speed_of(warp, g, set);
    out.bound = ratio > out.bound ? ratio : out.bound;
    level = rounding::whole_level(warp, g, set, stuck, level);
  }
  out.level = warp.few_maxima(g.n_ranks, [&](int r) { return static_cast<double>(f.load[r]) / g.speed[r]; })[0];
  out.max_load = static_cast<int64_t>(std::ceil(out.level));
  return out;
}

}  // namespace LPLB_ISA
}  // namespace lplb
