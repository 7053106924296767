// Which of the ranks of a placement stands on which node. To the LP all ranks of a balance group are alike, so they may
// change places freely; a split that serves the tokens of a node on that node first then has less to send away. Host
// only.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace lplb::placing {

// from [n_nodes, n_experts]: what the ranks of each node send. slots [n_ranks, slots_per_rank] experts.
class Settlement {
 public:
  Settlement(const std::vector<double>& from, int n_experts, int n_ranks, int ranks_per_node,
             std::vector<int32_t>& slots);

  // Exchanges ranks of different nodes as long as this keeps more load at home.
  void improve();

 private:
  static constexpr int kMostPasses = 20;
  static constexpr double kWorthwhile = 1e-9;  // of the whole load

  int32_t& copies(int node, int32_t e) { return copies_[static_cast<size_t>(node) * n_experts_ + e]; }
  double kept(int node, int32_t e) const;
  double gain(int a, int b);

  std::vector<double> from_, per_copy_;  // [n_nodes, n_experts]; [n_experts] the even share of a copy
  std::vector<int32_t> copies_;          // [n_nodes, n_experts]
  int n_experts_, n_ranks_, slots_per_rank_, ranks_per_node_, n_nodes_;
  std::vector<int32_t>& slots_;
};

inline Settlement::Settlement(const std::vector<double>& from, int n_experts, int n_ranks, int ranks_per_node,
                              std::vector<int32_t>& slots)
    : from_(from),
      per_copy_(n_experts, 0.0),
      copies_(from.size(), 0),
      n_experts_(n_experts),
      n_ranks_(n_ranks),
      slots_per_rank_(static_cast<int>(slots.size()) / n_ranks),
      ranks_per_node_(ranks_per_node),
      n_nodes_(n_ranks / ranks_per_node),
      slots_(slots) {
  std::vector<double> all(n_experts, 0.0);
  for (const int32_t e : slots) all[e] += 1.0;
  for (size_t i = 0; i < from.size(); ++i) per_copy_[i % n_experts] += from[i];
  for (int e = 0; e < n_experts; ++e) per_copy_[e] /= all[e];
  for (size_t i = 0; i < slots.size(); ++i) ++copies(static_cast<int>(i) / slots_per_rank_ / ranks_per_node, slots[i]);
}

// The load of one expert that a node need not send away, if every copy takes an even share.
inline double Settlement::kept(int node, int32_t e) const {
  const size_t i = static_cast<size_t>(node) * n_experts_ + e;
  return std::min(from_[i], copies_[i] * per_copy_[e]);
}

// What an exchange of ranks a and b, of different nodes, would keep at home on top.
inline double Settlement::gain(int a, int b) {
  const int node[2] = {a / ranks_per_node_, b / ranks_per_node_}, rank[2] = {a, b};
  double sum = 0.0;
  const auto each = [&](auto use) {
    for (int side = 0; side < 2; ++side)
      for (int i = 0; i < slots_per_rank_; ++i) use(side, slots_[rank[side] * slots_per_rank_ + i]);
  };
  // One copy after another, each with the copies that have moved before it, is the whole exchange.
  each([&](int side, int32_t e) {
    const int here = node[side], there = node[1 - side];
    sum -= kept(here, e) + kept(there, e);
    --copies(here, e), ++copies(there, e);
    sum += kept(here, e) + kept(there, e);
  });
  each([&](int side, int32_t e) { ++copies(node[side], e), --copies(node[1 - side], e); });
  return sum;
}

inline void Settlement::improve() {
  double whole = 0.0;
  for (const double load : from_) whole += load;
  for (int pass = 0; pass < kMostPasses; ++pass) {
    bool better = false;
    for (int a = 0; a < n_ranks_; ++a) {
      int best = -1;
      double most = kWorthwhile * whole;
      for (int b = (a / ranks_per_node_ + 1) * ranks_per_node_; b < n_ranks_; ++b) {
        const double found = gain(a, b);
        if (found > most) most = found, best = b;
      }
      if (best < 0) continue;
      better = true;
      for (int i = 0; i < slots_per_rank_; ++i) {
        int32_t &e = slots_[a * slots_per_rank_ + i], &f = slots_[best * slots_per_rank_ + i];
        --copies(a / ranks_per_node_, e), ++copies(best / ranks_per_node_, e);
        --copies(best / ranks_per_node_, f), ++copies(a / ranks_per_node_, f);
        std::swap(e, f);
      }
    }
    if (!better) return;
  }
}

}  // namespace lplb::placing
