// Counting the tokens of each logical expert with blocks of warps, such that assign.h knows the number of every token.
#pragma once

#include <type_traits>

#include "rank_set.h"

namespace lplb {
inline namespace LPLB_ISA {

struct Range {
  int64_t begin, end;
};

// Block c of n tokens has [c·length, (c + 1)·length), clipped. Its warps share that out in order.
struct Cut {
  int64_t n, length;

  LPLB_HD int64_t begin(int block) const { return block * length < n ? block * length : n; }
  LPLB_HD Range of_block(int block) const { return {begin(block), begin(block + 1)}; }
  LPLB_HD Range of_warp(int block, int warp, int n_warps) const {
    const Range all = of_block(block);
    const int rows = static_cast<int>((all.end - all.begin + kWarpSize - 1) / kWarpSize);
    const int64_t share = int64_t{kWarpSize} * ((rows + n_warps - 1) / n_warps);
    const int64_t from = all.begin + warp * share, to = from + share;
    return {from < all.end ? from : all.end, to < all.end ? to : all.end};
  }
};

namespace tokens {

inline constexpr int kAtOnce = 8;     // loads of a member under way
inline constexpr int kMostParts = 8;  // members that add up the blocks of one expert

// f(i, indices[i]) for the tokens of a warp, 32 in order; members beyond the end get (i, -1).
template <class Warp, class Index, class F>
LPLB_HD inline void for_each(Warp& warp, const Index* indices, Range range, F f) {
  for (int64_t base = range.begin; base < range.end; base += kAtOnce * kWarpSize) {
    Index index[kAtOnce];
    LPLB_UNROLL
    for (int j = 0; j < kAtOnce; ++j) {
      const int64_t i = base + j * kWarpSize + warp.rank();
      index[j] = i < range.end ? indices[i] : Index{-1};
    }
    LPLB_UNROLL
    for (int j = 0; j < kAtOnce; ++j)
      if (base + j * kWarpSize < range.end) f(base + j * kWarpSize + warp.rank(), index[j]);
  }
}

// In [-1, n_logical): -1 for what is masked, and for what is not allowed.
template <class Index>
LPLB_HD inline int expert_of(Index index, int n_logical) {
  using Unsigned = std::make_unsigned_t<Index>;
  return static_cast<Unsigned>(index) < static_cast<Unsigned>(n_logical) ? static_cast<int>(index) : -1;
}

}  // namespace tokens

// Counts block `c`. counters [n_warps, n_logical] is the block's own memory. Leaves in warp_prefix [n_warps, n_logical]
// the block's tokens per expert before each of its warps, and all of them in counts [n_logical]. Returns how many of a
// member's indices lie outside [-1, n_logical).
template <class Block, class Index>
LPLB_HD inline int count_block(Block& block, const Index* indices, Cut cut, int c, int n_logical, int32_t* counters,
                               int32_t* warp_prefix, int32_t* counts) {
  auto& warp = block.warp();
  int32_t* own = counters + block.warp_index() * n_logical;
  int outside = 0;
  warp.each(n_logical, [&](int e) { own[e] = 0; });
  warp.sync();
  tokens::for_each(warp, indices, cut.of_warp(c, block.warp_index(), block.n_warps()), [&](int64_t, Index index) {
    const int e = tokens::expert_of(index, n_logical);
    outside += e < 0 && index != Index{-1};
    const uint32_t same = warp.match(static_cast<uint32_t>(e));
    if (e >= 0 && lowest_bit(same) == warp.rank()) own[e] += count_bits(same);
    warp.sync();
  });
  block.sync();
  block.each(n_logical, [&](int e) {
    int32_t before = 0;
    in_order<8, true>(
        0, block.n_warps(), [&](int w) { return counters[w * n_logical + e]; },
        [&](int w, int32_t tokens) {
          warp_prefix[w * n_logical + e] = before;
          before += tokens;
        });
    counts[e] = before;
  });
  return outside;
}

// f(i, e, k) for the tokens of block `c`, by all members of a warp at once: expert e, -1 for what is not counted, and
// the token's number k among those of its expert, from first(e) on. Members beyond the end have e = -1 and i = end or
// more. counters [n_warps, n_logical] is the block's own memory; warp_prefix as count_block left it; tokens of earlier
// blocks are in before_block [n_logical], null where there are none.
template <class Block, class Index, class First, class F>
LPLB_HD inline void number_block(Block& block, const Index* indices, Cut cut, int c, int n_logical, int32_t* counters,
                                 const int32_t* warp_prefix, const int32_t* before_block, First first, F f) {
  auto& warp = block.warp();
  int32_t* own = counters + block.warp_index() * n_logical;
  const int32_t* before_warp = warp_prefix + block.warp_index() * n_logical;
  const int rows = (n_logical + kWarpSize - 1 - warp.rank()) / kWarpSize;  // of this member
  in_order<8, true>(
      0, rows,
      [&](int row) {
        const int e = row * kWarpSize + warp.rank();
        const uint32_t start = first(e);
        auto before = static_cast<uint32_t>(before_warp[e]);
        if (before_block != nullptr) before += static_cast<uint32_t>(before_block[e]);
        return before + start;
      },
      [&](int row, uint32_t before) { own[row * kWarpSize + warp.rank()] = static_cast<int32_t>(before); });
  warp.sync();
  const uint32_t lower = (uint32_t{1} << warp.rank()) - 1;
  tokens::for_each(warp, indices, cut.of_warp(c, block.warp_index(), block.n_warps()), [&](int64_t i, Index index) {
    const int e = tokens::expert_of(index, n_logical);
    const uint32_t same = warp.match(static_cast<uint32_t>(e));
    const uint32_t number = e >= 0 ? static_cast<uint32_t>(own[e]) : 0;
    warp.sync();
    if (e >= 0 && lowest_bit(same) == warp.rank()) own[e] = static_cast<int32_t>(number + count_bits(same));
    warp.sync();
    f(i, e, number + static_cast<uint32_t>(count_bits(same & lower)));
  });
}

// Once all blocks have counted: prefix [n_blocks, n_logical] from counts per block to counts up to and with each, and
// their totals to row [n_logical]. partial: at least as many words as the block has members, and as there are experts.
template <class Block>
LPLB_HD inline void scan_blocks(Block& block, int n_blocks, int n_logical, int32_t* partial, int32_t* prefix,
                                int32_t* row) {
  constexpr int kAtOnce = 16;
  int parts = block.size() / n_logical;
  parts = parts < 1 ? 1 : parts > tokens::kMostParts ? tokens::kMostParts : parts;
  const int share = (n_blocks + parts - 1) / parts;
  const auto end_of = [=](int part) { return (part + 1) * share < n_blocks ? (part + 1) * share : n_blocks; };
  block.each(parts * n_logical, [&](int i) {
    const int part = i / n_logical, e = i % n_logical;
    int32_t sum = 0;
    in_order<kAtOnce, true>(
        part * share, end_of(part), [&](int c) { return block.fresh(prefix + c * n_logical + e); },
        [&](int, int32_t tokens) { sum += tokens; });
    partial[i] = sum;
  });
  block.sync();
  block.each(parts * n_logical, [&](int i) {
    const int part = i / n_logical, e = i % n_logical;
    int32_t sum = 0;
    for (int k = 0; k < part; ++k) sum += partial[k * n_logical + e];
    in_order<kAtOnce, true>(
        part * share, end_of(part), [&](int c) { return block.fresh(prefix + c * n_logical + e); },
        [&](int c, int32_t tokens) { prefix[c * n_logical + e] = sum += tokens; });
    if (part == parts - 1) row[e] = sum;
  });
  block.sync();
}

}  // namespace LPLB_ISA
}  // namespace lplb
