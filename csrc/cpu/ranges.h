// Mapping tokens to virtual slots by range on the CPU; core/ranges.h. Pointers and sizes only; the caller has checked
// all arguments. Calls change nothing, so that several threads may make them at once.
#pragma once

#include <vector>

#include "../core/ranges.h"
#include "planner.h"

namespace lplb::cpu {

// The residents of every rank, as core/ranges.h wants them.
class RangeMap {
 public:
  // In rank order, then slot order. An expert that is twice on a rank is served by the first of its slots there.
  RangeMap(const std::vector<int32_t>& resident_rank, const std::vector<int32_t>& resident_expert, int n_logical,
           int n_ranks, int slots);

  const RangeTables& tables() const { return tables_; }

 private:
  std::vector<int32_t> resident_slot_, home_slot_;
  RangeTables tables_;
};

// What did not fit, position or expert: nothing is written then.
struct RouteFault {
  int64_t index;   // position of the first index outside [-1, n_logical), or -1
  int64_t expert;  // the first whose tokens are not as many as the source has counted, or -1
};

// Maps the tokens of rank `source` to virtual slots. send [n_ranks · width], or null: how many go to each. `slots` may
// be `indices` itself.
template <class Index, class Count>
RouteFault route(const RangeMap& map, const ServingPlan& plan, const BasicSources<Count>& from, int source,
                 const Index* indices, Chunks chunks, Index* slots, int64_t* send, int threads);

// What every source sends to every virtual slot, [from.n_ranks, n_ranks · width].
template <class Count>
void send_all(const RangeMap& map, const ServingPlan& plan, const BasicSources<Count>& from, int64_t* tokens);

}  // namespace lplb::cpu
