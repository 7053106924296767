// Plans with transfers on the CPU. Pointers and sizes only; the caller has checked all arguments but the counts.
#pragma once

#include <memory>

#include "../core/llep.h"

namespace lplb::cpu {

// Tokens of every source rank, int32 or int64: rank r's of expert e at first[r·stride + e].
struct TransferCounts {
  const void* first;
  int bytes, n_rows;
  int64_t stride;
};

// What a plan made of: planned, or why it was not and nothing was written.
inline constexpr int64_t kPlanned = 0;
inline constexpr int64_t kTooManyTokens =
    -1;  // kMostTransferTokens or more; others are 1 + the place of a negative count

class Transfers {
 public:
  Transfers(const std::vector<int32_t>& rank, const std::vector<int32_t>& expert, int n_experts, int n_ranks,
            int n_slots, int domain);
  const TransferProblem& problem() const { return tables_.problem(); }

  int64_t joint(const TransferCounts& counts, const JointRules& rules, const int32_t* held, const TransferArrays& out);

  int64_t llep(const TransferCounts& counts, const LlepRules& rules, const TransferArrays& out);

  // How many points of the front there are, in n_points; at most `capacity`.
  int64_t front(const TransferCounts& counts, const JointRules& rules, const int32_t* held, int64_t* max_load,
                int32_t* transfers, int capacity, int* n_points);

 private:
  int64_t sum(const TransferCounts& counts);
  const JointSpace& space(bool with_held);

  TransferTables tables_;
  std::vector<int64_t> tokens_;
  int64_t total_ = 0;
  std::unique_ptr<std::byte[]> memory_, memory_with_held_;
  JointSpace space_{}, space_with_held_{};
};

}  // namespace lplb::cpu
