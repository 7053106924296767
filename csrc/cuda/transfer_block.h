// What the one block that plans transfers does, for any team: tests run it on host threads. No CUDA runtime here.
#pragma once

#include "../core/llep.h"
#include "transfer_tables.h"

namespace lplb::cuda {

// Words of `faults`, host memory. What is noted stays until the host has read it.
enum TransferFault {
  kOutside = 0,      // indices that name no expert
  kOtherCounts = 1,  // 1 + an expert of which a source has other tokens than were planned for
  kNegative = 2,     // 1 where a count was negative
  kTooMany = 3       // 1 where a batch had kMostTransferTokens or more
};

struct TransferArguments {
  const std::byte* image;  // of TransferImage
  TransferOffsets offsets;
  CountTable counts;
  const int32_t* held;  // [n_ranks, n_slots], or null
  TransferArrays out;
  std::byte* space;  // device memory for the plan, or null where the block's own has room for it
  bool staged;       // whether the block's own memory has room for the tables
  int64_t* faults;
};

struct JointArguments : TransferArguments {
  JointRules rules;
};

struct LlepArguments : TransferArguments {  // held is null
  LlepRules rules;
};

namespace transfers {

inline constexpr int kMostParts = 8;  // members that add up the tokens of one expert

// Words of memory that add_up wants.
inline size_t partial_words(int n_experts, int members) {
  return static_cast<size_t>(n_experts > members ? n_experts : members);
}

// Tokens [n_experts] of all sources; all zero where a count is negative or far too large, which is noted.
template <class Block, class Count>
LPLB_HD inline void add_up(Block& block, const BasicSources<Count>& from, int n_experts, int64_t* partial,
                           int64_t* tokens, int64_t* faults) {
  int parts = block.size() / n_experts;
  parts = parts < 1 ? 1 : parts > kMostParts ? kMostParts : parts;
  const int share = (from.n_ranks + parts - 1) / parts;
  bool negative = false, too_many = false;
  block.each(parts * n_experts, [&](int i) {
    const int e = i % n_experts, begin = i / n_experts * share;
    const int end = begin + share < from.n_ranks ? begin + share : from.n_ranks;
    int64_t sum = 0;
    in_order<16>(
        begin, end, [&](int r) { return tokens_of(from, r, e); },
        [&](int, int64_t n) {
          negative = negative || n < 0;
          too_many = too_many || n >= kMostTransferTokens;
          sum += n;  // of 128 rows at most
        });
    partial[i] = sum;
  });
  if (negative) block.note(faults + kNegative, 1);
  if (too_many) block.note(faults + kTooMany, 1);
  const bool odd = block.any(negative || too_many);  // a barrier
  block.each(n_experts, [&](int e) {
    int64_t sum = 0;
    for (int part = 0; part < parts; ++part) sum += partial[part * n_experts + e];
    tokens[e] = odd ? 0 : sum;
  });
  block.sync();
}

// Tokens of the batch. Where they are too many that is noted, and the batch is taken for one without tokens.
template <class Warp>
LPLB_HD inline int64_t total(Warp& warp, int n_experts, int64_t* tokens, int64_t* faults) {
  constexpr auto add = [](int64_t a, int64_t b) {
    return a + b < kMostTransferTokens ? a + b : kMostTransferTokens;  // every term is below 2^59
  };
  int64_t sum = 0;
  LPLB_LOOP
  for (int e = warp.rank(); e < n_experts; e += warp.size()) sum = add(sum, tokens[e]);
  sum = fold(warp, sum, add);
  if (sum < kMostTransferTokens) return sum;
  if (warp.rank() == 0) warp.note(faults + kTooMany, 1);
  warp.each(n_experts, [&](int e) { tokens[e] = 0; });
  warp.sync();
  return 0;
}

}  // namespace transfers

// Where things are in the block's memory: tables, if they are staged, then tokens, then what add_up wants and, in the
// same place, the plan's space, where that has room.
struct TransferMemory {
  size_t tokens, space;

  LPLB_HD TransferMemory(const TransferOffsets& o, bool staged) {
    tokens = staged ? o.planning_bytes : 0;
    space = tokens + (sizeof(int64_t) * o.n_experts + 15) / 16 * 16;
  }
};

// make(warp, problem, tokens, total, space): makes the plan and writes it, on the first warp.
template <class Block, class Make>
LPLB_HD inline void transfer_block(Block& block, const TransferArguments& a, std::byte* memory, Make make) {
  struct alignas(16) Word {
    uint64_t low, high;
  };
  const TransferOffsets& o = a.offsets;
  const TransferMemory at(o, a.staged);
  auto* tokens = reinterpret_cast<int64_t*>(memory + at.tokens);
  auto* partial = reinterpret_cast<int64_t*>(memory + at.space);
  block.each(a.staged ? static_cast<int>(o.planning_bytes / sizeof(Word)) : 0,
             [&](int i) { reinterpret_cast<Word*>(memory)[i] = reinterpret_cast<const Word*>(a.image)[i]; });
  if (a.counts.bytes == 8)
    transfers::add_up(block, a.counts.as<int64_t>(), o.n_experts, partial, tokens, a.faults);
  else
    transfers::add_up(block, a.counts.as<int32_t>(), o.n_experts, partial, tokens, a.faults);
  const TransferProblem problem = o.problem(a.staged ? memory : a.image);
  block.first_warp([&](auto& warp) {
    const int64_t all = transfers::total(warp, o.n_experts, tokens, a.faults);
    make(warp, problem, tokens, all, a.space != nullptr ? a.space : memory + at.space);
  });
}

template <int kWords, class Block>
LPLB_HD inline void joint_block(Block& block, const JointArguments& a, std::byte* memory) {
  transfer_block(block, a, memory,
                 [&](auto& warp, const TransferProblem& problem, const int64_t* tokens, int64_t all, std::byte* space) {
                   JointSpace x;
                   carve_joint(problem, a.held != nullptr, space, x);
                   const TransferBatch batch{tokens, a.held};
                   Joint<kWords, std::remove_reference_t<decltype(warp)>> joint(warp, problem, a.rules, batch, x);
                   joint.plan();
                   joint.write(all, a.out);
                 });
}

template <int kWords, class Block>
LPLB_HD inline void llep_block(Block& block, const LlepArguments& a, std::byte* memory) {
  transfer_block(block, a, memory,
                 [&](auto& warp, const TransferProblem& problem, const int64_t* tokens, int64_t, std::byte* space) {
                   JointSpace x;
                   carve_joint(problem, false, space, x);
                   llep_plan<kWords>(warp, problem, a.rules, tokens, x, a.out);
                 });
}

}  // namespace lplb::cuda
