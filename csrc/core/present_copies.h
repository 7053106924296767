// What copies of experts can balance that are there: residents, and guests of earlier batches. All tokens start at home
// and move along augmenting paths (flow.h), in whole tokens; nothing travels for it.
#pragma once

#include "flow.h"
#include "transfer_plan.h"

namespace lplb {
inline namespace LPLB_ISA {

// Tokens that leave a copy, for a guest.
struct Spill {
  int32_t copy, rank;
  int64_t tokens;
};

// Where one plan is made.
struct JointSpace {
  int64_t *y, *load, *limit;      // per copy; per rank
  int64_t *start_y, *start_load;  // what step 2 leaves
  int64_t *kept_y, *kept_load;    // the best try so far
  int64_t* shed;                  // [2, n_ranks] what ranks can take or pass on
  uint64_t* closed;               // [n_experts, kWords] ranks that an expert cannot go to: it is there, or too far
  int32_t *used, *start_used;     // guest slots of a rank that serve tokens
  uint64_t *reach, *level;        // Flow's
  int32_t *path, *giver, *taker;
  Spill *spills, *kept_spills;  // [n_rows]
  Guest* guests;                // [n_rows]
  int32_t* counts;              // [2, n_ranks]
  // the copies where guest slots hold some: residents and those
  int32_t *expert_begin, *replica_rank, *replica_expert, *rank_begin, *rank_replica;
  uint64_t *rank_replica_ranks, *expert_ranks;
};

// Hands out the memory at `base`, or only measures it where base is null. Returns the bytes used. with_held: whether
// batches may come with guests from before.
LPLB_HD inline size_t carve_joint(const TransferProblem& p, bool with_held, std::byte* base, JointSpace& x) {
  size_t used = 0;
  auto take = [&](auto*& pointer, size_t count) {
    using T = std::remove_reference_t<decltype(*pointer)>;
    if (base != nullptr) pointer = reinterpret_cast<T*>(base + used);
    used += (count * sizeof(T) + 15) / 16 * 16;
  };
  const size_t held = with_held ? static_cast<size_t>(p.n_ranks) * p.n_slots : 0;
  const size_t e = p.n_experts, r = p.n_ranks, words = set_words(p.n_ranks), rows = p.n_rows;
  const size_t c = p.resident.n_copies + held;
  take(x.y, c);
  take(x.load, r);
  take(x.limit, r);
  take(x.start_y, c);
  take(x.start_load, r);
  take(x.kept_y, c);
  take(x.kept_load, r);
  take(x.shed, 2 * r);
  take(x.closed, words * e);
  take(x.used, r);
  take(x.start_used, r);
  take(x.reach, words * r);
  take(x.level, words * (r + 1));
  take(x.path, r + 1);
  take(x.giver, r + 1);
  take(x.taker, r + 1);
  take(x.spills, rows);
  take(x.kept_spills, rows);
  take(x.guests, rows);
  take(x.counts, 2 * r);
  const size_t built = with_held ? 1 : 0;
  take(x.expert_begin, built * (e + 1));
  take(x.replica_rank, built * c);
  take(x.replica_expert, built * c);
  take(x.rank_begin, built * (r + 1));
  take(x.rank_replica, built * c);
  take(x.rank_replica_ranks, built * words * c);
  take(x.expert_ranks, built * words * e);
  return used;
}

namespace joint {

inline constexpr int64_t kNoLimit = INT64_MAX / 4;

LPLB_HD inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
LPLB_HD inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
LPLB_HD inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// tokens / ranks
struct Level {
  int64_t tokens, ranks;
  LPLB_HD int64_t whole() const { return ceil_div(tokens, ranks); }
  LPLB_HD double value() const { return static_cast<double>(tokens) / static_cast<double>(ranks); }
};

}  // namespace joint

template <int kWords, class Warp>
class PresentCopies {
 protected:
  using Set = RankSet<kWords>;
  using Walk = Flow<int64_t, kWords, Warp, CopyTables>;

  LPLB_HD Walk walk(const CopyTables& g) const {
    return {warp_, g, x_.y, x_.load, x_.limit, x_.reach, x_.level, x_.path, x_.giver, x_.taker, int64_t{0}, {}, {}};
  }

  LPLB_HD PresentCopies(Warp& warp, const TransferProblem& p, const TransferBatch& batch, const JointSpace& x)
      : warp_(warp), p_(p), batch_(batch), x_(x), g_(p.resident) {
    if (batch.held != nullptr) build_copies();
    bound_ = find_bound();
  }

  // ---- copies: residents and what guest slots hold

  LPLB_HD void build_copies() {
    const CopyTables& from = p_.resident;
    const int n_places = p_.n_ranks * p_.n_slots;
    warp_.each(p_.n_experts,
               [&](int e) { Set::read(from.expert_ranks + kWords * e).write(x_.expert_ranks + kWords * e); });
    warp_.sync();
    if (warp_.rank() == 0) {
      LPLB_LOOP
      for (int i = 0; i < n_places; ++i) {
        const int e = batch_.held[i], r = i / p_.n_slots;
        if (e < 0 || e >= p_.n_experts || !within_reach<kWords>(p_, e).has(r)) continue;
        Set s = Set::read(x_.expert_ranks + kWords * e);
        s.add(r);
        s.write(x_.expert_ranks + kWords * e);
      }
      x_.expert_begin[0] = 0;
      LPLB_LOOP
      for (int e = 0; e < p_.n_experts; ++e)
        x_.expert_begin[e + 1] = x_.expert_begin[e] + Set::read(x_.expert_ranks + kWords * e).count_below(p_.n_ranks);
    }
    warp_.sync();
    warp_.each(p_.n_experts, [&](int e) {
      int c = x_.expert_begin[e];
      for (Set s = Set::read(x_.expert_ranks + kWords * e); !s.empty(); ++c) {
        const int r = s.lowest();
        s.drop(r);
        x_.replica_rank[c] = r;
        x_.replica_expert[c] = e;
      }
    });
    warp_.sync();
    if (warp_.rank() == 0) {
      int32_t* begin = x_.rank_begin;
      for (int r = 0; r <= p_.n_ranks; ++r) begin[r] = 0;
      const int n_copies = x_.expert_begin[p_.n_experts];
      LPLB_LOOP
      for (int c = 0; c < n_copies; ++c) ++begin[x_.replica_rank[c] + 1];
      for (int r = 0; r < p_.n_ranks; ++r) begin[r + 1] += begin[r];
      LPLB_LOOP
      for (int c = 0; c < n_copies; ++c) x_.rank_replica[begin[x_.replica_rank[c]]++] = c;
      for (int r = p_.n_ranks; r > 0; --r) begin[r] = begin[r - 1];
      begin[0] = 0;
    }
    warp_.sync();
    g_ = {p_.n_experts,
          p_.n_ranks,
          x_.expert_begin[p_.n_experts],
          x_.expert_begin,
          x_.replica_rank,
          x_.replica_expert,
          x_.rank_begin,
          x_.rank_replica,
          x_.rank_replica_ranks,
          x_.expert_ranks,
          x_.expert_begin[p_.n_experts] > p_.n_experts};
    warp_.each(g_.n_copies, [&](int i) {
      Set::read(g_.expert_ranks + kWords * g_.replica_expert[g_.rank_replica[i]])
          .write(x_.rank_replica_ranks + kWords * i);
    });
    warp_.sync();
  }

  // Copies that came for an earlier batch.
  LPLB_HD bool is_guest(int c) const {
    return !Set::read(p_.resident.expert_ranks + kWords * g_.replica_expert[c]).has(g_.replica_rank[c]);
  }

  // ---- steps 1 and 2

  // All tokens at home, `times` as many as there are.
  LPLB_HD void stay_home(const CopyTables& g, int64_t times) {
    warp_.sync();
    warp_.each(g.n_copies, [&](int c) {
      const int e = g.replica_expert[c];
      const int home = g.n_ranks == p_.n_ranks ? p_.home(e) : g.replica_rank[g.expert_begin[e]];
      x_.y[c] = g.replica_rank[c] == home ? batch_.tokens[e] * times : 0;
    });
    warp_.sync();
    add_up(g);
  }

  // The load of every rank.
  LPLB_HD void add_up(const CopyTables& g) {
    warp_.each(g.n_ranks, [&](int r) {
      int64_t load = 0;
      in_order<8, true>(
          g.rank_begin[r], g.rank_begin[r + 1], [&](int i) { return x_.y[g.rank_replica[i]]; },
          [&](int, int64_t y) { load += y; });
      x_.load[r] = load;
    });
    warp_.sync();
  }

  LPLB_HD void set_limits(int n, int64_t limit) {
    warp_.sync();
    warp_.each(n, [&](int r) { x_.limit[r] = limit; });
    warp_.sync();
  }

  LPLB_HD int64_t load_of(Set set, int n) {
    return whole_sum(warp_, n, [&](int r) { return set.has(r) ? x_.load[r] : int64_t{0}; });
  }

  LPLB_HD int64_t largest_load(int n) {
    int64_t load = 0;
    LPLB_LOOP
    for (int r = warp_.rank(); r < n; r += warp_.size()) load = joint::most(load, x_.load[r]);
    return fold(warp_, load, [](int64_t a, int64_t b) { return joint::most(a, b); });
  }

  // The largest, over sets of domains, of what only they can take, per rank. A set's load does not change when tokens
  // move where they can: what is stuck is all its own.
  LPLB_HD joint::Level find_bound() {
    const CopyTables& g = p_.of_domains;
    const int64_t total = whole_sum(warp_, p_.n_experts, [&](int e) { return batch_.tokens[e]; });
    if (g.n_ranks == 1) return {total, p_.n_ranks};
    if (!g.shared) {
      stay_home(g, 1);
      return {largest_load(g.n_ranks), p_.domain};
    }
    int64_t tokens = total, domains = g.n_ranks;
    for (;;) {  // Newton: with `domains` times the tokens a domain's share at this level is whole
      stay_home(g, domains);
      set_limits(g.n_ranks, tokens);
      Walk f = walk(g);
      f.find_reach();
      f.classify();
      Set stuck = Set::none();
      if (f.relieve(stuck)) return {tokens, domains * p_.domain};
      tokens = load_of(stuck, g.n_ranks) / domains;
      domains = stuck.count_below(g.n_ranks);
    }
  }

  // The LP in whole tokens: the least maximum that present copies allow, which is left in y.
  LPLB_HD int64_t without_transfers() {
    stay_home(g_, 1);
    int64_t limit = largest_load(g_.n_ranks);
    if (g_.shared) {
      limit = bound_.whole();
      Walk f = walk(g_);
      f.find_reach();
      for (;;) {
        set_limits(g_.n_ranks, limit);
        f.classify();
        Set stuck = Set::none();
        if (f.relieve(stuck)) break;
        limit = joint::ceil_div(load_of(stuck, g_.n_ranks), stuck.count_below(g_.n_ranks));
      }
    }
    keep_start();
    return limit;
  }

  // Tokens of all experts on a rank, most of them perhaps elsewhere.
  LPLB_HD int64_t most_held(int r) const {
    int64_t tokens = 0;
    in_order<8, true>(
        g_.rank_begin[r], g_.rank_begin[r + 1],
        [&](int i) { return batch_.tokens[g_.replica_expert[g_.rank_replica[i]]]; },
        [&](int, int64_t w) { tokens += w; });
    return tokens;
  }

  // The domain flow at this cap, and each domain's tokens on the first of its residents.
  LPLB_HD void share_out_domains(int64_t cap) {
    const CopyTables& d = p_.of_domains;
    stay_home(d, 1);
    set_limits(d.n_ranks, cap * p_.domain);
    Walk f = walk(d);
    f.find_reach();
    f.classify();
    Set stuck = Set::none();
    f.relieve(stuck);
    warp_.sync();
    warp_.each(d.n_copies, [&](int c) { x_.start_y[c] = x_.y[c]; });
    warp_.sync();
    warp_.each(g_.n_copies, [&](int c) { x_.y[c] = 0; });
    warp_.sync();
    warp_.each(d.n_copies, [&](int c) {
      const int e = d.replica_expert[c];
      int i = p_.resident.expert_begin[e];
      while (p_.resident.replica_rank[i] / p_.domain != d.replica_rank[c]) ++i;
      const int first = Set::read(g_.expert_ranks + kWords * e).count_below(p_.resident.replica_rank[i]);
      x_.y[g_.expert_begin[e] + first] = x_.start_y[c];
    });
    warp_.sync();
    add_up(g_);
  }

  // Brings ranks to the cap as far as their copies allow. What cannot be shed stays above it: on the ranks where the
  // flow leaves it, or gathered where most could be, so that few guests relieve them. by_domain: domains first shed
  // what they could not serve within; a flow between ranks alone might leave it to them. Returns how many ranks are
  // above.
  LPLB_HD int relieve_to(int64_t cap, bool gathered, bool by_domain) {
    if (!g_.shared) return n_above(cap);  // all are at home, as `without_transfers` left them
    if (by_domain)
      share_out_domains(cap);
    else
      stay_home(g_, 1);
    const int step = by_domain ? p_.domain : p_.n_ranks;
    for (int first = 0; first < p_.n_ranks; first += step) {
      const auto within = [&](int r) { return r >= first && r < first + step; };
      warp_.sync();
      warp_.each(p_.n_ranks, [&](int r) { x_.limit[r] = within(r) ? cap : x_.load[r]; });  // others keep what they have
      warp_.sync();
      Walk f = walk(g_);
      f.find_reach();
      f.classify();
      Set stuck = Set::none();
      while (!f.relieve(stuck) && gathered) {
        const int r = first_least(warp_, p_.n_ranks, [&](int i) {
          return within(i) && stuck.has(i) ? kMostTransferTokens - most_held(i) : int64_t{-1};
        });
        warp_.sync();
        if (warp_.rank() == 0) x_.limit[r] = joint::kNoLimit;
        warp_.sync();
        f.classify();
      }
      warp_.sync();
    }
    keep_start();
    return n_above(cap);
  }

  LPLB_HD int n_above(int64_t cap) {
    return ranks_where<kWords>(warp_, p_.n_ranks, [&](int r) { return x_.start_load[r] > cap; })
        .count_below(p_.n_ranks);
  }

  LPLB_HD void keep_start() {
    warp_.each(g_.n_copies, [&](int c) { x_.start_y[c] = x_.y[c]; });
    warp_.each(g_.n_ranks, [&](int r) {
      x_.start_load[r] = x_.load[r];
      int used = 0;
      if (batch_.held != nullptr)
        for (int i = g_.rank_begin[r]; i < g_.rank_begin[r + 1]; ++i)
          used += x_.y[g_.rank_replica[i]] > 0 && is_guest(g_.rank_replica[i]);
      x_.start_used[r] = used;
    });
    warp_.sync();
  }

  Warp& warp_;
  const TransferProblem& p_;
  const TransferBatch& batch_;
  JointSpace x_;
  CopyTables g_;
  joint::Level bound_{0, 1};
};

}  // namespace LPLB_ISA
}  // namespace lplb
