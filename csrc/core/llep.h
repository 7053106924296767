// Least-loaded assignment: what a rank has too many tokens of spills, with the expert's weights, to the least loaded
// ranks (Salesforce's LLEP, arXiv 2601.17111).
//
//     cap = max(1, ⌊α·⌊tokens / ranks⌋⌋)
//     experts by tokens, descending, of equals the first: its home keeps what fits under the cap beside all else that
//     is at home there and was not decided on yet; the rest goes in chunks to the least loaded ranks with room
//
// A rank's load is what it was given and what is still at home there. So an expert stays whole while the load of its
// home is within the cap, and nothing is sorted: the next expert of every rank above it is all that is looked for. Of
// the other ranks the least loaded is enough to know: where it has no room, or less than m, no other has.
//
// As published (`compat`), m only stops chunks that are not an expert's last, and what cannot be sent goes to one rank,
// which may have a chunk already: the least loaded, or, where the home had no room for the expert at all, the rank that
// was the least loaded before. The corrected way
//
//   - lets further residents take what the home has no room for, in any number, before weights travel;
//   - gives every guest m tokens or more: from what residents keep, or by a shorter chunk before it;
//   - aims at the bound where the cap is below it, since no plan keeps that;
//   - leaves what nobody has room for to the least loaded that serves the expert, or shares it with a new guest where
//     the busiest of both is then lower;
//   - is the published plan where that one is within the cap, or at least lower, and breaks no rule.
//
// Either way a rank has n_slots guests at most, and weights stay in domains where they are resident.
//
// Member r % size() of a warp keeps what belongs to rank r: nobody else touches it, and no barriers are needed.
#pragma once

#include "joint.h"

