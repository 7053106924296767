// The same LP as a minimum-bottleneck flow, and the augmenting paths that it and the rounding share.
//
//     t* = max over rank sets A of load(A) / v(A),   load(A) = tokens that only ranks in A can take
//
// Newton on t (Dinkelbach): start at the mean; find a flow at capacities t·v; a set that cannot shed its load gives
// the next t. Exact after a few sets. Sequential by nature: one member of a team runs it.
#pragma once

#include "problem.h"

namespace lplb {
inline namespace LPLB_ISA {

#if defined(__CUDA_ARCH__)
LPLB_HD inline int lowest_bit(uint64_t x) { return __ffsll(static_cast<long long>(x)) - 1; }
#else
LPLB_HD inline int lowest_bit(uint64_t x) { return __builtin_ctzll(x); }
#endif

// A set of ranks of one group, as bits; kWords is 1 up to 64 ranks and 2 up to 128.
template <int kWords>
struct RankSet {
  uint64_t word[kWords];

  LPLB_HD static RankSet none() {
    RankSet s;
    for (int i = 0; i < kWords; ++i) s.word[i] = 0;
    return s;
  }
  LPLB_HD static RankSet read(const uint64_t* p) {
    RankSet s;
    for (int i = 0; i < kWords; ++i) s.word[i] = p[i];
    return s;
  }
  LPLB_HD void write(uint64_t* p) const {
    for (int i = 0; i < kWords; ++i) p[i] = word[i];
  }
  LPLB_HD bool has(int r) const { return word[kWords == 1 ? 0 : r / 64] >> (r % 64) & 1; }
  LPLB_HD void add(int r) { word[kWords == 1 ? 0 : r / 64] |= uint64_t{1} << (r % 64); }
  LPLB_HD void drop(int r) { word[kWords == 1 ? 0 : r / 64] &= ~(uint64_t{1} << (r % 64)); }
  LPLB_HD bool empty() const {
    uint64_t any = 0;
    for (int i = 0; i < kWords; ++i) any |= word[i];
    return any == 0;
  }
  LPLB_HD int lowest() const {
    for (int i = 0; i < kWords - 1; ++i)
      if (word[i] != 0) return 64 * i + lowest_bit(word[i]);
    return 64 * (kWords - 1) + lowest_bit(word[kWords - 1]);
  }
  LPLB_HD RankSet operator|(RankSet o) const {
    for (int i = 0; i < kWords; ++i) o.word[i] |= word[i];
    return o;
  }
  LPLB_HD RankSet operator&(RankSet o) const {
    for (int i = 0; i < kWords; ++i) o.word[i] &= word[i];
    return o;
  }
  LPLB_HD RankSet without(RankSet o) const {
    for (int i = 0; i < kWords; ++i) o.word[i] = word[i] & ~o.word[i];
    return o;
  }
};

// A split of all tokens over replicas, seen as a flow: y_p on replicas, their sum on ranks, a limit for every rank.
// Num is int64_t (whole tokens, slack 0) or double (amounts up to `slack` count as nothing).
template <class Num, int kWords>
struct Flow {
  using Set = RankSet<kWords>;
  const Group& g;
  Num *y, *load, *limit;
  uint64_t* reach;  // [n_ranks, 2] ranks that a rank can send tokens to directly
  Num slack;
  Set over, under;  // ranks above and below their limit

  LPLB_HD Set ranks_of(int e) const { return Set::read(g.expert_ranks + 2 * e); }

  LPLB_HD void classify() {
    over = under = Set::none();
    for (int r = 0; r < g.n_ranks; ++r) {
      if (load[r] > limit[r] + slack) over.add(r);
      if (load[r] < limit[r] - slack) under.add(r);
    }
  }

  LPLB_HD void refresh_reach(int r) {
    Set s = Set::none();
    for (int i = g.rank_begin[r]; i < g.rank_begin[r + 1]; ++i) {
      const uint64_t gives = y[g.rank_replica[i]] > slack ? ~uint64_t{0} : 0;
      for (int w = 0; w < kWords; ++w) s.word[w] |= gives & g.rank_replica_ranks[2 * i + w];
    }
    s.write(reach + 2 * r);
  }

  // The replica with most tokens on rank `from` whose expert has a replica on rank `to`.
  LPLB_HD int carrier(int from, int to) const {
    int best = -1;
    for (int i = g.rank_begin[from]; i < g.rank_begin[from + 1]; ++i) {
      const int p = g.rank_replica[i];
      if (y[p] > slack && Set::read(g.rank_replica_ranks + 2 * i).has(to) && (best < 0 || y[p] > y[best])) best = p;
    }
    return best;
  }

  LPLB_HD int replica_on(int e, int r) const {
    int p = g.expert_begin[e];
    while (g.replica_rank[p] != r) ++p;
    return p;
  }

  // Moves what it can along path[length] … path[0], from a rank above its limit to one below.
  LPLB_HD void push(const uint8_t* path, int length) {
    int32_t giver[kWords * 64], taker[kWords * 64];  // replicas of one expert, per step
    const int source = path[length], target = path[0];
    Num amount = load[source] - limit[source];
    if (limit[target] - load[target] < amount) amount = limit[target] - load[target];
    for (int i = length; i > 0; --i) {
      giver[i] = carrier(path[i], path[i - 1]);
      taker[i] = replica_on(g.replica_expert[giver[i]], path[i - 1]);
      if (y[giver[i]] < amount) amount = y[giver[i]];
    }
    for (int i = length; i > 0; --i) {
      y[giver[i]] -= amount;
      y[taker[i]] += amount;
      (Set::read(reach + 2 * path[i - 1]) | ranks_of(g.replica_expert[giver[i]])).write(reach + 2 * path[i - 1]);
    }
    for (int i = length; i > 0; --i)
      if (!(y[giver[i]] > slack)) refresh_reach(path[i]);
    load[source] -= amount;
    load[target] += amount;
    if (!(load[source] > limit[source] + slack)) over.drop(source);
    if (!(load[target] < limit[target] - slack)) under.drop(target);
  }

  // Finds a way down from `source` in level[depth] to level[0] = under and pushes along it. Ranks that lead nowhere
  // leave their level. False when `source` is one of them.
  LPLB_HD bool descend(int source, int depth, Set* level) {
    uint8_t path[kWords * 64 + 1];
    path[depth] = static_cast<uint8_t>(source);
    for (int k = depth; k > 0;) {
      const Set next = Set::read(reach + 2 * path[k]) & level[k - 1];
      if (!next.empty()) {
        path[--k] = static_cast<uint8_t>(next.lowest());
      } else {
        level[k].drop(path[k]);
        if (k == depth) return false;
        ++k;
      }
    }
    push(path, depth);
    level[0] = under;
    return true;
  }

  // Dinic's algorithm on rank sets: while ranks above their limit can reach ranks below theirs, it moves tokens along
  // shortest paths. False when some cannot; `stuck` is then the set of all ranks that reach no rank below its limit,
  // the set A with the largest load(A) - limit(A).
  LPLB_HD bool relieve(Set& stuck) {
    Set level[kWords * 64 + 1];  // level[k]: ranks k steps away from a rank below its limit
    while (!over.empty()) {
      Set rest = Set::none();
      for (int r = 0; r < g.n_ranks; ++r) rest.add(r);
      level[0] = under;
      rest = rest.without(under);
      int depth = 0;
      for (bool more = true; more;) {
        Set next = Set::none();
        for (Set todo = rest; !todo.empty();) {
          const int r = todo.lowest();
          todo.drop(r);
          if (!(Set::read(reach + 2 * r) & level[depth]).empty()) next.add(r);
        }
        more = !next.empty();
        if (more) level[++depth] = next;
        rest = rest.without(next);
      }
      if (over.without(rest).empty()) {
        stuck = rest;
        return false;
      }
      for (int k = 1; k <= depth; ++k)
        for (Set from = over & level[k]; !from.empty(); from = over & level[k]) descend(from.lowest(), k, level);
    }
    return true;
  }
};

struct FlowOutcome {
  double objective, bound;  // both scaled
  int cuts;
};

namespace flow {

inline constexpr double kSlack = 1e-12;  // of a mean rank load, which is 1

// Fills the ranks of expert e up to their limits, in slot order; what does not fit stays on the first.
LPLB_HD inline void fill(const Group& g, int e, double tokens, const double* limit, double* y, double* load) {
  const int begin = g.expert_begin[e], end = g.expert_begin[e + 1];
  for (int p = begin; p < end; ++p) {
    const int r = g.replica_rank[p];
    const double room = limit[r] > load[r] ? limit[r] - load[r] : 0.0;
    y[p] = room < tokens ? room : tokens;
    load[r] += y[p];
    tokens -= y[p];
  }
  y[begin] += tokens;
  load[g.replica_rank[begin]] += tokens;
}

// What only the ranks in `set` can take, in whole tokens. single_tokens: a_r in whole tokens.
template <int kWords>
LPLB_HD inline int64_t tokens_of(const Group& g, const Workspace& x, RankSet<kWords> set) {
  int64_t tokens = 0;
  for (int r = 0; r < g.n_ranks; ++r)
    if (set.has(r)) tokens += x.single_tokens[r];
  for (int e = 0; e < g.n_experts; ++e)
    if (RankSet<kWords>::read(g.expert_ranks + 2 * e).without(set).empty()) tokens += x.tokens[e];
  return tokens;
}

template <int kWords>
LPLB_HD inline double speed_of(const Group& g, RankSet<kWords> set) {
  double speed = 0.0;
  for (int r = 0; r < g.n_ranks; ++r)
    if (set.has(r)) speed += g.speed[r];
  return speed;
}

}  // namespace flow

// Leaves the optimal fractional split, scaled by mean (tokens per unit of speed), in y.
template <int kWords>
LPLB_HD inline FlowOutcome bottleneck_flow(const Group& g, const Workspace& x, double mean) {
  Flow<double, kWords> f{g, x.y, x.rank_load, x.rank_limit, x.reach, flow::kSlack, {}, {}};
  double t = 1.0;
  for (int r = 0; r < g.n_ranks; ++r) {
    f.load[r] = x.a[r];
    if (x.a[r] > t * g.speed[r]) t = x.a[r] / g.speed[r];
  }
  for (int r = 0; r < g.n_ranks; ++r) f.limit[r] = t * g.speed[r];
  for (int e = 0; e < g.n_experts; ++e) flow::fill(g, e, x.w[e], f.limit, f.y, f.load);
  for (int r = 0; r < g.n_ranks; ++r) f.refresh_reach(r);

  FlowOutcome out{0.0, 0.0, 0};
  for (RankSet<kWords> set;;) {
    f.classify();
    if (f.relieve(set)) break;
    ++out.cuts;
    const double next = static_cast<double>(flow::tokens_of(g, x, set)) / (flow::speed_of(g, set) * mean);
    if (!(next > t)) break;  // what is left is rounding: `set` is tight at this t
    t = next;
    for (int r = 0; r < g.n_ranks; ++r) f.limit[r] = t * g.speed[r];
  }
  out.bound = t;
  for (int r = 0; r < g.n_ranks; ++r) {
    const double level = f.load[r] / g.speed[r];
    out.objective = level > out.objective ? level : out.objective;
  }
  return out;
}

}  // namespace LPLB_ISA
}  // namespace lplb
