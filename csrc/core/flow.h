// The same LP as a minimum-bottleneck flow, and the augmenting paths that it and the rounding share.
//
//     t* = max over rank sets A of load(A) / v(A),   load(A) = tokens that only ranks in A can take
//
// Newton on t (Dinkelbach): start at the mean; find a flow at capacities t·v; a set that cannot shed its load gives
// the next t. Exact after a few sets. One path after another: the first warp of a team runs it, and asks about all
// ranks, or all replicas of a rank, at once.
#pragma once

#include <cstring>

#include "problem.h"
#include "rank_set.h"

namespace lplb {
inline namespace LPLB_ISA {

// A split of all tokens over replicas, seen as a flow: y_p on replicas, their sum on ranks, a limit for every rank.
// Num is int64_t (whole tokens, slack 0) or double (amounts up to `slack` count as nothing). The values are in memory
// that the warp shares; one member writes, sync() follows, and the sets are the same on every member.
template <class Num, int kWords, class Warp, class AnyGroup>
struct Flow {
  using Set = RankSet<kWords>;
  Warp& warp;
  const AnyGroup& g;
  Num *y, *load, *limit;
  uint64_t *reach, *level;  // [n_ranks, kWords] ranks that a rank can send tokens to directly; [n_ranks + 1, kWords]
  int32_t *path, *giver, *taker;
  Num slack;
  Set over, under;  // ranks above and below their limit

  LPLB_HD static uint64_t order(int64_t x) { return static_cast<uint64_t>(x); }
  LPLB_HD static uint64_t order(double x) {  // positive doubles are ordered like their bits
    uint64_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
  }
  LPLB_HD Set held_with(int i) const { return Set::read(g.rank_replica_ranks + kWords * i); }
  LPLB_HD Set reach_of(int r) const { return Set::read(reach + kWords * r); }
  LPLB_HD bool is_over(int r) const { return load[r] > limit[r] + slack; }
  LPLB_HD bool is_under(int r) const { return load[r] < limit[r] - slack; }

  LPLB_HD void classify() {
    over = ranks_where<kWords>(warp, g.n_ranks, [&](int r) { return is_over(r); });
    under = ranks_where<kWords>(warp, g.n_ranks, [&](int r) { return is_under(r); });
  }

  // The reach of all ranks.
  LPLB_HD void find_reach() {
    warp.each(g.n_ranks, [&](int r) {
      Set s = Set::none();
      struct Held {
        bool gives;
        Set ranks;
      };
      in_order<4, true>(
          g.rank_begin[r], g.rank_begin[r + 1], [&](int i) { return Held{y[g.rank_replica[i]] > slack, held_with(i)}; },
          [&](int, Held held) {
            if (held.gives) s = s | held.ranks;
          });
      s.write(reach + kWords * r);
    });
    warp.sync();
  }

  LPLB_HD void refresh_reach(int r) {
    Set s = Set::none();
    LPLB_LOOP
    for (int i = g.rank_begin[r] + warp.rank(); i < g.rank_begin[r + 1]; i += warp.size()) {
      const uint64_t gives = y[g.rank_replica[i]] > slack ? ~uint64_t{0} : 0;
      const Set held = held_with(i);
      LPLB_UNROLL
      for (int w = 0; w < kWords; ++w) s.word[w] |= gives & held.word[w];
    }
    LPLB_UNROLL
    for (int w = 0; w < kWords; ++w) s.word[w] = warp.unite(s.word[w]);
    if (warp.rank() == 0) s.write(reach + kWords * r);
  }

  struct Carrier {
    int replica;
    Num tokens;
  };

  // The replica with most tokens on rank `from`, the first of equals, whose expert has a replica on rank `to`. By one
  // member.
  LPLB_HD Carrier carrier(int from, int to) const {
    struct Held {
      int replica;
      Num tokens;
      bool there;
    };
    Carrier found{0, slack};
    in_order<8, true>(
        g.rank_begin[from], g.rank_begin[from + 1],
        [&](int i) {
          const int p = g.rank_replica[i];
          return Held{p, y[p], held_with(i).has(to)};
        },
        [&](int, Held held) {
          if (held.there && held.tokens > found.tokens) found = {held.replica, held.tokens};
        });
    return found;
  }

  LPLB_HD void set_load(int r, Num tokens) {
    if (warp.rank() == 0) load[r] = tokens;
    if (!(tokens > limit[r] + slack)) over.drop(r);
    if (!(tokens < limit[r] - slack)) under.drop(r);
  }

  // A step of a path moves tokens between replicas of one expert. Members take steps; a replica may take tokens in one
  // and give them in the next.
  //
  // Moves what it can along path[length] … path[0], from a rank above its limit to one below.
  LPLB_HD void push(int source, int target, int length) {
    const Num excess = load[source], room = load[target];  // so far
    Num amount = excess - limit[source];
    if (limit[target] - room < amount) amount = limit[target] - room;
    if (!Warp::kSolo && length <= warp.size())
      amount = push_at_once(length, amount);
    else
      amount = push_in_turn(length, amount);
    set_load(source, excess - amount);
    set_load(target, room + amount);
    warp.sync();
  }

  // A step for each member. Returns how much was moved, at most `amount`.
  LPLB_HD Num push_at_once(int length, Num amount) {
    const int i = length - warp.rank();
    const bool takes_part = i > 0;
    int to_rank = 0, to = 0;
    Carrier from{0, amount};
    Set ranks = Set::none();
    if (takes_part) {
      to_rank = path[i - 1];
      from = carrier(path[i], to_rank);
      const int e = g.replica_expert[from.replica];
      ranks = Set::read(g.expert_ranks + kWords * e);
      to = g.expert_begin[e] + ranks.count_below(to_rank);
    }
    amount = warp.get(least_of_first(warp, length, from.tokens < amount ? from.tokens : amount), 0);
    warp.sync();  // everybody has found a carrier
    if (takes_part) {
      y[to] += amount;
      (reach_of(to_rank) | ranks).write(reach + kWords * to_rank);
    }
    warp.sync();
    bool emptied = false;
    if (takes_part) {
      const Num left = y[from.replica] - amount;
      y[from.replica] = left;
      emptied = !(left > slack);
    }
    warp.sync();
    for (uint32_t left = warp.ballot(emptied); left != 0; left &= left - 1)
      refresh_reach(path[length - lowest_bit(left)]);
    return amount;
  }

  // The same for one thread, and for a path of more steps than a warp has members.
  LPLB_HD Num push_in_turn(int length, Num amount) {
    LPLB_LOOP
    for (int i = length - warp.rank(); i > 0; i -= warp.size()) {
      const Carrier from = carrier(path[i], path[i - 1]);
      const int e = g.replica_expert[from.replica];
      giver[i] = from.replica;
      taker[i] = g.expert_begin[e] + Set::read(g.expert_ranks + kWords * e).count_below(path[i - 1]);
      if (from.tokens < amount) amount = from.tokens;
    }
    amount = warp.get(least_of_first(warp, length, amount), 0);
    warp.sync();  // everybody has found its carriers
    LPLB_LOOP
    for (int i = length - warp.rank(); i > 0; i -= warp.size()) {
      y[taker[i]] += amount;
      const Set ranks = Set::read(g.expert_ranks + kWords * g.replica_expert[giver[i]]);
      (reach_of(path[i - 1]) | ranks).write(reach + kWords * path[i - 1]);
    }
    warp.sync();
    LPLB_LOOP
    for (int i = length - warp.rank(); i > 0; i -= warp.size()) y[giver[i]] -= amount;
    warp.sync();
    LPLB_LOOP
    for (int first = length; first > 0; first -= warp.size()) {
      const int i = first - warp.rank();
      uint32_t emptied = warp.ballot(i > 0 && !(y[giver[i]] > slack));
      for (; emptied != 0; emptied &= emptied - 1) refresh_reach(path[first - lowest_bit(emptied)]);
    }
    return amount;
  }

  // Finds a way down from `source` in level[depth] to level[0] = under and pushes along it. Ranks that lead nowhere
  // leave their level. False when `source` is one of them.
  LPLB_HD bool descend(int source, int depth) {
    int at = source, k = depth;
    if (warp.rank() == 0) path[k] = at;
    while (k > 0) {
      const Set next = reach_of(at) & Set::read(level + kWords * (k - 1));
      if (!next.empty()) {
        at = next.lowest();
        --k;
        if (warp.rank() == 0) path[k] = at;
        continue;
      }
      warp.sync();  // everybody has read this level, and one member has written the path
      if (warp.rank() == 0) {
        Set left = Set::read(level + kWords * k);
        left.drop(at);
        left.write(level + kWords * k);
      }
      warp.sync();
      if (k == depth) return false;
      at = path[++k];
    }
    warp.sync();
    push(source, at, depth);
    if (warp.rank() == 0) under.write(level);
    warp.sync();
    return true;
  }

  // The ranks of `rest` that can send tokens into `to`. own: of a warp's member the reach of every kWarpSize-th rank.
  static constexpr int kOwn = Warp::kSolo ? 1 : 64 * kWords / kWarpSize;
  LPLB_HD Set senders(const Set* own, Set rest, Set to) {
    if constexpr (Warp::kSolo) {
      return ranks_within(warp, rest, g.n_ranks, [&](int r) { return !(reach_of(r) & to).empty(); });
    } else {
      Set s = Set::none();
      LPLB_UNROLL
      for (int k = 0; k < kOwn; ++k)
        s.word[k / 2] |= uint64_t{warp.ballot(!(own[k] & to).empty())} << (k % 2 * kWarpSize);
      return s & rest;
    }
  }

  // Dinic's algorithm on rank sets: while ranks above their limit can reach ranks below theirs, it moves tokens along
  // shortest paths. False when some cannot; `stuck` is then the set of all ranks that reach no rank below its limit,
  // the set A with the largest load(A) - limit(A).
  LPLB_HD bool relieve(Set& stuck) {
    while (!over.empty()) {
      warp.sync();
      Set reached = under,
          rest = Set::first(g.n_ranks).without(under);  // level[k]: k steps from a rank below its limit
      if (warp.rank() == 0) reached.write(level);
      Set own[kOwn];
      LPLB_UNROLL
      for (int k = 0; k < kOwn; ++k) {
        const int r = kWarpSize * k + warp.rank();
        own[k] = !Warp::kSolo && r < g.n_ranks ? reach_of(r) : Set::none();
      }
      int depth = 0;
      for (;;) {
        const Set next = senders(own, rest, reached);
        if (next.empty()) break;
        ++depth;
        if (warp.rank() == 0) next.write(level + kWords * depth);
        rest = rest.without(next);
        if ((over & rest).empty()) break;  // deeper levels would start no path
        reached = next;
      }
      if (over.without(rest).empty()) {
        stuck = rest;
        return false;
      }
      warp.sync();
      for (int k = 1; k <= depth; ++k)
        for (;;) {
          const Set from = over & Set::read(level + kWords * k);
          if (from.empty()) break;
          descend(from.lowest(), k);
        }
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
template <class AnyGroup>
LPLB_HD inline void fill(const AnyGroup& g, int e, double tokens, const double* limit, double* y, double* load) {
  const int begin = g.expert_begin[e], end = g.expert_begin[e + 1];
  struct Place {
    int r;
    double load, room;
  };
  in_order<4, true>(
      begin, end,
      [&](int p) {
        const int r = g.replica_rank[p];  // no other copy's
        return Place{r, load[r], limit[r] > load[r] ? limit[r] - load[r] : 0.0};
      },
      [&](int p, Place at) {
        const double taken = at.room < tokens ? at.room : tokens;
        y[p] = taken;
        load[at.r] = at.load + taken;
        tokens -= taken;
      });
  if (!(tokens > 0.0)) return;
  y[begin] += tokens;
  load[g.replica_rank[begin]] += tokens;
}

// All experts, in their order, or a wave at a time, which comes to the same.
template <class Warp, class AnyGroup>
LPLB_HD inline void fill_all(Warp& warp, const AnyGroup& g, const double* w, const double* limit, double* y,
                             double* load) {
  if constexpr (Warp::kSolo) {
    for (int e = 0; e < g.n_experts; ++e) fill(g, e, w[e], limit, y, load);
  } else {
    LPLB_LOOP
    for (int wave = 0; wave < g.n_waves; ++wave) {
      const int begin = g.wave_begin[wave];
      warp.each(g.wave_begin[wave + 1] - begin, [&](int i) {
        const int e = g.wave_expert[begin + i];
        fill(g, e, w[e], limit, y, load);
      });
      warp.sync();
    }
  }
}

// What only the ranks in `set` can take, in whole tokens. single_tokens: a_r in whole tokens.
template <int kWords, class Warp, class AnyGroup>
LPLB_HD inline int64_t tokens_of(Warp& warp, const AnyGroup& g, const Workspace& x, RankSet<kWords> set) {
  const int64_t singles = whole_sum(warp, g.n_ranks, [&](int r) { return set.has(r) ? x.single_tokens[r] : 0; });
  return singles + whole_sum(warp, g.n_experts, [&](int e) {
           return RankSet<kWords>::read(g.expert_ranks + kWords * e).without(set).empty() ? x.tokens[e] : 0;
         });
}

template <int kWords, class Warp, class AnyGroup>
LPLB_HD inline double speed_of(Warp& warp, const AnyGroup& g, RankSet<kWords> set) {
  return warp.few_sums(g.n_ranks, [&](int r) { return set.has(r) ? g.speed[r] : 0.0; })[0];
}

}  // namespace flow

// Leaves the optimal fractional split, scaled by mean (tokens per unit of speed), in y. tightest, if not null: the last
// set whose load(A) / v(A) was met; as it was, where the start needed none.
template <int kWords, class Warp, class AnyGroup>
LPLB_HD inline FlowOutcome bottleneck_flow(Warp& warp, const AnyGroup& g, const Workspace& x, double mean,
                                           RankSet<kWords>* tightest = nullptr) {
  Flow<double, kWords, Warp, AnyGroup> f{warp,   g,       x.y,     x.rank_load,  x.rank_limit, x.reach, x.level,
                                         x.path, x.giver, x.taker, flow::kSlack, {},           {}};
  const double busiest = warp.few_maxima(g.n_ranks, [&](int r) { return x.a[r] / g.speed[r]; })[0];
  double t = busiest > 1.0 ? busiest : 1.0;
  warp.each(g.n_ranks, [&](int r) {
    f.load[r] = x.a[r];
    f.limit[r] = t * g.speed[r];
  });
  warp.sync();
  flow::fill_all(warp, g, x.w, f.limit, f.y, f.load);
  f.find_reach();

  FlowOutcome out{0.0, 0.0, 0};
  for (RankSet<kWords> set;;) {
    f.classify();
    if (f.relieve(set)) break;
    ++out.cuts;
    const double speed = flow::speed_of(warp, g, set);
    const double next = static_cast<double>(flow::tokens_of(warp, g, x, set)) / (speed * mean);
    if (!(next > t)) break;  // what is left is rounding: `set` is tight at this t
    t = next;
    if (tightest != nullptr) *tightest = set;
    warp.each(g.n_ranks, [&](int r) { f.limit[r] = t * g.speed[r]; });
    warp.sync();
  }
  out.bound = t;
  out.objective = warp.few_maxima(g.n_ranks, [&](int r) { return f.load[r] / g.speed[r]; })[0];
  return out;
}

}  // namespace LPLB_ISA
}  // namespace lplb