namespace lplb {
inline namespace LPLB_ISA {

struct LlepRules {
  double alpha;        // of the mean: the cap
  int64_t m;           // fewest tokens that weights are sent for; 0 or 1: any
  double lam;          // max / mean of plain expert parallelism below which it stays
  bool compat;         // as published
  int64_t max_tokens;  // no cap is above it; -1: any
};

namespace llep {

inline constexpr double kMostTokens = 4611686018427387904.0;  // 2^62: more than any cap needs

// ⌊α·⌊tokens / n_ranks⌋⌋ as float64 has it; all tokens where there are fewer than ranks.
LPLB_HD inline int64_t cap_of(const LlepRules& rules, int64_t tokens, int n_ranks) {
  const int64_t mean = tokens / n_ranks;
  const double wanted = rules.alpha * static_cast<double>(mean);
  int64_t cap = mean == 0 ? tokens : static_cast<int64_t>(wanted < kMostTokens ? wanted : kMostTokens);
  if (mean > 0 && cap < 1) cap = 1;
  return rules.max_tokens >= 0 && rules.max_tokens < cap ? rules.max_tokens : cap;
}

struct Space {
  int32_t *next, *n_guests;  // [n_ranks]
  Guest* guests;             // [n_rows] the result, beside quotas and loads
};

template <int kWords, class Warp>
struct Assignment {
  using Set = RankSet<kWords>;
  Warp& warp;
  const TransferProblem& p;
  const int64_t* tokens;  // [n_experts]
  Space x;
  int64_t *quotas, *loads;
  int64_t limit, least;  // of a rank; of a guest
  int n_guests;
  Set full;  // ranks with a guest in every slot

  enum Next : int32_t { kUnknown = -1, kNone = -2 };  // in x.next

  LPLB_HD int keeper(int r) const { return r & (warp.size() - 1); }
  LPLB_HD bool mine(int r) const { return keeper(r) == warp.rank(); }
  LPLB_HD int64_t& quota(int e, int r) const { return quotas[int64_t{e} * p.n_ranks + r]; }
  LPLB_HD int64_t load(int r) const { return warp.get(mine(r) ? loads[r] : 0, keeper(r)); }
  LPLB_HD Set residents(int e) const { return Set::read(p.resident.expert_ranks + kWords * e); }
  LPLB_HD bool is_alone(int e) const { return p.resident.expert_begin[e + 1] - p.resident.expert_begin[e] == 1; }
  LPLB_HD int least_loaded(Set set) const {
    return first_least(warp, p.n_ranks, [&](int r) { return set.has(r) ? loads[r] : -1; });
  }
  LPLB_HD bool is_rank(int r) const { return r < p.n_ranks; }

  // Plain expert parallelism; quotas that no resident has are zero.
  LPLB_HD void stay_home() {
    n_guests = 0;
    full = p.n_slots > 0 ? Set::none() : Set::first(p.n_ranks);
    warp.each(p.n_ranks, [&](int r) {
      const CopyTables& g = p.resident;
      int64_t load = 0;
      LPLB_LOOP
      for (int i = g.rank_begin[r]; i < g.rank_begin[r + 1]; ++i) {
        const int e = g.replica_expert[g.rank_replica[i]];
        const bool home = g.rank_replica[i] == g.expert_begin[e];
        quota(e, r) = home ? tokens[e] : 0;
        load += home ? tokens[e] : 0;
      }
      loads[r] = load;
      x.next[r] = kUnknown;
      x.n_guests[r] = 0;
    });
  }

  // Forgets the guests, so that stay_home() is enough for another plan.
  LPLB_HD void send_back() {
    warp.sync();  // one member has written the list
    LPLB_LOOP
    for (int i = 0; i < n_guests; ++i)
      if (mine(x.guests[i].rank)) quota(x.guests[i].expert, x.guests[i].rank) = 0;
    warp.sync();
  }

  LPLB_HD int64_t max_load() const {
    int64_t most = 0;
    LPLB_LOOP
    for (int r = warp.rank(); r < p.n_ranks; r += warp.size()) most = joint::most(most, loads[r]);
    return fold(warp, most, [](int64_t a, int64_t b) { return joint::most(a, b); });
  }

  // Experts in their order

  LPLB_HD bool is_before(int e, int other) const {
    return tokens[e] != tokens[other] ? tokens[e] > tokens[other] : e < other;
  }

  // The first expert behind `last` that is at home on rank r.
  LPLB_HD int next_of(int r, int last) const {
    const CopyTables& g = p.resident;
    int next = kNone;
    LPLB_LOOP
    for (int i = g.rank_begin[r]; i < g.rank_begin[r + 1]; ++i) {
      const int e = g.replica_expert[g.rank_replica[i]];
      if (g.rank_replica[i] != g.expert_begin[e] || tokens[e] == 0) continue;
      if ((last < 0 || is_before(last, e)) && (next == kNone || is_before(e, next))) next = e;
    }
    return next;
  }

  // The same over all ranks above the limit.
  LPLB_HD int next_expert(int last) const {
    int next = kNone;
    LPLB_LOOP
    for (int r = warp.rank(); r < p.n_ranks; r += warp.size()) {
      if (loads[r] <= limit) continue;
      if (x.next[r] == kUnknown) x.next[r] = next_of(r, last);
      const int e = x.next[r];
      if (e != kNone && (next == kNone || is_before(e, next))) next = e;
    }
    if (Warp::kSolo) return next;
    const int64_t most =
        fold(warp, next != kNone ? tokens[next] : -1, [](int64_t a, int64_t b) { return joint::most(a, b); });
    if (most < 0) return kNone;
    constexpr int32_t kLast = INT32_MAX;
    return fold(warp, next != kNone && tokens[next] == most ? next : kLast, [](int a, int b) { return b < a ? b : a; });
  }

  // Tokens from rank to rank

  LPLB_HD void add(int e, int r, int64_t n) {
    if (!mine(r)) return;
    quota(e, r) += n;
    loads[r] += n;
  }

  // Rank r takes a guest, and n tokens with it.
  LPLB_HD void welcome(int e, int r, int64_t n) {
    if (warp.rank() == 0) x.guests[n_guests] = {e, r};
    ++n_guests;
    if (warp.get(mine(r) ? ++x.n_guests[r] : 0, keeper(r)) >= p.n_slots) full.add(r);
    add(e, r, n);
  }

  // The home keeps what fits, and tells how much that is.
  LPLB_HD int64_t keep(int e) {
    const int home = p.home(e);
    const int64_t room = limit - (load(home) - tokens[e]);
    const int64_t kept = joint::most(0, joint::least(room, tokens[e]));
    add(e, home, kept - tokens[e]);
    return kept;
  }

  // As published

  LPLB_HD void spill_published(int e, int64_t m) {
    const int home = p.home(e);
    const Set reach = within_reach<kWords>(p, e);
    Set serving = residents(e);
    const auto least_loaded_other = [&] {
      Set others = reach.without(full) | serving;
      others.drop(home);
      return least_loaded(others);
    };
    const int first = least_loaded_other();
    if (!is_rank(first)) return;
    const int64_t kept = keep(e);
    LPLB_LOOP
    for (int64_t rest = tokens[e] - kept; rest > 0;) {
      int to = least_loaded_other();
      const int64_t room = limit - load(to);
      int64_t chunk = rest;
      if (room > 0 && (room >= rest || room >= m))
        chunk = joint::least(room, rest);
      else if (kept == 0)
        to = first;
      if (serving.has(to))
        add(e, to, chunk);
      else
        welcome(e, to, chunk);
      serving.add(to);
      rest -= chunk;
    }
  }

  // Corrected

  // Of an expert's tokens: those that nobody has yet, those that its residents keep.
  struct Spill {
    int expert;
    int64_t rest, kept;
    Set resident, serving, hosts;  // with tokens of it or without; as guests, too; those that could become one
  };

  // A chunk is an expert's last or leaves no room for a guest where it goes: experts and ranks together are enough
  // rows. But where experts have several residents, room for guests comes back as residents give tokens away.
  LPLB_HD int best_host(const Spill& s) const {
    return n_guests < p.n_rows ? least_loaded(s.hosts.without(full)) : p.n_ranks;
  }

  LPLB_HD void fill_residents(Spill& s) {
    LPLB_LOOP
    while (s.rest > 0) {
      const int r = least_loaded(s.resident);
      const int64_t chunk = joint::least(s.rest, limit - load(r));
      if (chunk <= 0) return;
      add(s.expert, r, chunk);
      s.rest -= chunk;
      s.kept += chunk;
    }
  }

  // A guest on rank r with n tokens, some of them from the busiest residents where n is more than the rest.
  LPLB_HD void send(Spill& s, int r, int64_t n) {
    LPLB_LOOP
    while (s.rest < n) {
      const int from = first_least(warp, p.n_ranks, [&](int i) {
        return s.resident.has(i) && quota(s.expert, i) > 0 ? kMostTransferTokens - loads[i] : -1;
      });
      const int64_t chunk = joint::least(n - s.rest, warp.get(mine(from) ? quota(s.expert, from) : 0, keeper(from)));
      add(s.expert, from, -chunk);
      s.rest += chunk;
      s.kept -= chunk;
    }
    welcome(s.expert, r, n);
    s.rest -= n;
    s.serving.add(r);
    s.hosts.drop(r);
  }

  // What the best host, with `room`, gets: all it can take, or less, so that the rest is worth another guest.
  LPLB_HD int64_t chunk_for(const Spill& s, int host, int64_t room) const {
    if (room >= s.rest) return joint::most(s.rest, least);
    if (s.rest - room >= least) return room;
    Set others = s.hosts.without(full);
    others.drop(host);
    const int next = least_loaded(others);
    return is_rank(next) && limit - load(next) >= least ? joint::most(s.rest - least, least) : room;
  }

  LPLB_HD void send_guests(Spill& s) {
    LPLB_LOOP
    while (s.rest > 0 && s.rest + s.kept >= least) {
      const int host = best_host(s);
      if (!is_rank(host)) return;
      const int64_t room = limit - load(host);
      if (room < least) return;
      send(s, host, chunk_for(s, host, room));
    }
  }

  // Nobody has room for the rest. It stays with those who serve the expert, or is shared with one more where that is
  // lower.
  LPLB_HD void force(Spill& s) {
    const int holder = least_loaded(s.serving), host = s.rest + s.kept >= least ? best_host(s) : p.n_ranks;
    if (is_rank(host)) {
      const int64_t above = load(holder) + s.rest, below = load(host);
      const int64_t chunk = joint::most(least, joint::least(s.rest, (above - below + 1) / 2));
      if (below + chunk < above) send(s, host, chunk);
    }
    add(s.expert, holder, s.rest);
  }

  LPLB_HD void spill_corrected(int e) {
    if (is_alone(e) && tokens[e] < least) return;  // cannot leave
    const Set resident = residents(e);
    const int64_t kept = keep(e);
    Spill s{e, tokens[e] - kept, kept, resident, resident, within_reach<kWords>(p, e).without(resident)};
    if (!is_alone(e)) fill_residents(s);
    send_guests(s);
    if (s.rest > 0) force(s);
  }

  // From plain expert parallelism.
  template <class Spiller>
  LPLB_HD void relieve(Spiller spill) {
    LPLB_LOOP
    for (int e = next_expert(kNone); e != kNone; e = next_expert(e)) {
      const int home = p.home(e);
      if (mine(home)) x.next[home] = kUnknown;
      spill(e);
    }
  }
  LPLB_HD void relieve_as_published(int64_t m) {
    stay_home();
    relieve([&](int e) { spill_published(e, m); });
  }
  LPLB_HD void relieve_corrected() {
    stay_home();
    relieve([&](int e) { spill_corrected(e); });
  }

  // Whether every guest has `least` tokens.
  LPLB_HD bool is_worth_it() const {
    warp.sync();
    bool worth = true;
    LPLB_LOOP
    for (int i = warp.rank(); i < n_guests; i += warp.size())
      worth = worth && quota(x.guests[i].expert, x.guests[i].rank) >= least;
    return !warp.any(!worth);
  }

  LPLB_HD void plan_corrected(int64_t m) {
    relieve_corrected();
    const int64_t most = max_load();
    if (most <= limit) return;
    send_back();
    relieve_as_published(m);
    if (max_load() < most && is_worth_it()) return;
    send_back();
    relieve_corrected();
  }
};

}  // namespace llep

// A plan, from batch.tokens alone: what guest slots held before serves nothing. Where lam lets everything stay at home
// the cap is no less than the busiest rank has, for nothing better was asked for.
template <int kWords, class Warp>
LPLB_HD inline void llep_plan(Warp& warp, const TransferProblem& p, const LlepRules& rules, const int64_t* tokens,
                              const JointSpace& x, const TransferArrays& out) {
  const TransferBatch batch{tokens, nullptr};
  const joint::Level bound = Joint<kWords, Warp>(warp, p, {}, batch, x).bound();
  const int64_t all = whole_sum(warp, p.n_experts, [&](int e) { return tokens[e]; });
  int64_t cap = llep::cap_of(rules, all, p.n_ranks);
  warp.each(p.n_experts * p.n_ranks, [&](int i) { out.quota[i] = 0; });
  warp.sync();
  llep::Assignment<kWords, Warp> a{warp,
                                   p,
                                   tokens,
                                   {x.used, x.start_used, x.guests},
                                   out.quota,
                                   out.rank_load,
                                   rules.compat ? cap : joint::most(cap, bound.whole()),
                                   joint::most(rules.m, 1),
                                   0,
                                   {}};
  a.stay_home();
  const int64_t most = a.max_load();
  const bool is_even = all == 0 || static_cast<double>(most) / (static_cast<double>(all) / p.n_ranks) < rules.lam;
  if (is_even && (rules.max_tokens < 0 || most <= rules.max_tokens))
    cap = joint::most(cap, most);
  else if (rules.compat)
    a.relieve_as_published(rules.m);
  else
    a.plan_corrected(rules.m);
  warp.sync();
  settle_guests(warp, p, batch, x.guests, a.n_guests, {all, cap, bound.whole(), bound.value()}, x.counts, out);
}

}  // namespace LPLB_ISA
}  // namespace lplb
