// A placement built for the LP, for one set of ranks and the experts that live there. Host only.
//
// What the LP can level out is what its replicas reach. So copies go to the experts with most load per copy, at their
// worst, the copies of an expert to ranks that are far apart in the graph whose edges are shared experts, so that every
// rank can shed load towards all others in few steps, with as many edges as all have. Optionally a few ranks are hubs:
// they hold replicas alone, and so have nothing that they cannot give away. Experts with one copy, which nothing moves,
// are then packed: by mean and standard deviation where experts drift each by itself, by samples where some drift
// together.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <vector>

#include "rank_set.h"

namespace lplb::placing {

// Ranks, slots on each, and the experts by number. All loads in mean rank loads.
struct Case {
  int n_experts, n_ranks, slots_per_rank;
  const double* mean;    // [n_experts]
  const double* size;    // [n_experts] what to reckon with: above the mean
  int n_samples;         // 0, or a multiple of kLanes
  const float* samples;  // [n_experts, n_samples] loads that may come together
};

// A way to build.
struct Recipe {
  int hubs;
  int quarters;     // copies go by size / copies^(quarters/4)
  int hub_copies;   // of an expert's copies at most so many are on hubs
  double share;     // of its even share that a replica is reckoned with: less than 1 where the LP may empty it
  bool by_room;     // copies go where most room is. Fits every case; others may not (see Construction::build)
  bool by_samples;  // experts with one copy are packed by samples, not by size
};

inline constexpr int kLanes = 8;  // sums of samples have as many parts

using Ranks = RankSet<2>;

// The number of copies of every expert: one each, and each further one to the largest size / copies^(quarters/4). An
// expert that drifts far gets copies as a heavy one does: its load may have to go elsewhere.
inline std::vector<int> count_copies(const Case& c, int quarters) {
  std::vector<int> copies(c.n_experts, 1);
  std::vector<double> weight(c.size, c.size + c.n_experts);
  for (int left = c.n_ranks * c.slots_per_rank - c.n_experts; left > 0; --left) {
    const auto most = std::max_element(weight.begin(), weight.end()) - weight.begin();
    const double n = ++copies[most];
    double power = n;  // exact on every machine: roots are, pow is not
    if (quarters & 1) power *= std::sqrt(std::sqrt(n));
    if (quarters & 2) power *= std::sqrt(n);
    weight[most] = copies[most] < c.n_ranks ? c.size[most] / power : -1.0;
  }
  return copies;
}

class Construction {
 public:
  Construction(const Case& c, const Recipe& recipe);
  // False where copies of one expert would have met on a rank. Going by room never ends so: with as many slots on every
  // rank and no more copies than ranks it is how Ryser builds a matrix of zeros and ones from its row and column sums
  // (Combinatorial properties of matrices of zeros and ones, 1957).
  bool build();
  // The expert of each slot [n_ranks, slots_per_rank], ascending on each rank.
  std::vector<int32_t> slots() const;

 private:
  static constexpr double kDegreeCost = 4.0, kLoadCost = 0.5;
  static constexpr int kFarthest = 8;        // distance of ranks that nothing joins
  static constexpr double kNotWanted = 1e6;  // of a hub for copies that go elsewhere, and the other way round

  bool is_hub(int r) const { return r >= c_.n_ranks - recipe_.hubs; }
  void find_distances(Ranks from);
  int cheapest(Ranks taken, bool on_hub) const;
  bool spread(int e);
  void pack_singles();
  void level_singles();
  double growth(int e, int r) const;
  void put(int e, int r, double share);

  const Case& c_;
  Recipe recipe_;
  std::vector<int> copies_, room_, degree_, distance_;
  std::vector<double> load_, size_;  // [n_ranks] sums of means and sizes, replicas at their share
  std::vector<Ranks> neighbours_;    // [n_ranks] including the rank itself
  std::vector<float> sampled_;       // [n_ranks, n_samples] loads, as in load_
  std::vector<std::vector<int>> held_, singles_;
};

inline Construction::Construction(const Case& c, const Recipe& recipe)
    : c_(c),
      recipe_(recipe),
      copies_(count_copies(c, recipe.quarters)),
      room_(c.n_ranks, c.slots_per_rank),
      degree_(c.n_ranks, 0),
      distance_(c.n_ranks, kFarthest),
      load_(c.n_ranks, 0.0),
      size_(c.n_ranks, 0.0),
      neighbours_(c.n_ranks, Ranks::none()),
      held_(c.n_ranks),
      singles_(c.n_ranks) {
  for (int r = 0; r < c.n_ranks; ++r) neighbours_[r].add(r);
  if (recipe.by_samples) sampled_.assign(static_cast<size_t>(c.n_ranks) * c.n_samples, 0.0f);
}

inline bool Construction::build() {
  std::vector<int> order(c_.n_experts);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) {
    return copies_[a] != copies_[b] ? copies_[a] > copies_[b] : c_.mean[a] > c_.mean[b];
  });
  for (const int e : order)
    if (copies_[e] > 1 && !spread(e)) return false;
  pack_singles();
  if (!recipe_.by_samples) level_singles();
  return true;
}

