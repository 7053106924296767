// From the copies that a strategy makes to a plan: who sends them, which guest slots take them.
#pragma once

#include "transfer_problem.h"

namespace lplb {
inline namespace LPLB_ISA {

// The first of the i < n with the least value; n where there is none. A negative value keeps an i out.
template <class Warp, class F>
LPLB_HD inline int first_least(Warp& warp, int n, F value) {
  constexpr int64_t kNone = INT64_MAX;
  int64_t least = kNone;
  int at = n;
  LPLB_LOOP
  for (int i = warp.rank(); i < n; i += warp.size()) {
    const int64_t v = value(i);
    if (v >= 0 && v < least) least = v, at = i;
  }
  if (Warp::kSolo) return at;
  // The least by the largest complement, half by half: a warp finds the largest of 32 bits in one instruction.
  const uint64_t value_bits = ~static_cast<uint64_t>(least);
  const auto high = static_cast<uint32_t>(value_bits >> 32), low = static_cast<uint32_t>(value_bits);
  bool is_least = high == warp.largest(high);
  is_least = low == warp.largest(is_least ? low : 0) && is_least;
  return static_cast<int>(~warp.largest(is_least ? ~static_cast<uint32_t>(at) : 0));
}

// The same among the members of a set of ranks; n where it is empty.
template <int kWords, class Warp, class F>
LPLB_HD inline int first_least_of(Warp& warp, RankSet<kWords> set, int n, F value) {
  if constexpr (Warp::kSolo) {
    int64_t least = INT64_MAX;
    int at = n;
    while (!set.empty()) {
      const int r = set.lowest();
      set.drop(r);
      const int64_t v = value(r);
      if (v >= 0 && v < least) least = v, at = r;
    }
    return at;
  } else {
    return first_least(warp, n, [&](int r) { return set.has(r) ? value(r) : int64_t{-1}; });
  }
}

// The ranks to which an expert's weights can travel: those of the domains that it is resident in.
template <int kWords>
LPLB_HD inline RankSet<kWords> within_reach(const TransferProblem& p, int e) {
  using Set = RankSet<kWords>;
  if (p.domain == p.n_ranks) return Set::first(p.n_ranks);
  Set s = Set::none();
  const CopyTables& domains = p.of_domains;
  LPLB_LOOP
  for (int i = domains.expert_begin[e]; i < domains.expert_begin[e + 1]; ++i) {
    const int d = domains.replica_rank[i];
    s = s | Set::first((d + 1) * p.domain).without(Set::first(d * p.domain));
  }
  return s;
}

// What a plan says of itself.
struct TransferSummary {
  int64_t tokens, cap, least;
  double bound;
};

// Puts a guest into the first empty slot of its rank, or into the first whose expert serves nothing in this plan.
LPLB_HD inline void move_in(const TransferProblem& p, Guest guest, const TransferArrays& out) {
  int32_t* slot = out.guests + int64_t{guest.rank} * p.n_slots;
  int at = 0;
  while (at < p.n_slots && slot[at] >= 0) ++at;
  if (at == p.n_slots)
    for (at = 0; out.quota[int64_t{slot[at]} * p.n_ranks + guest.rank] > 0;) ++at;
  slot[at] = guest.expert;
}

// Of the ranks that could send a guest its expert, that with the fewest transfers so far.
LPLB_HD inline int sender_of(const TransferProblem& p, Guest guest, const int32_t* sends) {
  const CopyTables& g = p.resident;
  int from = -1;
  LPLB_LOOP
  for (int c = g.expert_begin[guest.expert]; c < g.expert_begin[guest.expert + 1]; ++c) {
    const int r = g.replica_rank[c];
    if (r / p.domain == guest.rank / p.domain && (from < 0 || sends[r] < sends[from])) from = r;
  }
  return from;
}

// Chooses senders and slots for `guests`, which have tokens, are no residents and in no slot of batch.held. A rank has
// room for those of `guests` and of batch.held that have tokens on it. quota and rank_load are there; writes the rest.
// counts: memory [2, n_ranks].
template <class Warp>
LPLB_HD inline void settle_guests(Warp& warp, const TransferProblem& p, const TransferBatch& batch, const Guest* guests,
                                  int n_guests, const TransferSummary& about, int32_t* counts,
                                  const TransferArrays& out) {
  int32_t *sends = counts, *receives = counts + p.n_ranks;
  const int32_t* held = batch.held;
  warp.each(2 * p.n_ranks, [&](int i) { counts[i] = 0; });
  warp.each(p.n_ranks * p.n_slots, [&](int i) { out.guests[i] = held != nullptr ? held[i] : -1; });
  warp.each(3 * (p.n_rows - n_guests), [&](int i) { out.transfers[3 * n_guests + i] = -1; });
  warp.sync();
  if (warp.rank() == 0) {
    LPLB_LOOP
    for (int i = 0; i < n_guests; ++i) {
      const int from = sender_of(p, guests[i], sends);
      ++sends[from];
      ++receives[guests[i].rank];
      out.transfers[3 * i] = guests[i].expert;
      out.transfers[3 * i + 1] = from;
      out.transfers[3 * i + 2] = guests[i].rank;
    }
  }
  if constexpr (Warp::kSolo) {
    for (int i = 0; i < n_guests; ++i) move_in(p, guests[i], out);
  } else {
    warp.each(p.n_ranks, [&](int r) {
      LPLB_LOOP
      for (int i = 0; i < n_guests; ++i)
        if (guests[i].rank == r) move_in(p, guests[i], out);
    });
  }
  warp.sync();
  const auto most = [](int64_t a, int64_t b) { return b > a ? b : a; };
  int64_t load = 0, leave = 0, come = 0;
  LPLB_LOOP
  for (int r = warp.rank(); r < p.n_ranks; r += warp.size()) {
    load = most(load, out.rank_load[r]);
    leave = most(leave, sends[r]);
    come = most(come, receives[r]);
  }
  load = fold(warp, load, most);
  leave = fold(warp, leave, most);
  come = fold(warp, come, most);
  if (warp.rank() == 0) {
    int64_t* n = out.numbers;
    n[kTransfers] = n_guests;
    n[kMaxLoad] = load;
    n[kTokens] = about.tokens;
    n[kCap] = about.cap;
    n[kFeasible] = load <= about.cap;
    n[kLeast] = about.least;
    n[kMostSends] = leave;
    n[kMostReceives] = come;
    *out.bound = about.bound;
  }
  warp.sync();
}

}  // namespace LPLB_ISA
}  // namespace lplb
