// A placement that can be edited slot by slot, with the LP's optimum on a few batches after every edit.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "problem.h"
#include "rank_set.h"
#include "warm.h"

namespace lplb {

// One layer, as the search wants it.
struct ChangeTask {
  const int32_t* phy2log;  // [n_physical]
  int n_physical, n_logical, n_ranks, group_size;
  int ranks_per_node;    // an expert stays on the nodes that have it; n_ranks where it may go anywhere in its group
  const int64_t* loads;  // [batches, n_logical] whole tokens, or fixed point; a batch sums to less than 2^52
  int batches;           // at least 1
  const double* cost;    // [n_logical] of one write of an expert, above 0
  int most_writes;       // slots that may differ from phy2log in the end
  double most_cost;      // and what they may cost
  double wanted;         // mean imbalance that is low enough
};

inline namespace LPLB_ISA {

// solve(group, workspace, mean, start): t* of the loads that the workspace was given, in units of the mean, as warm.h's
// warm_bottleneck(); its split stays in the workspace.
//
// Sets of ranks that set the optimum of one batch are kept. Their load under another placement, or of another batch, is
// quickly known, and a bound on that optimum: most edits are seen not to lower it without a flow.
template <class Solve>
class Draft {
 public:
  using Set = RankSet<2>;

  Draft(const ChangeTask& task, int width, Solve solve)
      : n_ranks(task.n_ranks),
        n_slots(task.n_physical / task.n_ranks),
        n_logical(task.n_logical),
        n_groups(task.n_ranks / task.group_size),
        group_size(task.group_size),
        n_batches(width),
        expert_at(task.phy2log, task.phy2log + task.n_physical),
        count(task.n_logical, 0),
        home(task.n_logical, 0),
        ranks(task.n_logical, Set::none()),
        load(static_cast<size_t>(task.n_logical) * width, 0),
        single(static_cast<size_t>(task.n_ranks) * width, 0),
        total(static_cast<size_t>(n_groups) * width, 0),
        mean(width, 0.0),
        optimum(static_cast<size_t>(n_groups) * width, 0.0),
        solve_(solve),
        words_(set_words(task.group_size)),
        ones_(task.group_size, 1.0),
        groups_(n_groups),
        changed_at_(task.n_logical, 0),
        row_of_(width, 0),
        kept_(static_cast<size_t>(task.batches) * task.n_physical, 0.0),
        kept_at_(task.batches, kNever) {
    for (int s = 0; s < task.n_physical; ++s) {
      const int e = expert_at[s];
      ++count[e];
      home[e] = rank_of(s) / group_size;
      ranks[e].add(rank_of(s) % group_size);
    }
    for (Compiled& c : groups_) reserve(c);
    settled_ = ranks;
  }

  int rank_of(size_t slot) const { return static_cast<int>(slot) / n_slots; }
  int slot_of(int rank, int e) const {  // the rank holds it
    int s = rank * n_slots;
    while (expert_at[s] != e) ++s;
    return s;
  }
  bool holds(int rank, int e) const { return home[e] == rank / group_size && ranks[e].has(rank % group_size); }

  // Looks at other batches: rows [n_batches] of loads.
  void look_at(const ChangeTask& task, const std::vector<int>& rows) {
    settle();
    row_of_ = rows;
    std::fill(single.begin(), single.end(), 0);
    std::fill(total.begin(), total.end(), 0);
    for (int k = 0; k < n_batches; ++k) {
      const int64_t* row = task.loads + static_cast<int64_t>(rows[k]) * n_logical;
      int64_t sum = 0;
      for (int e = 0; e < n_logical; ++e) {
        load[e * n_batches + k] = row[e];
        total[home[e] * n_batches + k] += row[e];
        if (count[e] == 1) single[alone(e) * n_batches + k] += row[e];
        sum += row[e];
      }
      mean[k] = static_cast<double>(sum) / n_ranks;
    }
    for (int g = 0; g < n_groups; ++g) {
      groups_[g].n_solved = 0;
      for (size_t i = 0; i < groups_[g].cuts.size(); ++i) weigh_cut(g, i);
    }
  }

  // Another expert into a slot whose expert has a slot elsewhere in the group.
  void write(int slot, int e) {
    const int r = rank_of(slot), f = expert_at[slot];
    leave(f, r);
    enter(e, r);
    expert_at[slot] = e;
  }

  // The experts of two slots change places.
  void exchange(int a, int b) {
    const int r = rank_of(a), q = rank_of(b), e = expert_at[a], f = expert_at[b];
    leave(e, r);
    leave(f, q);
    enter(e, q);
    enter(f, r);
    expert_at[a] = f;
    expert_at[b] = e;
  }

  // Any other placement of the same sizes.
  void become(const int32_t* phy2log) {
    for (size_t s = 0; s < expert_at.size(); ++s)
      if (phy2log[s] != expert_at[s]) leave(expert_at[s], rank_of(s));
    for (size_t s = 0; s < expert_at.size(); ++s)
      if (phy2log[s] != expert_at[s]) enter(expert_at[s] = phy2log[s], rank_of(s));
    settle();
  }

  // What the imbalance of the first batches is not below, [n].
  void bound(double* imbalance, int n) const {
    for (int k = 0; k < n; ++k) {
      imbalance[k] = 1.0;
      for (int g = 0; g < n_groups; ++g) imbalance[k] = std::max(imbalance[k], least(g, k) * scale(g, k));
    }
  }

  // Imbalance of batch k, those before it have been asked for.
  double solve_next(int k) {
    double most = 1.0;
    for (int g = 0; g < n_groups; ++g) {
      Compiled& c = groups_[g];
      if (!c.compiled) compile(g);
      for (; c.n_solved <= k; ++c.n_solved) optimum[g * n_batches + c.n_solved] = solve_group(g, c.n_solved);
      most = std::max(most, optimum[g * n_batches + k]);
    }
    return most;
  }

  // Imbalance of the first batches, the busiest rank of all groups over the mean of all ranks, [n].
  void solve(double* imbalance, int n) {
    for (int k = 0; k < n; ++k) imbalance[k] = solve_next(k);
  }

  // Of all batches; later solves begin with these splits.
  void solve_and_keep(double* imbalance) {
    for (int g = 0; g < n_groups; ++g) {
      if (!groups_[g].compiled) compile(g);
      for (int k = 0; k < n_batches; ++k) {
        optimum[g * n_batches + k] = solve_group(g, k);
        keep_split(g, k);
      }
      groups_[g].n_solved = n_batches;
    }
    for (const int row : row_of_) kept_at_[row] = n_edits_;
    solve(imbalance, n_batches);
  }

  // The same for all batches, and what levelled loads it leaves on the first few: rank_level [n_ranks, stride], share
  // [n_physical, stride], both over the mean.
  void solve_and_level(double* imbalance, int few, int stride, double* rank_level, double* share) {
    for (int g = 0; g < n_groups; ++g) {
      Compiled& c = groups_[g];
      if (!c.compiled) compile(g);
      for (int k = 0; k < n_batches; ++k) {
        optimum[g * n_batches + k] = solve_group(g, k);
        if (k < few) level(g, k, stride, rank_level, share);
        keep_split(g, k);
      }
      c.n_solved = n_batches;
    }
    for (const int row : row_of_) kept_at_[row] = n_edits_;
    solve(imbalance, n_batches);
    for (size_t s = 0; s < expert_at.size(); ++s)
      if (count[expert_at[s]] == 1)
        for (int k = 0; k < few; ++k)
          share[s * stride + k] =
              mean[k] > 0.0 ? static_cast<double>(load[expert_at[s] * n_batches + k]) / mean[k] : 0.0;
  }

  const int n_ranks, n_slots, n_logical, n_groups, group_size, n_batches;
  std::vector<int32_t> expert_at, count, home;  // of slots; of experts: copies, group
  std::vector<Set> ranks;                       // of experts, in their group
  std::vector<int64_t> load, single, total;     // [n_logical | n_ranks | n_groups, n_batches]
  std::vector<double> mean, optimum;            // [n_batches], [n_groups, n_batches]

 private:
  // A group as the flow solver reads it: experts with one slot are tokens of their ranks and nothing else.
  struct Compiled {
    Group view{};
    bool compiled = false;
    int n_solved = 0;  // batches whose optimum is known
    std::vector<int32_t> expert_begin, expert_logical, replica_rank, replica_expert, rank_begin, rank_replica;
    std::vector<uint64_t> expert_ranks, rank_replica_ranks;
    std::vector<std::byte> memory;
    Workspace space{};
    std::vector<int32_t> slot, changed;  // of replicas; of experts: the edit before which no split is of use
    std::vector<Set> cuts;               // some that were tight, the oldest replaced
    std::vector<double> cut_size;        // [cuts] ranks
    std::vector<int64_t> cut_load;       // [kMostCuts, n_batches] what only they can take
    size_t next_cut = 0;
  };

  static bool same(Set a, Set b) { return a.without(b).empty() && b.without(a).empty(); }

  int alone(int e) const { return home[e] * group_size + ranks[e].lowest(); }

  void add_single(int e, int r, int sign) {
    for (int k = 0; k < n_batches; ++k) single[r * n_batches + k] += sign * load[e * n_batches + k];
  }

  void add_total(int e, int g, int sign) {
    for (int k = 0; k < n_batches; ++k) total[g * n_batches + k] += sign * load[e * n_batches + k];
  }

  void touch(int g) {
    groups_[g].compiled = false;
    groups_[g].n_solved = 0;
  }

  // What the cuts of a group confine, when an expert's ranks change; no ranks: it is not in the group.
  void move_cuts(int e, int g, Set before, Set after) {
    Compiled& c = groups_[g];
    for (size_t i = 0; i < c.cuts.size(); ++i) {
      const bool was = !before.empty() && before.without(c.cuts[i]).empty();
      const bool is = !after.empty() && after.without(c.cuts[i]).empty();
      if (was == is) continue;
      int64_t* sum = &c.cut_load[i * n_batches];
      const int64_t *row = &load[e * n_batches], sign = is ? 1 : -1;
      for (int k = 0; k < n_batches; ++k) sum[k] += sign * row[k];
    }
  }

  void weigh_cut(int g, size_t i) {
    Compiled& c = groups_[g];
    int64_t* sum = &c.cut_load[i * n_batches];
    std::fill(sum, sum + n_batches, 0);
    for (int e = 0; e < n_logical; ++e)
      if (home[e] == g && count[e] > 0 && ranks[e].without(c.cuts[i]).empty())
        for (int k = 0; k < n_batches; ++k) sum[k] += load[e * n_batches + k];
  }

  void keep_cut(int g, Set cut) {
    Compiled& c = groups_[g];
    for (const Set& other : c.cuts)
      if (same(other, cut)) return;
    if (c.cuts.size() < kMostCuts) c.cuts.push_back(cut), c.cut_size.push_back(0.0);
    const size_t i = c.next_cut++ % kMostCuts;
    c.cuts[i] = cut;
    c.cut_size[i] = cut.count_below(group_size);
    weigh_cut(g, i);
  }

  // Of t* of a group, in units of its own mean.
  double least(int g, int k) const {
    const Compiled& c = groups_[g];
    const double own = static_cast<double>(total[g * n_batches + k]) / group_size;
    double most = 1.0;
    if (own > 0.0)
      for (size_t i = 0; i < c.cuts.size(); ++i)
        most = std::max(most, static_cast<double>(c.cut_load[i * n_batches + k]) / (c.cut_size[i] * own));
    return most;
  }

  // From a group's own mean to that of all ranks.
  double scale(int g, int k) const {
    const double own = static_cast<double>(total[g * n_batches + k]) / group_size;
    return own > 0.0 ? own / mean[k] : 0.0;
  }

  // The edits so far stay: splits kept from now on know them.
  void settle() {
    ++n_edits_;
    for (int e = 0; e < n_logical; ++e)
      if (!same(ranks[e], settled_[e])) changed_at_[e] = n_edits_;
    settled_ = ranks;
  }

  void keep_split(int g, int k) {
    const Compiled& c = groups_[g];
    const double own = static_cast<double>(total[g * n_batches + k]) / group_size;
    double* kept = &kept_[row_of_[k] * expert_at.size()];
    if (own > 0.0)
      for (int p = 0; p < c.view.n_replicas; ++p) kept[c.slot[p]] = c.space.y[p] * own;
  }

  void leave(int e, int r) {
    const Set before = ranks[e];
    if (count[e] == 1) {
      add_single(e, r, -1);
      add_total(e, home[e], -1);
    }
    --count[e];
    ranks[e].drop(r % group_size);
    if (count[e] == 1) add_single(e, alone(e), 1);
    move_cuts(e, home[e], before, ranks[e]);
    touch(r / group_size);
  }

  void enter(int e, int r) {
    const Set before = ranks[e];
    if (count[e] == 0) {
      home[e] = r / group_size;
      add_single(e, r, 1);
      add_total(e, home[e], 1);
    } else if (count[e] == 1) {
      add_single(e, alone(e), -1);
    }
    ++count[e];
    ranks[e].add(r % group_size);
    move_cuts(e, home[e], before, ranks[e]);
    touch(r / group_size);
  }

  // Room for any placement of as many slots.
  void reserve(Compiled& c) {
    const size_t slots = static_cast<size_t>(group_size) * n_slots;
    c.expert_begin.resize(slots + 1);
    for (auto* of_slots : {&c.expert_logical, &c.replica_rank, &c.replica_expert, &c.rank_replica})
      of_slots->resize(slots);
    c.rank_begin.resize(group_size + 1);
    c.expert_ranks.resize(words_ * slots);
    c.rank_replica_ranks.resize(words_ * slots);
    c.slot.resize(slots);
    c.changed.resize(slots);
    c.cut_load.resize(kMostCuts * n_batches);
    Group& v = c.view;
    v.n_ranks = group_size;
    v.n_padded = group_size;
    v.unit_speed = true;
    v.n_experts = v.n_replicas = static_cast<int>(slots);
    c.memory.resize(solve_bytes(v) + kAlign);
    std::byte* base = c.memory.data();
    carve(v, base + (kAlign - reinterpret_cast<uintptr_t>(base) % kAlign) % kAlign, c.space);
    v.expert_begin = c.expert_begin.data();
    v.expert_logical = c.expert_logical.data();
    v.replica_rank = c.replica_rank.data();
    v.replica_expert = c.replica_expert.data();
    v.rank_begin = c.rank_begin.data();
    v.rank_replica = c.rank_replica.data();
    v.expert_ranks = c.expert_ranks.data();
    v.rank_replica_ranks = c.rank_replica_ranks.data();
    v.speed = v.inv_speed = ones_.data();
  }

  // In the order of problem.h: experts by ascending number of copies.
  void compile(int g) {
    Compiled& c = groups_[g];
    Group& v = c.view;
    int begin[kMaxGroup + 2] = {};  // by number of copies
    for (int e = 0; e < n_logical; ++e)
      if (count[e] > 1 && home[e] == g) ++begin[count[e] + 1];
    for (int n = 0; n <= kMaxGroup; ++n) begin[n + 1] += begin[n];
    v.n_experts = begin[kMaxGroup + 1];
    for (int e = 0; e < n_logical; ++e)
      if (count[e] > 1 && home[e] == g) c.expert_logical[begin[count[e]]++] = e;

    std::fill(c.rank_begin.begin(), c.rank_begin.end(), 0);
    int p = 0;
    for (int i = 0; i < v.n_experts; ++i) {
      c.expert_begin[i] = p;
      const Set held = ranks[c.expert_logical[i]];
      for (int w = 0; w < words_; ++w) c.expert_ranks[words_ * i + w] = held.word[w];
      const int e = c.expert_logical[i];
      c.changed[i] = same(held, settled_[e]) ? changed_at_[e] : n_edits_ + 1;
      for (Set left = held; !left.empty(); ++p) {
        const int r = left.lowest();
        left.drop(r);
        c.replica_rank[p] = r;
        c.slot[p] = slot_of(g * group_size + r, e);
        c.replica_expert[p] = i;
        ++c.rank_begin[r + 1];
      }
    }
    c.expert_begin[v.n_experts] = v.n_replicas = p;
    int next[kMaxGroup];
    for (int r = 0; r < group_size; ++r) {
      c.rank_begin[r + 1] += c.rank_begin[r];
      next[r] = c.rank_begin[r];
    }
    for (p = 0; p < v.n_replicas; ++p) {
      const int i = next[c.replica_rank[p]]++;
      c.rank_replica[i] = p;
      for (int w = 0; w < words_; ++w)
        c.rank_replica_ranks[words_ * i + w] = c.expert_ranks[words_ * c.replica_expert[p] + w];
    }
    c.compiled = true;
  }

  // Over the mean of all ranks.
  double solve_group(int g, int k) {
    Compiled& c = groups_[g];
    const Workspace& x = c.space;
    const double own = static_cast<double>(total[g * n_batches + k]) / group_size;
    if (!(own > 0.0)) return 0.0;
    const double inv = 1.0 / own;
    for (int r = 0; r < group_size; ++r) {
      x.single_tokens[r] = single[(g * group_size + r) * n_batches + k];
      x.a[r] = static_cast<double>(x.single_tokens[r]) * inv;
    }
    for (int i = 0; i < c.view.n_experts; ++i) {
      x.tokens[i] = load[c.expert_logical[i] * n_batches + k];
      x.w[i] = static_cast<double>(x.tokens[i]) * inv;
    }
    const double* kept = &kept_[row_of_[k] * expert_at.size()];
    for (int i = 0; i < c.view.n_experts; ++i) {
      const bool known = c.changed[i] <= kept_at_[row_of_[k]];
      for (int p = c.expert_begin[i]; p < c.expert_begin[i + 1]; ++p) x.y[p] = known ? kept[c.slot[p]] * inv : -1.0;
    }
    uint64_t cut[2];
    const double t = solve_(c.view, x, own, {least(g, k), cut});
    Set found = Set::none();
    for (int w = 0; w < words_; ++w) found.word[w] = cut[w];
    if (!found.empty()) keep_cut(g, found);
    return t * (own / mean[k]);
  }

  // The flow solver leaves ranks below the busiest as they come. A few rounds in which every expert in turn fills its
  // ranks to one level bring their loads near the most even ones.
  void level(int g, int k, int stride, double* rank_level, double* share) {
    const Compiled& c = groups_[g];
    const Workspace& x = c.space;
    const double own = static_cast<double>(total[g * n_batches + k]) / group_size;
    const double scale = mean[k] > 0.0 ? own / mean[k] : 0.0;
    for (int round = 0; own > 0.0 && round < kLevelRounds; ++round)
      for (int i = 0; i < c.view.n_experts; ++i) fill_evenly(c, i);
    for (int r = 0; r < group_size; ++r)
      rank_level[(g * group_size + r) * stride + k] = own > 0.0 ? x.rank_load[r] * scale : 0.0;
    for (int p = 0; p < c.view.n_replicas; ++p) {
      share[c.slot[p] * stride + k] = own > 0.0 ? x.y[p] * scale : 0.0;
    }
  }

  void fill_evenly(const Compiled& c, int i) {
    const Workspace& x = c.space;
    const int begin = c.expert_begin[i], end = c.expert_begin[i + 1];
    for (int p = begin; p < end; ++p) x.rank_load[c.replica_rank[p]] -= x.y[p];
    if (!(x.w[i] > 0.0)) return;
    // Ranks above the line take nothing and are left out, until none is.
    double line = 1e300;
    for (int n = end - begin + 1, before = n + 1; n > 0 && n < before;) {
      before = n;
      n = 0;
      double sum = x.w[i];
      for (int p = begin; p < end; ++p) {
        const double load = x.rank_load[c.replica_rank[p]];
        if (load < line) sum += load, ++n;
      }
      if (n > 0) line = sum / n;
    }
    for (int p = begin; p < end; ++p) {
      const int r = c.replica_rank[p];
      x.y[p] = std::max(0.0, line - x.rank_load[r]);
      x.rank_load[r] += x.y[p];
    }
  }

  static constexpr size_t kAlign = 64;
  static constexpr int kLevelRounds = 3;
  static constexpr size_t kMostCuts = 24;
  Solve solve_;
  const int words_;
  std::vector<double> ones_;
  std::vector<Compiled> groups_;

  // Splits of batches that were solved before, which a solve begins with.
  static constexpr int kNever = -1;
  int n_edits_ = 0;                  // that were settled
  std::vector<Set> settled_;         // ranks of experts then
  std::vector<int32_t> changed_at_;  // [n_logical] the last of them that changed an expert's ranks
  std::vector<int> row_of_;          // [n_batches] of the task's batches
  std::vector<double> kept_;         // [all batches, n_physical] tokens
  std::vector<int32_t> kept_at_;     // [all batches] after which edit
};

}  // namespace LPLB_ISA
}  // namespace lplb
