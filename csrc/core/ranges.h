// Which tokens of a source go to which copy, where weights travel for one batch (transfer_problem.h): by range. A
// source's tokens of an expert are numbered in the order of its indices; the first so many go to the first rank that
// serves the source, and so on. How many is shares.h's: its own rank first, then its node, then the rest.
//
// A copy is named by its *virtual slot*, rank · width + local: local below most_residents is a resident of that rank,
// in slot order; behind them come the guest slots.
#pragma once

#include "count.h"
#include "shares.h"

namespace lplb {
inline namespace LPLB_ISA {

// What is the same for every batch.
struct RangeTables {
  int n_experts, n_ranks, n_slots;
  int most_residents;            // of any rank
  const int32_t* resident_slot;  // [n_experts, n_ranks] virtual slot, -1 where the expert is no resident
  const int32_t* home_slot;      // [n_experts] of the first resident copy

  LPLB_HD int width() const { return most_residents + n_slots; }
};

// As TransferArrays has them.
struct ServingPlan {
  const int64_t* quota;   // [n_experts, n_ranks]
  const int32_t* guests;  // [n_ranks, n_slots]
};

// The ranges of one source: expert e's tokens below end[e, 0] go to slot[e, 0], further ones below end[e, 1] to
// slot[e, 1], …; those behind the last counted one where the last goes.
struct Ranges {
  int32_t* n;     // [n_experts] at least 1
  int32_t* end;   // [n_experts, n_ranks]; the last is INT32_MAX
  int32_t* slot;  // [n_experts, n_ranks]
};

namespace ranges {

// All ranks as copies of one expert, most of them without a quota.
struct OnAllRanks {
  int expert, n;
  const int64_t* quotas;  // [n] of this expert

  LPLB_HD int rank(int i) const { return i; }
  LPLB_HD int64_t quota(int i) const { return quotas[i]; }
};

// Where rank r has expert e, the first guest slot if it is a guest there; -1 for nowhere.
LPLB_HD inline int32_t slot_at(const RangeTables& t, const ServingPlan& plan, int e, int r) {
  const int32_t resident = t.resident_slot[e * t.n_ranks + r];
  if (resident >= 0) return resident;
  const int32_t* guests = plan.guests + r * t.n_slots;
  LPLB_LOOP
  for (int j = 0; j < t.n_slots; ++j)
    if (guests[j] == e) return r * t.width() + t.most_residents + j;
  return -1;
}

// put(r, tokens) for the ranks that serve a source's tokens of expert e, ascending. Returns the first rank that serves
// the expert at all, or -1.
template <class Count, class Put>
LPLB_HD inline int shares_of(const RangeTables& t, const ServingPlan& plan, const BasicSources<Count>& from, int source,
                             int e, Put put) {
  const OnAllRanks copies{e, t.n_ranks, plan.quota + e * t.n_ranks};
  int serving = 0, first = -1;
  LPLB_UNROLL_16
  for (int r = t.n_ranks - 1; r >= 0; --r)
    if (copies.quota(r) > 0) ++serving, first = r;
  const int64_t own = tokens_of(from, source, e);
  if (own == 0 || serving == 0) return first;
  if (serving == 1)
    put(first, own);
  else
    own_shares(from, copies, source, Split::local_first, [&](int r, int64_t tokens) {
      if (tokens > 0) put(r, tokens);
    });
  return first;
}

}  // namespace ranges

// The ranges of a source's tokens of experts [begin, end) under a plan for the tokens of `from`, and what it sends to
// each virtual slot: send [n_ranks · width] of zeros, or null. One row of `from` with ranks_per_node 0 is a source of
// no rank in particular.
template <class Team, class Count>
LPLB_HD inline void find_ranges(Team& team, const RangeTables& t, const ServingPlan& plan,
                                const BasicSources<Count>& from, int source, int begin, int end, const Ranges& out,
                                int64_t* send) {
  team.each(end - begin, [&](int i) {
    const int e = begin + i;
    int32_t *ends = out.end + e * t.n_ranks, *slots = out.slot + e * t.n_ranks;
    int n = 0;
    int64_t all = 0;
    const int first = ranges::shares_of(t, plan, from, source, e, [&](int r, int64_t tokens) {
      all = shares::least(all + tokens, INT32_MAX);
      ends[n] = static_cast<int32_t>(all);
      slots[n] = ranges::slot_at(t, plan, e, r);
      if (send != nullptr && slots[n] >= 0) send[slots[n]] = tokens;
      ++n;
    });
    if (n == 0) slots[n++] = first < 0 ? t.home_slot[e] : ranges::slot_at(t, plan, e, first);
    ends[n - 1] = INT32_MAX;
    out.n[e] = n;
  });
}

// Whether a source has another number of tokens of any expert, row [n_experts], than the plan was made for; the same on
// all members.
template <class Team, class Count>
LPLB_HD inline bool counts_differ(Team& team, const BasicSources<Count>& from, int source, const int32_t* row,
                                  int n_experts) {
  bool differs = false;
  team.each(n_experts, [&](int e) { differs = differs || row[e] != tokens_of(from, source, e); });
  return team.any(differs);
}

// Where token k of expert e goes. `only` [n_experts] is the slot of those with one range, -2 for others.
LPLB_HD inline int32_t slot_of(const RangeTables& t, const Ranges& ranges, const int32_t* only, int e, uint32_t k) {
  const int32_t slot = only[e];
  if (slot > -2) return slot;
  const int32_t* end = ranges.end + e * t.n_ranks;
  int i = 0;
  while (k >= static_cast<uint32_t>(end[i])) ++i;
  return ranges.slot[e * t.n_ranks + i];
}

// Fills `only` for slot_of.
template <class Team>
LPLB_HD inline void find_only(Team& team, const RangeTables& t, const Ranges& ranges, int32_t* only) {
  team.each(t.n_experts, [&](int e) { only[e] = ranges.n[e] == 1 ? ranges.slot[e * t.n_ranks] : -2; });
}

// Maps block `c` of `indices` to `slots`, which may be the same memory. counters, warp_prefix and before_block as for
// number_block; all members see what find_only has filled.
template <class Block, class Index>
LPLB_HD inline void route_block(Block& block, const RangeTables& t, const Ranges& ranges, const int32_t* only,
                                const Index* indices, Index* slots, Cut cut, int c, int32_t* counters,
                                const int32_t* warp_prefix, const int32_t* before_block) {
  const int64_t end = cut.of_warp(c, block.warp_index(), block.n_warps()).end;
  number_block(
      block, indices, cut, c, t.n_experts, counters, warp_prefix, before_block, [](int) { return uint32_t{0}; },
      [&](int64_t i, int e, uint32_t k) {
        const int32_t slot = e >= 0 ? slot_of(t, ranges, only, e, k) : -1;
        if (i < end) slots[i] = static_cast<Index>(slot);
      });
}

}  // namespace LPLB_ISA
}  // namespace lplb
