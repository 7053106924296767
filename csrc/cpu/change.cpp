#include "change.h"

#include "solve.h"

namespace lplb::cpu {

ChangePath find_changes(const ChangeTask& task) {
  const FindBottleneck solve = best_instruction_set().find_bottleneck;
  return ChangeSearch<FindBottleneck>(task, solve).run();
}

ChangeLook look_for_changes(const ChangeTask& task, const int64_t* kept_back, int batches, const ChangeAims& aims) {
  const FindBottleneck solve = best_instruction_set().find_bottleneck;
  return ChangeLooking<FindBottleneck>(task, kept_back, batches, aims, solve).run();
}

struct PlacementRating::Rated {
  Rating<FindBottleneck> rating;
};

PlacementRating::PlacementRating(const ChangeTask& task)
    : rated_(new Rated{{task, best_instruction_set().find_bottleneck}}) {}
PlacementRating::~PlacementRating() = default;

void PlacementRating::rate(const int32_t* phy2log, double* imbalance) { rated_->rating.rate(phy2log, imbalance); }

}  // namespace lplb::cpu
