// Mapping tokens to physical experts with blocks of warps (design.md §4), after count.h has counted the same tokens.
#pragma once

#include "count.h"
#include "split.h"

namespace lplb {
inline namespace LPLB_ISA {

// Where the experts are: those with one slot, and the copies of the others, expert by expert, in slot order.
struct Slots {
  int n_logical, n_copies;
  const int32_t* to;         // [n_logical] the slot of an expert with one; else first_copy(its first copy)
  const int32_t* copy_slot;  // [n_copies]
  const int32_t* copy_end;   // [n_copies] behind the last copy of the same expert

  LPLB_HD static constexpr int32_t first_copy(int32_t i) { return -2 - i; }
};

// How one quota [n_physical] is shared out: shares [n_copies].
template <class Team>
LPLB_HD inline void find_shares(Team& team, const Slots& slots, const int32_t* quota, Proportion* shares) {
  team.each(slots.n_copies, [&](int c) {
    uint32_t own = 0, tokens = 0;  // the last copy takes all that reach it
    in_order<8, true>(
        c, slots.copy_end[c], [&](int k) { return static_cast<uint32_t>(quota[slots.copy_slot[k]]); },
        [&](int k, uint32_t q) {
          if (k == c) own = q;
          tokens += q;
        });
    shares[c] = Proportion::of(own, tokens);
  });
}

// Token k of an expert over all source ranks.
LPLB_HD inline int32_t slot_of(const Slots& slots, const Proportion* shares, int e, uint32_t k) {
  const int32_t to = slots.to[e];
  if (to >= 0) return to;
  int c = Slots::first_copy(to);
  while (!shares[c].takes(k)) ++c;
  return slots.copy_slot[c];
}

// Maps block `c` of `indices` to `physical`, which may be the same memory. counters [n_warps, n_logical] is the block's
// own memory; warp_prefix as count_block left it; tokens of earlier blocks of this rank and of earlier ranks are in
// before_block and before_rank [n_logical], null where there are none. shares: all members see them.
template <class Block, class Index>
LPLB_HD inline void assign_block(Block& block, const Index* indices, Index* physical, Cut cut, int c,
                                 const Slots& slots, const Proportion* shares, int32_t* counters,
                                 const int32_t* warp_prefix, const int32_t* before_block, const int32_t* before_rank) {
  auto& warp = block.warp();
  int32_t* own = counters + block.warp_index() * slots.n_logical;
  const int32_t* before_warp = warp_prefix + block.warp_index() * slots.n_logical;
  const int rows = (slots.n_logical + kWarpSize - 1 - warp.rank()) / kWarpSize;  // of this member
  in_order<8, true>(
      0, rows,
      [&](int row) {
        const int e = row * kWarpSize + warp.rank();
        return before_warp[e] + (before_block != nullptr ? before_block[e] : 0) +
               (before_rank != nullptr ? before_rank[e] : 0);
      },
      [&](int row, int32_t before) { own[row * kWarpSize + warp.rank()] = before; });
  warp.sync();
  const Range range = cut.of_warp(c, block.warp_index(), block.n_warps());
  const uint32_t lower = (uint32_t{1} << warp.rank()) - 1;
  tokens::for_each(warp, indices, range, [&](int64_t i, Index index) {
    const int e = tokens::expert_of(index, slots.n_logical);
    const uint32_t same = warp.match(static_cast<uint32_t>(e));
    const int32_t first = e >= 0 ? own[e] : 0;
    warp.sync();
    if (e >= 0 && lowest_bit(same) == warp.rank()) own[e] = first + count_bits(same);
    warp.sync();
    const int32_t slot =
        e >= 0 ? slot_of(slots, shares, e, static_cast<uint32_t>(first + count_bits(same & lower))) : -1;
    if (i < range.end) physical[i] = static_cast<Index>(slot);
  });
}

}  // namespace LPLB_ISA
}  // namespace lplb
