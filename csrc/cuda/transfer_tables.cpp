#include "transfer_tables.h"

#include "image.h"

namespace lplb::cuda {

namespace {

CopyOffsets add_copies(Image& image, const CopyTables& g) {
  CopyOffsets o{};
  o.n_experts = g.n_experts;
  o.n_ranks = g.n_ranks;
  o.n_copies = g.n_copies;
  o.shared = g.shared;
  const auto words = [&](const int32_t* values, int n) {
    return static_cast<uint32_t>(image.add<int32_t>(values, static_cast<size_t>(n)));
  };
  const auto sets = [&](const uint64_t* values, int n) {
    return static_cast<uint32_t>(image.add<uint64_t>(values, static_cast<size_t>(n) * set_words(g.n_ranks)));
  };
  o.expert_begin = words(g.expert_begin, g.n_experts + 1);
  o.replica_rank = words(g.replica_rank, g.n_copies);
  o.replica_expert = words(g.replica_expert, g.n_copies);
  o.rank_begin = words(g.rank_begin, g.n_ranks + 1);
  o.rank_replica = words(g.rank_replica, g.n_copies);
  o.rank_replica_ranks = sets(g.rank_replica_ranks, g.n_copies);
  o.expert_ranks = sets(g.expert_ranks, g.n_experts);
  return o;
}

}  // namespace

TransferImage make_transfer_image(const TransferProblem& problem, const RangeTables& ranges) {
  TransferImage t;
  Image image(t.bytes);
  TransferOffsets& o = t.offsets;
  o.n_experts = problem.n_experts;
  o.n_ranks = problem.n_ranks;
  o.n_slots = problem.n_slots;
  o.domain = problem.domain;
  o.n_rows = problem.n_rows;
  o.resident = add_copies(image, problem.resident);
  o.of_domains = add_copies(image, problem.of_domains);
  o.planning_bytes = static_cast<uint32_t>(image.size());
  o.most_residents = ranges.most_residents;
  const auto pairs = static_cast<size_t>(ranges.n_experts) * ranges.n_ranks;
  o.resident_slot = static_cast<uint32_t>(image.add<int32_t>(ranges.resident_slot, pairs));
  o.home_slot = static_cast<uint32_t>(image.add<int32_t>(ranges.home_slot, ranges.n_experts));
  return t;
}

}  // namespace lplb::cuda
