#include "placing.h"

#include <cmath>

#include "../core/construct.h"
#include "../core/likely_loads.h"
#include "../core/settle.h"
#include "share_out.h"

namespace lplb::cpu {

using placing::Case;
using placing::kSamples;
using placing::kScenarios;
using placing::Recipe;

namespace {

constexpr int kAlign = 64;
constexpr int kFixedPointBits = 50;  // of a sum of loads: whole numbers that doubles and their sums hold exactly
constexpr int kMostExponent = 1000;  // of the scale: it stays finite

// The race of candidates: after so many scenarios so many are left, the best.
struct Heat {
  int scenarios;
  size_t left;
};
constexpr Heat kHeats[] = {{24, 6}, {80, 3}, {kScenarios, 1}};
static_assert(kSamples % placing::kLanes == 0);
constexpr size_t kWithSamples = 4;  // recipes that are built a second time
constexpr int kChunk = 48;          // scenarios between one look at the sum and the next
static_assert(kScenarios % kChunk == 0 && kChunk % placing::kStressEvery == 0);
constexpr double kRounding = 1e-6;            // of a scenario's sum, at most, is lost in fixed point
constexpr double kOne = 1099511627776.0;      // 2^40: tokens of a scenario, in fixed point
constexpr double kStressWeight = 1.0 / 1024;  // decides between recipes where all likely loads can be levelled out
constexpr double kTie = 1e-9;                 // of a sum of costs
constexpr double kSpreads = 2.0;              // standard deviations above its mean that an expert is packed with

}  // namespace

Workspace Scratch::workspace(const Group& g) {
  Workspace x{};
  const size_t bytes = solve_bytes(g) + kAlign;
  if (bytes > size_) memory_.reset(new std::byte[size_ = bytes]);
  carve(g, memory_.get() + (kAlign - reinterpret_cast<uintptr_t>(memory_.get()) % kAlign) % kAlign, x);
  return x;
}

Scorer::Scorer(const std::vector<int32_t>& phy2log, int n_logical, int n_ranks, int group_size)
    : groups_(phy2log, n_logical, n_ranks, group_size, std::vector<double>(n_ranks, 1.0), group_size),
      isa_(best_instruction_set()) {}

double Scorer::optimum(int group, const int64_t* loads, Scratch& scratch) const {
  return isa_.find_optimum(groups_[group], scratch.workspace(groups_[group]), loads);
}

double to_fixed_point(const double* loads, int n, int64_t* out) {
  double sum = 0.0;
  for (int e = 0; e < n; ++e) sum += loads[e];
  int exponent = kFixedPointBits;  // sum < 2^exponent
  if (sum > 0.0) std::frexp(sum, &exponent);
  const double scale = std::ldexp(1.0, std::min(kFixedPointBits - exponent, kMostExponent));
  for (int e = 0; e < n; ++e) out[e] = std::llrint(loads[e] * scale);
  return scale;
}

void placement_optima(const int32_t* phy2log, int n_physical, int n_logical, int n_ranks, int group_size,
                      const double* loads, int64_t batch, double* out, int threads) {
  const Scorer scorer({phy2log, phy2log + n_physical}, n_logical, n_ranks, group_size);
  share_out(batch, threads, [&] {
    return [&, scratch = Scratch(), fixed = std::vector<int64_t>(n_logical)](int64_t b) mutable {
      const double scale = to_fixed_point(loads + b * n_logical, n_logical, fixed.data());
      for (int g = 0; g < scorer.n_groups(); ++g)
        out[b * scorer.n_groups() + g] = scorer.optimum(g, fixed.data(), scratch) / scale;
    };
  });
}

namespace {

// The largest rank load when every expert's load is dealt out evenly over its copies.
double even_split(const std::vector<int32_t>& phy2log, const std::vector<double>& per_copy, int n_ranks,
                  const int64_t* loads) {
  const size_t slots = phy2log.size() / n_ranks;
  double most = 0.0;
  for (size_t p = 0; p < phy2log.size(); p += slots) {
    double load = 0.0;
    for (size_t i = p; i < p + slots; ++i) load += per_copy[phy2log[i]] * static_cast<double>(loads[phy2log[i]]);
    most = std::max(most, load);
  }
  return most;
}

// How a placement does on one scenario after the other: the busiest rank of the LP's best split, and of an even split
// where that counts.
struct Costs {
  std::vector<double> lp, even;

