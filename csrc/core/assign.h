// Mapping tokens to physical experts with blocks of warps (design.md §4), after count.h has counted the same tokens.
#pragma once

#include "count.h"
#include "problem.h"
#include "shares.h"
#include "split.h"

namespace lplb {
inline namespace LPLB_ISA {

// Where the experts are: those with one slot, and the copies of the others, expert by expert, in slot order.
struct Slots {
  int n_logical, n_copies, slots_per_rank;
  const int32_t* to;           // [n_logical] the slot of an expert with one; else first_copy(its first copy)
  const int32_t* copy_slot;    // [n_copies]
  const int32_t* copy_end;     // [n_copies] behind the last copy of the same expert
  const int32_t* copy_expert;  // [n_copies]

  LPLB_HD static constexpr int32_t first_copy(int32_t i) { return -2 - i; }
};

// Whose tokens are mapped by which plan: quota [n_physical] and status [groups] of the plan that was made for the
// tokens of `from`. The tokens may be of a later batch.
struct ShareRule {
  Sources from;
  int source;
  Split split;
  int group_size;
  const int32_t *quota, *status;
};

// The source's shares of every copy [n_copies], and the number of its first token at the first copy of every expert.
// `weight` is the team's memory [n_copies].
template <class Team>
LPLB_HD inline void find_shares(Team& team, const Slots& slots, const ShareRule& rule, int32_t* weight, int32_t* start,
                                Proportion* shares) {
  team.each(slots.n_copies, [&](int c) {
    const int e = slots.copy_expert[c];
    if (c > 0 && slots.copy_expert[c - 1] == e) return;
    const Copies copies{e, slots.copy_end[c] - c, slots.copy_slot + c, rule.quota, slots.slots_per_rank};
    const auto put = [&](int i, int64_t w) { weight[c + i] = static_cast<int32_t>(w); };
    const int group = copies.rank(0) / rule.group_size;
    start[c] = static_cast<int32_t>(takes_fixed_split(rule.status[group])
                                        ? FixedShares(rule.from, copies, rule.source).put_all(put)
                                        : own_shares(rule.from, copies, rule.source, rule.split, put));
  });
  team.sync();
  team.each(slots.n_copies, [&](int c) {
    uint32_t tokens = 0;  // the last copy takes all that reach it
    LPLB_LOOP
    for (int k = c; k < slots.copy_end[c]; ++k) tokens += static_cast<uint32_t>(weight[k]);
    shares[c] = Proportion::of(static_cast<uint32_t>(weight[c]), tokens);
  });
}

// Where token k of an expert goes, counted as its shares say.
LPLB_HD inline int32_t slot_of(const Slots& slots, const Proportion* shares, int e, uint32_t k) {
  const int32_t to = slots.to[e];
  if (to >= 0) return to;
  int c = Slots::first_copy(to);
  while (!shares[c].takes(k)) ++c;
  return slots.copy_slot[c];
}

// Maps block `c` of `indices` to `physical`, which may be the same memory. counters, warp_prefix and before_block as
// for number_block; shares and start as find_shares left them; all members see them.
template <class Block, class Index>
LPLB_HD inline void assign_block(Block& block, const Index* indices, Index* physical, Cut cut, int c,
                                 const Slots& slots, const Proportion* shares, const int32_t* start, int32_t* counters,
                                 const int32_t* warp_prefix, const int32_t* before_block) {
  const int64_t end = cut.of_warp(c, block.warp_index(), block.n_warps()).end;
  number_block(
      block, indices, cut, c, slots.n_logical, counters, warp_prefix, before_block,
      [&](int e) {
        const int32_t to = slots.to[e];
        return to < 0 ? static_cast<uint32_t>(start[Slots::first_copy(to)]) : 0;
      },
      [&](int64_t i, int e, uint32_t k) {
        const int32_t slot = e >= 0 ? slot_of(slots, shares, e, k) : -1;
        if (i < end) physical[i] = static_cast<Index>(slot);
      });
}

}  // namespace LPLB_ISA
}  // namespace lplb
