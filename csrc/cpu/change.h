// The search for changes of a placement on the CPU. Pointers and sizes only; the caller has checked all arguments.
#pragma once

#include <memory>

#include "../core/rate.h"
#include "../core/relabel.h"

namespace lplb::cpu {

ChangePath find_changes(const ChangeTask& task);

// core/rate.h's for one layer.
ChangeLook look_for_changes(const ChangeTask& task, const int64_t* kept_back, int batches, const ChangeAims& aims);

// Placements of one layer, rated one after another on the same batches; core/rate.h.
class PlacementRating {
 public:
  explicit PlacementRating(const ChangeTask& task);
  ~PlacementRating();
  void rate(const int32_t* phy2log, double* imbalance);  // [n_physical], [batches]

 private:
  struct Rated;
  std::unique_ptr<Rated> rated_;
};

}  // namespace lplb::cpu
