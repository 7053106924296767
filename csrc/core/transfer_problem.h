// Weights that travel for one batch: what is given, and how a plan is written down.
//
// Every expert is *resident* on one rank or more: the placement. A plan lets further ranks serve it in that batch, as
// *guests*: a transfer brings the weights into one of the rank's guest slots. What guest slots hold from earlier
// batches may serve again without a transfer.
#pragma once

#include <cstdint>
#include <vector>

#include "problem.h"
#include "rank_set.h"

namespace lplb {

inline constexpr int64_t kMostTransferTokens = int64_t{1} << 52;  // of a batch: sums stay exact in float64

// Copies of experts, or what takes their place, on ranks: what `Flow` walks on. Copies are numbered expert by expert,
// by ascending rank.
struct CopyTables {
  int n_experts, n_ranks, n_copies;
  const int32_t* expert_begin;         // [n_experts + 1] first copy of an expert
  const int32_t* replica_rank;         // [n_copies]
  const int32_t* replica_expert;       // [n_copies]
  const int32_t* rank_begin;           // [n_ranks + 1] into rank_replica
  const int32_t* rank_replica;         // [n_copies] the copies on a rank, ascending
  const uint64_t* rank_replica_ranks;  // [n_copies, set_words] the ranks of the same copies' experts, as sets
  const uint64_t* expert_ranks;        // [n_experts, set_words]
  bool shared;                         // whether any expert has two copies
};

// What is the same for every batch.
struct TransferProblem {
  int n_experts, n_ranks;
  int n_slots;            // guest slots of a rank
  int domain;             // consecutive ranks within which weights travel; n_ranks where they may go anywhere
  int n_rows;             // of the table of transfers; no plan has more
  CopyTables resident;    // an expert's first copy is its home: plain expert parallelism uses no other
  CopyTables of_domains;  // the same with domains for ranks

  LPLB_HD int n_domains() const { return n_ranks / domain; }
  LPLB_HD int home(int e) const { return resident.replica_rank[resident.expert_begin[e]]; }
};

// The tokens of a batch, and what guest slots hold from before.
struct TransferBatch {
  const int64_t* tokens;  // [n_experts] of all sources, below kMostTransferTokens together
  const int32_t* held;    // [n_ranks, n_slots], -1 for nothing; null where all are empty
};

// numbers of a plan, int64 [kTransferNumbers]
enum TransferNumber {
  kTransfers = 0,     // rows of the table that are used
  kMaxLoad = 1,       // tokens on the busiest rank
  kTokens = 2,        // of the batch
  kCap = 3,           // the largest max_load that was asked for
  kFeasible = 4,      // whether it was reached
  kLeast = 5,         // no plan has a smaller max_load, with any number of transfers into any number of slots
  kMostSends = 6,     // transfers that leave one rank
  kMostReceives = 7,  // transfers that come to one rank
  kTransferNumbers = 8
};

// Where a plan is written.
struct TransferArrays {
  int64_t* quota;      // [n_experts, n_ranks] tokens of an expert that a rank serves
  int64_t* rank_load;  // [n_ranks]
  int32_t* transfers;  // [n_rows, 3] expert, from, to; -1 behind the last
  int32_t* guests;     // [n_ranks, n_slots] what each guest slot holds after the transfers, -1 for nothing
  int64_t* numbers;    // [kTransferNumbers]
  double* bound;       // [1] of which kLeast is the next whole number
};

// A copy that a plan makes: every strategy leaves a list of these.
struct Guest {
  int32_t expert, rank;
};

// Memory behind CopyTables.
class CopyStorage {
 public:
  // ranks_of: for every expert its ranks, ascending. words: of a set.
  CopyTables build(const std::vector<std::vector<int32_t>>& ranks_of, int n_ranks, int words) {
    const int n_experts = static_cast<int>(ranks_of.size());
    std::vector<std::vector<int32_t>> on_rank(n_ranks);
    expert_begin_.assign(1, 0);
    bool shared = false;
    for (int e = 0; e < n_experts; ++e) {
      uint64_t set[2] = {0, 0};
      for (const int32_t r : ranks_of[e]) {
        set[r / 64] |= uint64_t{1} << (r % 64);
        on_rank[r].push_back(static_cast<int32_t>(replica_rank_.size()));
        replica_rank_.push_back(r);
        replica_expert_.push_back(e);
      }
      expert_begin_.push_back(static_cast<int32_t>(replica_rank_.size()));
      expert_ranks_.insert(expert_ranks_.end(), set, set + words);
      shared = shared || ranks_of[e].size() > 1;
    }
    rank_begin_.assign(1, 0);
    for (int r = 0; r < n_ranks; ++r) {
      for (const int32_t p : on_rank[r]) {
        rank_replica_.push_back(p);
        const auto set = expert_ranks_.begin() + words * replica_expert_[p];
        rank_replica_ranks_.insert(rank_replica_ranks_.end(), set, set + words);
      }
      rank_begin_.push_back(static_cast<int32_t>(rank_replica_.size()));
    }
    return {n_experts,
            n_ranks,
            static_cast<int>(replica_rank_.size()),
            expert_begin_.data(),
            replica_rank_.data(),
            replica_expert_.data(),
            rank_begin_.data(),
            rank_replica_.data(),
            rank_replica_ranks_.data(),
            expert_ranks_.data(),
            shared};
  }

 private:
  std::vector<int32_t> expert_begin_, replica_rank_, replica_expert_, rank_begin_, rank_replica_;
  std::vector<uint64_t> rank_replica_ranks_, expert_ranks_;
};

// A problem and the memory behind it. The caller has checked the placement.
class TransferTables {
 public:
  // rank, expert: of every resident copy.
  TransferTables(const std::vector<int32_t>& rank, const std::vector<int32_t>& expert, int n_experts, int n_ranks,
                 int n_slots, int domain) {
    std::vector<std::vector<int32_t>> ranks(n_experts), domains(n_experts);
    for (size_t i = 0; i < rank.size(); ++i) ranks[expert[i]].push_back(rank[i]);
    for (int e = 0; e < n_experts; ++e) {
      std::sort(ranks[e].begin(), ranks[e].end());
      for (const int32_t r : ranks[e])
        if (domains[e].empty() || domains[e].back() != r / domain) domains[e].push_back(r / domain);
    }
    const int64_t places = int64_t{n_ranks} * n_slots, most = int64_t{n_experts} + 2 * n_ranks;
    problem_ = {n_experts,
                n_ranks,
                n_slots,
                domain,
                static_cast<int>(std::min(places, most)),
                residents_.build(ranks, n_ranks, set_words(n_ranks)),
                domains_.build(domains, n_ranks / domain, set_words(n_ranks))};
  }
  TransferTables(const TransferTables&) = delete;
  TransferTables& operator=(const TransferTables&) = delete;
  const TransferProblem& problem() const { return problem_; }

 private:
  CopyStorage residents_, domains_;
  TransferProblem problem_;
};

}  // namespace lplb
