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
      const int p = g.rank_replica[i];
      if (y[p] > slack) s = s | ranks_of(g.replica_expert[p]);
    }
    s.write(reach + 2 * r);
  }

  // The replica with most tokens on rank `from` whose expert has a replica on rank `to`.
  LPLB_HD int carrier(int from, int to) const {
    int best = -1;
    for (int i = g.rank_begin[from]; i < g.rank_begin[from + 1]; ++i) {
      const int p = g.rank_replica[i];
      if (y[p] > slack && ranks_of(g.replica_expert[p]).has(to) && (best < 0 || y[p] > y[best])) best = p;
    }
    return best;
  }

  LPLB_HD int replica_on(int e, int r) const {
    int p = g.expert_begin[e];
    while (g.replica_rank[p] != r) ++p;
    return p;
  }

  // Moves what it can from rank `source` along the shortest path to a rank below its limit. False when there is no
  // such path; then `seen` is the set of all ranks that the load of `source` can reach: it cannot shed its load.
  LPLB_HD bool augment(int source, Set& seen) {
    int8_t parent[kWords * 64];
    uint8_t queue[kWords * 64];
    int head = 0, tail = 0, target = -1;
    seen = Set::none();
    seen.add(source);
    queue[tail++] = static_cast<uint8_t>(source);
    while (head < tail && target < 0) {
      const int r = queue[head++];
      Set fresh = Set::read(reach + 2 * r).without(seen);
      const Set hit = fresh & under;
      if (!hit.empty()) {
        target = hit.lowest();
        parent[target] = static_cast<int8_t>(r);
        break;
      }
      seen = seen | fresh;
      while (!fresh.empty()) {
        const int next = fresh.lowest();
        fresh.drop(next);
        parent[next] = static_cast<int8_t>(r);
        queue[tail++] = static_cast<uint8_t>(next);
      }
    }
    if (target < 0) return false;

    int32_t via[kWords * 64];  // the replica that gives tokens on the step into a rank
    Num amount = load[source] - limit[source];
    if (limit[target] - load[target] < amount) amount = limit[target] - load[target];
    for (int r = target; r != source; r = parent[r]) {
      const int p = carrier(parent[r], r);
      via[r] = p;
      if (y[p] < amount) amount = y[p];
    }
    for (int r = target; r != source; r = parent[r]) {
      const int from = via[r], e = g.replica_expert[from];
      y[from] -= amount;
      y[replica_on(e, r)] += amount;
    }
    load[source] -= amount;
    load[target] += amount;
    for (int r = target;; r = parent[r]) {
      refresh_reach(r);
      if (r == source) break;
    }
    if (!(load[source] > limit[source] + slack)) over.drop(source);
    if (!(load[target] < limit[target] - slack)) under.drop(target);
    return true;
  }

  // Augments until no rank is above its limit. False when a set of ranks cannot shed its load; `seen` is that set.
  LPLB_HD bool relieve(Set& seen) {
    while (!over.empty())
      if (!augment(over.lowest(), seen)) return false;
    return true;
  }
};

struct FlowOutcome {
  double objective, bound;  // both scaled
  int cuts;
};

namespace flow {

inline constexpr double kSlack = 1e-12;  // of a mean rank load, which is 1
inline constexpr int kSweeps = 2;

// Pours w tokens of expert e over its ranks up to one common level load_r / v_r.
LPLB_HD inline void pour(const Group& g, int e, double w, double* y, double* load) {
  const int begin = g.expert_begin[e], end = g.expert_begin[e + 1];
  if (end - begin == 2 && g.unit_speed) {
    double& a = load[g.replica_rank[begin]];
    double& b = load[g.replica_rank[begin + 1]];
    double first = 0.5 * (b - a + w);
    first = first < 0.0 ? 0.0 : first > w ? w : first;
    y[begin] = first;
    y[begin + 1] = w - first;
    a += first;
    b += w - first;
    return;
  }
  // Ranks above the level of all take nothing; without them the level is lower; repeat until all that are left fit.
  for (int p = begin; p < end; ++p) y[p] = 1.0;
  double level = 0.0;
  for (bool dropped = true; dropped;) {
    double tokens = w, speed = 0.0;
    for (int p = begin; p < end; ++p) {
      tokens += y[p] * load[g.replica_rank[p]];
      speed += y[p] * g.speed[g.replica_rank[p]];
    }
    level = tokens / speed;
    dropped = false;
    for (int p = begin; p < end; ++p) {
      const int r = g.replica_rank[p];
      if (y[p] != 0.0 && load[r] >= level * g.speed[r] && w > 0.0) {
        y[p] = 0.0;
        dropped = true;
      }
    }
  }
  for (int p = begin; p < end; ++p) {
    const int r = g.replica_rank[p];
    const double share = y[p] != 0.0 && w > 0.0 ? level * g.speed[r] - load[r] : 0.0;
    y[p] = share;
    load[r] += share;
  }
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
  for (int e = 0; e < g.n_experts; ++e) flow::pour(g, e, x.w[e], f.y, f.load);
  for (int sweep = 1; sweep < flow::kSweeps; ++sweep)
    for (int e = 0; e < g.n_experts; ++e) {
      for (int p = g.expert_begin[e]; p < g.expert_begin[e + 1]; ++p) f.load[g.replica_rank[p]] -= f.y[p];
      flow::pour(g, e, x.w[e], f.y, f.load);
    }
  for (int r = 0; r < g.n_ranks; ++r) f.refresh_reach(r);

  FlowOutcome out{0.0, 0.0, 0};
  for (RankSet<kWords> set;;) {
    for (int r = 0; r < g.n_ranks; ++r) f.limit[r] = t * g.speed[r];
    f.classify();
    if (f.relieve(set)) break;
    ++out.cuts;
    const double next = static_cast<double>(flow::tokens_of(g, x, set)) / (flow::speed_of(g, set) * mean);
    if (!(next > t)) break;  // what is left is rounding: `set` is tight at this t
    t = next;
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
