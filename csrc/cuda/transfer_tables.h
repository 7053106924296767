// A placement whose experts may travel as the kernels read it, and what batches come with. No CUDA runtime here.
#pragma once

#include <cstddef>
#include <vector>

#include "../core/ranges.h"
#include "../core/transfer_problem.h"

namespace lplb::cuda {

// Counts of all sources, of 4 or 8 bytes; see BasicSources.
struct CountTable {
  const void* first;
  int bytes;
  int64_t stride;
  int n_rows, ranks_per_node;

  template <class Count>
  LPLB_HD BasicSources<Count> as() const {
    return {static_cast<const Count*>(first), stride, n_rows, ranks_per_node};
  }
};

// CopyTables with offsets into an image in the place of addresses.
struct CopyOffsets {
  int32_t n_experts, n_ranks, n_copies, shared;
  uint32_t expert_begin, replica_rank, replica_expert, rank_begin, rank_replica, rank_replica_ranks, expert_ranks;

  LPLB_HD CopyTables at(const std::byte* image) const {
    const auto words = [&](uint32_t offset) { return reinterpret_cast<const int32_t*>(image + offset); };
    const auto sets = [&](uint32_t offset) { return reinterpret_cast<const uint64_t*>(image + offset); };
    return {n_experts,
            n_ranks,
            n_copies,
            words(expert_begin),
            words(replica_rank),
            words(replica_expert),
            words(rank_begin),
            words(rank_replica),
            sets(rank_replica_ranks),
            sets(expert_ranks),
            shared != 0};
  }
};

// A TransferProblem in an image. The block that plans copies the image's first planning_bytes to shared memory, in
// words of 16 bytes.
struct TransferOffsets {
  int32_t n_experts, n_ranks, n_slots, domain, n_rows;
  CopyOffsets resident, of_domains;
  uint32_t planning_bytes;
  // for ranges, read in device memory
  int32_t most_residents;
  uint32_t resident_slot, home_slot;

  LPLB_HD TransferProblem problem(const std::byte* image) const {
    return {n_experts, n_ranks, n_slots, domain, n_rows, resident.at(image), of_domains.at(image)};
  }
  LPLB_HD RangeTables ranges(const std::byte* image) const {
    return {n_experts,
            n_ranks,
            n_slots,
            most_residents,
            reinterpret_cast<const int32_t*>(image + resident_slot),
            reinterpret_cast<const int32_t*>(image + home_slot)};
  }
};

struct TransferImage {
  std::vector<std::byte> bytes;
  TransferOffsets offsets;
};

TransferImage make_transfer_image(const TransferProblem& problem, const RangeTables& ranges);

}  // namespace lplb::cuda