inline void Construction::put(int e, int r, double share) {
  --room_[r];
  load_[r] += share * c_.mean[e];
  size_[r] += share * c_.size[e];
  if (!recipe_.by_samples) return;
  const float* w = c_.samples + static_cast<size_t>(e) * c_.n_samples;
  float* load = sampled_.data() + static_cast<size_t>(r) * c_.n_samples;
  for (int s = 0; s < c_.n_samples; ++s) load[s] += static_cast<float>(share) * w[s];
}

// Steps from a set of ranks along shared experts.
inline void Construction::find_distances(Ranks from) {
  std::fill(distance_.begin(), distance_.end(), kFarthest);
  Ranks reached = Ranks::none(), next = from;
  for (int steps = 0; steps < kFarthest && !next.empty(); ++steps) {
    reached = reached | next;
    Ranks beyond = Ranks::none();
    while (!next.empty()) {
      const int r = next.lowest();
      next.drop(r);
      distance_[r] = steps;
      beyond = beyond | neighbours_[r];
    }
    next = beyond.without(reached);
  }
}

// The rank for the next copy of an expert whose other copies are on `taken`; -1 if none has room.
inline int Construction::cheapest(Ranks taken, bool on_hub) const {
  int best = -1;
  double least = 0.0;
  for (int r = 0; r < c_.n_ranks; ++r) {
    if (room_[r] == 0 || taken.has(r)) continue;
    double cost = recipe_.by_room ? -room_[r] : kDegreeCost * degree_[r] + kLoadCost * load_[r] - distance_[r];
    if (is_hub(r) != on_hub) cost += kNotWanted;
    if (best < 0 || cost < least) least = cost, best = r;
  }
  return best;
}

inline bool Construction::spread(int e) {
  const int n = copies_[e], on_hubs = recipe_.hubs > 0 ? std::min(recipe_.hub_copies, n - 1) : 0;
  Ranks ranks = Ranks::none();
  for (int k = 0; k < n; ++k) {
    find_distances(ranks);
    const int r = cheapest(ranks, k >= n - on_hubs);
    if (r < 0) return false;
    ranks.add(r);
    put(e, r, recipe_.share / n);
    ++degree_[r];
    held_[r].push_back(e);
  }
  for (Ranks left = ranks; !left.empty();) {
    const int r = left.lowest();
    left.drop(r);
    neighbours_[r] = neighbours_[r] | ranks;
  }
  return true;
}

// Largest first, each on the rank with least that has room.
inline void Construction::pack_singles() {
  std::vector<int> order;
  for (int e = 0; e < c_.n_experts; ++e)
    if (copies_[e] == 1) order.push_back(e);
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return c_.size[a] > c_.size[b]; });
  for (const int e : order) {
    int best = -1;
    double least = 0.0;
    for (int r = 0; r < c_.n_ranks; ++r) {
      if (room_[r] == 0) continue;
      const double cost = recipe_.by_samples ? growth(e, r) : size_[r];
      if (best < 0 || cost < least) least = cost, best = r;
    }
    put(e, best, 1.0);
    singles_[best].push_back(e);
  }
}

// How much an expert adds to Σ load³ of a rank over the samples, to first order: most where both are high together.
inline double Construction::growth(int e, int r) const {
  const float *w = c_.samples + static_cast<size_t>(e) * c_.n_samples,
              *load = sampled_.data() + static_cast<size_t>(r) * c_.n_samples;
  float sum[kLanes] = {};
  for (int s = 0; s < c_.n_samples; s += kLanes)
    for (int k = 0; k < kLanes; ++k) sum[k] += load[s + k] * load[s + k] * w[s + k];
  double all = 0.0;
  for (const float part : sum) all += static_cast<double>(part);
  return all;
}

// Exchanges between the fullest rank and another, as long as one lowers the fuller of both by something.
inline void Construction::level_singles() {
  constexpr double kWorthwhile = 1e-4;
  for (int times = 0; times < 2 * c_.n_ranks; ++times) {
    const int r = static_cast<int>(std::max_element(size_.begin(), size_.end()) - size_.begin());
    double best = kWorthwhile;
    int from = -1, to = -1, other = -1;
    for (int q = 0; q < c_.n_ranks; ++q) {
      const double gap = size_[r] - size_[q];
      if (!(0.5 * gap > best)) continue;
      for (size_t i = 0; i < singles_[r].size(); ++i)
        for (size_t j = 0; j < singles_[q].size(); ++j) {
          const double d = c_.size[singles_[r][i]] - c_.size[singles_[q][j]];
          const double gain = std::min(d, gap - d);
          if (gain > best) best = gain, other = q, from = static_cast<int>(i), to = static_cast<int>(j);
        }
    }
    if (other < 0) return;
    const double d = c_.size[singles_[r][from]] - c_.size[singles_[other][to]];
    std::swap(singles_[r][from], singles_[other][to]);
    size_[r] -= d;
    size_[other] += d;
  }
}

inline std::vector<int32_t> Construction::slots() const {
  std::vector<int32_t> out;
  for (int r = 0; r < c_.n_ranks; ++r) {
    const auto begin = out.size();
    out.insert(out.end(), held_[r].begin(), held_[r].end());
    out.insert(out.end(), singles_[r].begin(), singles_[r].end());
    std::sort(out.begin() + begin, out.end());
  }
  return out;
}

}  // namespace lplb::placing
