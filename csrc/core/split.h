// From quotas to tokens (design.md §4): token k of the n tokens of an expert finds its replica by nested proportion.
#pragma once

#include "team.h"

namespace lplb {
inline namespace LPLB_ISA {

// One step of the nest: a replica with `quota` of the `tokens` that reach it takes token k if
// ⌊(k+1)·quota/tokens⌋ > ⌊k·quota/tokens⌋. Tokens come in order, so k is kept as remainder = k·quota mod tokens.
struct Share {
  uint32_t remainder, quota, tokens;
  int32_t hit;   // where a token goes that this replica takes: the physical expert
  int32_t miss;  // else: the physical expert of the last replica, or beyond(i): go on with share i

  LPLB_HD static constexpr int32_t beyond(int32_t i) { return -2 - i; }

  // As if the first k tokens had passed. Returns how many of them go on to the next replica.
  LPLB_HD uint64_t start_at(uint64_t k) {
    const uint64_t product = k * quota;
    const uint64_t taken = tokens > 0 ? product / tokens : 0;
    remainder = static_cast<uint32_t>(product - taken * tokens);
    return k - taken;
  }

  LPLB_HD int32_t next() {
    const uint32_t sum = remainder + quota;  // quota ≤ tokens < 2^31
    const bool take = sum >= tokens;
    remainder = take ? sum - tokens : sum;
    return take ? hit : miss;
  }
};

// The same for tokens in any order.
struct Proportion {
  double ratio;  // quota / tokens
  uint32_t quota, tokens;

  LPLB_HD static Proportion of(uint32_t quota, uint32_t tokens) {
    return {tokens > 0 ? static_cast<double>(quota) / static_cast<double>(tokens) : 0.0, quota, tokens};
  }

  // Whether token k of those that reach the replica stays; else k becomes its number among those that go on.
  LPLB_HD bool takes(uint32_t& k) const {
    auto taken = static_cast<int64_t>(static_cast<double>(k) * ratio);  // ⌊k·quota/tokens⌋, off by one at most
    auto remainder = static_cast<int64_t>(static_cast<uint64_t>(k) * quota) - taken * int64_t{tokens};
    if (remainder < 0) --taken, remainder += tokens;
    if (remainder >= tokens) ++taken, remainder -= tokens;
    if (remainder + quota >= tokens) return true;
    k -= static_cast<uint32_t>(taken);
    return false;
  }
};

}  // namespace LPLB_ISA
}  // namespace lplb
