// One placement after another of the same experts on the same ranks, on the same batches: each solve begins with what
// the one before left.
#pragma once

#include <utility>

#include "change.h"

namespace lplb {

// What is to be gained, as lplb.plan_change has it.
struct ChangeAims {
  double gain, min_gain;  // share of what is lost that is enough; mean imbalance that is worth a search
  double spare, nearly;   // of what may be left over; of what the search found
};

// What the search found for a layer, and placements on its way rated on the batches that were kept back: `before` of
// the task's own, and of each (number of steps, imbalances) those after so many.
struct ChangeLook {
  std::vector<double> before;
  ChangePath path;
  std::vector<std::pair<int, std::vector<double>>> rated;
};

inline namespace LPLB_ISA {

template <class Solve>
class Rating {
 public:
  // The task's placement is the first, its batches those that all are rated on.
  Rating(const ChangeTask& task, Solve solve) : draft_(task, task.batches, solve) {
    std::vector<int> rows(task.batches);
    for (int b = 0; b < task.batches; ++b) rows[b] = b;
    draft_.look_at(task, rows);
  }

  // The imbalance of a placement [n_physical], group-closed as the first: [batches].
  void rate(const int32_t* phy2log, double* imbalance) {
    draft_.become(phy2log);
    draft_.solve_and_keep(imbalance);
  }

 private:
  Draft<Solve> draft_;
};

inline double mean_of(const std::vector<double>& x) {
  double sum = 0.0;
  for (const double v : x) sum += v;
  return sum / static_cast<double>(x.size());
}

// Searches if something is to be gained, and rates the last placement and those by which the first one that gains
// enough is found, by halves. task.wanted is set from the aims; without batches nothing is searched.
template <class Solve>
class ChangeLooking {
 public:
  ChangeLooking(ChangeTask task, const int64_t* kept_back, int batches, const ChangeAims& aims, Solve solve)
      : task_(task), aims_(aims), solve_(solve), rating_(rated_on(task, kept_back, batches), solve) {
    found_.before.resize(batches);
    rating_.rate(task.phy2log, found_.before.data());
  }

  ChangeLook run() {
    const double lost = mean_of(found_.before) - 1.0;
    if (task_.batches == 0 || task_.most_writes == 0 || !(task_.most_cost > 0.0) || !(lost > 0.0) ||
        lost < aims_.min_gain)
      return std::move(found_);
    task_.wanted = 1.0 + aims_.spare * (1.0 - aims_.gain) * lost;
    found_.path = ChangeSearch<Solve>(task_, solve_).run();
    const int n = static_cast<int>(found_.path.steps.size());
    if (n == 0) return std::move(found_);
    const double enough = std::min(aims_.gain * lost, aims_.nearly * gain_after(n));
    for (int low = 1, high = n; low < high;) {
      const int middle = (low - 1 + high - 1) / 2 + 1;  // halves as lplb.change's, which counts from 0
      if (gain_after(middle) >= enough)
        high = middle;
      else
        low = middle + 1;
    }
    return std::move(found_);
  }

 private:
  static ChangeTask rated_on(ChangeTask task, const int64_t* loads, int batches) {
    task.loads = loads;
    task.batches = batches;
    return task;
  }

  double gain_after(int steps) {
    std::vector<int32_t> phy2log(task_.phy2log, task_.phy2log + task_.n_physical);
    for (int i = 0; i < found_.path.steps[steps - 1].end; ++i)
      phy2log[found_.path.writes[i].slot] = found_.path.writes[i].expert;
    std::vector<double> after(found_.before.size());
    rating_.rate(phy2log.data(), after.data());
    const double gain = mean_of(found_.before) - mean_of(after);
    found_.rated.emplace_back(steps, std::move(after));
    return gain;
  }

  ChangeTask task_;
  ChangeAims aims_;
  Solve solve_;
  Rating<Solve> rating_;
  ChangeLook found_;
};

}  // namespace LPLB_ISA
}  // namespace lplb