  // Of two sets of ranks together.
  void join(const Costs& other) {
    for (size_t s = 0; s < lp.size(); ++s) lp[s] = std::max(lp[s], other.lp[s]);
    for (size_t s = 0; s < even.size(); ++s) even[s] = std::max(even[s], other.even[s]);
  }
  double sum(bool stress) const {
    double sum = 0.0;
    for (size_t s = 0; s < lp.size(); ++s)
      if (placing::is_stress(s) == stress) sum += lp[s] + (even.empty() ? 0.0 : even[s]);
    return sum;
  }
  double sum() const { return sum(false) + kStressWeight * sum(true); }
};

// A placement of some experts on some ranks in a race.
class Candidate {
 public:
  Candidate(const Recipe& recipe, std::vector<int32_t> slots, int n_experts, int n_ranks, int group_size, bool even)
      : recipe_(recipe),
        slots_(std::move(slots)),
        n_experts_(n_experts),
        n_ranks_(n_ranks),
        scorer_(slots_, n_experts, n_ranks, group_size) {
    if (!even) return;
    per_copy_.assign(n_experts, 0.0);
    for (const int32_t e : slots_) per_copy_[e] += 1.0;
    for (double& n : per_copy_) n = 1.0 / n;
  }

  // loads [kScenarios, n_experts]. Goes on to `end` scenarios.
  void run(const int64_t* loads, int end, Scratch& scratch) {
    for (size_t s = costs_.lp.size(); s < static_cast<size_t>(end); ++s) {
      const int64_t* load = loads + s * n_experts_;
      double most = 0.0;
      for (int g = 0; g < scorer_.n_groups(); ++g) most = std::max(most, scorer_.optimum(g, load, scratch));
      costs_.lp.push_back(most);
      if (!per_copy_.empty()) costs_.even.push_back(even_split(slots_, per_copy_, n_ranks_, load));
    }
    sum_ = costs_.sum();
  }
  double sum() const { return sum_; }
  const Costs& costs() const { return costs_; }
  const Recipe& recipe() const { return recipe_; }
  const std::vector<int32_t>& slots() const { return slots_; }

