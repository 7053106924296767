// Weights that travel for one batch: what is given, and how a plan is written down.
//
// Every expert is *resident* on one rank or more: the placement. A plan lets further ranks serve it in that batch, as
// *guests*: a transfer brings the weights into one of the rank's guest slots. What guest slots hold from earlier
// batches may serve again without a transfer.
#pragma once

#include <cstdint>

#include "rank_set.h"

namespace lplb {

inline constexpr int64_t kMostTransferTokens = int64_t{1} << 52;  // of a batch: sums stay exact in float64

// What is the same for every batch.
struct TransferProblem {
  int n_experts, n_ranks;
  int n_slots;  // guest slots of a rank
  int domain;   // consecutive ranks within which weights travel; n_ranks where they may go anywhere
  int n_rows;   // of the table of transfers: more than any plan has
  const int32_t* resident_begin;  // [n_experts + 1] into resident_rank
  const int32_t* resident_rank;   // ascending within an expert
  const int32_t* home;            // [n_experts] the rank whose copy comes first: plain expert parallelism uses it
  const uint64_t* resident_set;   // [n_experts, set_words(n_ranks)] the same ranks as sets

  LPLB_HD int domain_of(int r) const { return r / domain; }
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

// The tokens of a batch and what guest slots hold from before.
struct TransferBatch {
  const int64_t* tokens;  // [n_experts] of all sources
  const int32_t* held;    // [n_ranks, n_slots], null for nothing
};

}  // namespace lplb