 private:
  Recipe recipe_;
  std::vector<int32_t> slots_;
  int n_experts_, n_ranks_;
  Scorer scorer_;
  std::vector<double> per_copy_;  // 1 / copies, where even splits count
  Costs costs_;
  double sum_ = 0.0;
};

std::vector<Recipe> recipes_for(const Case& c, bool even) {
  std::vector<Recipe> recipes;
  const int redundant = c.n_ranks * c.slots_per_rank - c.n_experts;
  if (even) {
    for (const int quarters : {4, 5})
      for (const double share : {0.5, 1.0}) recipes.push_back({0, quarters, 0, share, false, false});
    return recipes;
  }
  for (const int quarters : {4, 5, 6}) recipes.push_back({0, quarters, 0, 0.5, false, false});
  // Hubs take up to 0.8 of the redundant slots, and an eighth of the ranks.
  const int usual = std::min((8 * redundant + 5 * c.slots_per_rank) / (10 * c.slots_per_rank), c.n_ranks / 8);
  for (int hubs = std::max(1, usual - 1); hubs <= usual + 1; ++hubs) {
    if (hubs * c.slots_per_rank > 2 * redundant || 2 * hubs > c.n_ranks) continue;
    for (const int quarters : {4, 5, 6})
      for (const int hub_copies : {1, 2}) recipes.push_back({hubs, quarters, hub_copies, 0.5, false, false});
  }
  return recipes;
}

// Builds by every recipe and returns the best. Loads that come together matter for packing alone: the best recipes are
// built a second time, with samples.
Candidate best_of(const Case& c, const int64_t* loads, bool even, Scratch& scratch) {
  std::vector<Candidate> field;
  const auto enter = [&](const Recipe& recipe) {
    placing::Construction made(c, recipe);
    if (made.build()) field.emplace_back(recipe, made.slots(), c.n_experts, c.n_ranks, c.n_ranks, even);
  };
  const auto run = [&](const Heat& heat) {
    for (Candidate& candidate : field) candidate.run(loads, heat.scenarios, scratch);
    std::stable_sort(field.begin(), field.end(),
                     [](const Candidate& a, const Candidate& b) { return a.sum() < b.sum(); });
    while (field.size() > heat.left) field.pop_back();
  };
  for (const Recipe& recipe : recipes_for(c, even)) enter(recipe);
  if (field.empty()) enter({0, 4, 0, 0.5, true, false});
  run(kHeats[0]);
  if (c.n_samples > 0)
    for (size_t i = 0, n = std::min(field.size(), kWithSamples); i < n; ++i) {
      Recipe recipe = field[i].recipe();
      recipe.by_samples = true;
      enter(recipe);
    }
  run(kHeats[1]);
  run(kHeats[2]);
  return std::move(field.front());
}

// What all layers share.
struct Deviations {
  std::vector<float> scenarios, samples;
  explicit Deviations(int n_logical)
      : scenarios(placing::deviations(kScenarios, n_logical, 0)),
        samples(placing::deviations(kSamples, n_logical, 1)) {}
};

// The experts of some slots, ascending.
std::vector<int32_t> experts_of(const int32_t* phy2log, int n_slots) {
  std::vector<int32_t> experts(phy2log, phy2log + n_slots);
  std::sort(experts.begin(), experts.end());
  experts.erase(std::unique(experts.begin(), experts.end()), experts.end());
  return experts;
}

// What a layer is placed by: scenarios [kScenarios, n_logical] in fixed point; samples [n_logical, kSamples] in mean
// rank loads, none where nothing is known of how experts drift together.
struct Draws {
  std::vector<int64_t> scenarios;
  std::vector<float> samples;
};

Draws draw_loads(const Geometry& m, const placing::Outlook& outlook, const Deviations& z) {
  const size_t n = m.n_logical;
  Draws draws;
  outlook.draw(kScenarios, z.scenarios, true, [&](size_t, const double* loads) {
    for (size_t e = 0; e < n; ++e) draws.scenarios.push_back(static_cast<int64_t>(loads[e] * kOne));
  });
  if (outlook.batches() == 1) return draws;
  draws.samples.resize(n * kSamples);
  outlook.draw(kSamples, z.samples, false, [&](size_t s, const double* loads) {
    for (size_t e = 0; e < n; ++e) draws.samples[e * kSamples + s] = static_cast<float>(loads[e] * m.n_ranks);
  });
  return draws;
}

// The best placement of some experts on the ranks of one part.
Candidate place_part(const Geometry& m, const placing::Outlook& outlook, const Draws& draws,
                     const std::vector<int32_t>& experts, Scratch& scratch) {
  std::vector<double> mean, size;
  std::vector<float> samples;
  for (const int32_t e : experts) {
    mean.push_back(outlook.mean()[e] * m.n_ranks);
    size.push_back((outlook.mean()[e] + kSpreads * outlook.spread()[e]) * m.n_ranks);
    if (draws.samples.empty()) continue;
    const auto first = draws.samples.begin() + static_cast<ptrdiff_t>(e) * kSamples;
    samples.insert(samples.end(), first, first + kSamples);
  }
  std::vector<int64_t> loads;
  for (int s = 0; s < kScenarios; ++s)
    for (const int32_t e : experts) loads.push_back(draws.scenarios[static_cast<size_t>(s) * m.n_logical + e]);
  const Case c{
      static_cast<int>(experts.size()), m.n_ranks / m.n_parts, m.n_physical / m.n_ranks, mean.data(), size.data(),
      samples.empty() ? 0 : kSamples,   samples.data()};
  return best_of(c, loads.data(), m.even, scratch);
}

// A layer's placement so far.
struct Leader {
  std::vector<int32_t> slots;
  Costs costs;
};

// Every part by itself, on the experts that `given` has there.
Leader build_layer(const Geometry& m, const placing::Outlook& outlook, const Draws& draws, const int32_t* given,
                   Scratch& scratch) {
  const int n_slots = m.n_physical / m.n_parts;
  Leader built;
  for (int p = 0; p < m.n_parts; ++p) {
    const std::vector<int32_t> experts = experts_of(given + p * n_slots, n_slots);
    const Candidate best = place_part(m, outlook, draws, experts, scratch);
    for (const int32_t e : best.slots()) built.slots.push_back(experts[e]);
    if (p == 0)
      built.costs = best.costs();
    else
      built.costs.join(best.costs());
  }
  return built;
}

// A given placement leads where likely loads cost less on it, or as much and those of stress less.
void race(const Geometry& m, const Draws& draws, const int32_t* given, Leader& leader, Scratch& scratch) {
  Candidate candidate({}, {given, given + m.n_physical}, m.n_logical, m.n_ranks, m.n_ranks / m.n_parts, m.even);
  const double least = (m.even ? 2.0 : 1.0) * kOne / m.n_ranks * (1.0 - kRounding);  // the mean, in every split
  const double likely = leader.costs.sum(false);
  int left = placing::kLikely;
  for (int end = kChunk; end <= kScenarios; end += kChunk) {
    candidate.run(draws.scenarios.data(), end, scratch);
    left -= kChunk - kChunk / placing::kStressEvery;
    if (candidate.costs().sum(false) + left * least > likely * (1.0 + kTie)) return;
  }
  if (candidate.costs().sum(false) < likely * (1.0 - kTie) || candidate.costs().sum(true) < leader.costs.sum(true))
    leader = {candidate.slots(), candidate.costs()};
}

// Puts the ranks of every part on nodes.
void settle_on_nodes(const Geometry& m, const double* from, int32_t* phy2log) {
  const int n_ranks = m.n_ranks / m.n_parts, n_slots = m.n_physical / m.n_parts, n_nodes = n_ranks / m.ranks_per_node;
  if (n_nodes < 2 || n_ranks % m.ranks_per_node != 0) return;
  for (int p = 0; p < m.n_parts; ++p, phy2log += n_slots) {
    std::vector<int32_t> experts = experts_of(phy2log, n_slots), slots;
    for (int i = 0; i < n_slots; ++i)
      slots.push_back(
          static_cast<int32_t>(std::lower_bound(experts.begin(), experts.end(), phy2log[i]) - experts.begin()));
    std::vector<double> sent;
    for (int node = p * n_nodes; node < (p + 1) * n_nodes; ++node)
      for (const int32_t e : experts) sent.push_back(from[static_cast<int64_t>(node) * m.n_logical + e]);
    placing::Settlement(sent, static_cast<int>(experts.size()), n_ranks, m.ranks_per_node, slots).improve();
    for (int i = 0; i < n_slots; ++i) phy2log[i] = experts[slots[i]];
  }
}

}  // namespace

void place_for_lp(const Geometry& m, const double* history, int64_t layers, int64_t batches, const double* from,
                  const int32_t* also, int32_t* phy2log, int threads) {
  const int64_t sent = static_cast<int64_t>(m.n_ranks / m.ranks_per_node) * m.n_logical;
  const Deviations z(m.n_logical);
  share_out(layers, threads, [&] {
    return [&, scratch = Scratch()](int64_t layer) mutable {
      const placing::Outlook outlook(history + layer * batches * m.n_logical, batches, m.n_logical);
      const Draws draws = draw_loads(m, outlook, z);
      const int32_t* other = also + layer * m.n_physical;
      int32_t* placed = phy2log + layer * m.n_physical;
      Leader leader = build_layer(m, outlook, draws, placed, scratch);
      race(m, draws, placed, leader, scratch);
      if (!std::equal(other, other + m.n_physical, placed)) race(m, draws, other, leader, scratch);
      std::copy(leader.slots.begin(), leader.slots.end(), placed);
      settle_on_nodes(m, from + layer * sent, placed);
    };
  });
}

void likely_loads(const double* history, int64_t batches, int n_logical, double* out) {
  placing::Outlook(history, batches, n_logical)
      .draw(kScenarios, Deviations(n_logical).scenarios, true, [&](size_t s, const double* loads) {
        if (!placing::is_stress(s)) out = std::copy(loads, loads + n_logical, out);
      });
}

}  // namespace lplb::cpu
