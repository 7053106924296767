// Changing a placement by few writes: a placement that can be edited, and the search for the edits that lower the LP's
// optimum most per write.
//
// A step is one write, where a slot gives up a copy that its expert can spare for an expert that is crowded, or two,
// where the slots of two ranks exchange experts. Candidates are ranked by a guess, from rank loads levelled as far as
// the copies allow, of what they take off the loads above the mean; the best few are scored by the LP's optimum itself,
// and the one that lowers it most for its cost is taken. Every step looks at other batches than the one before, so none
// is fitted twice.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "draft.h"

namespace lplb {

struct SlotWrite {
  int32_t slot, expert;
};

// The writes up to `end` belong to the steps so far. before, after: mean imbalance on the batches this step looked at.
struct ChangeStep {
  int32_t end;
  double before, after;
};

struct ChangePath {
  std::vector<SlotWrite> writes;
  std::vector<ChangeStep> steps;
};

inline namespace LPLB_ISA {

namespace change {

inline constexpr int kFew = 6;         // batches that candidates are guessed from and first scored on
inline constexpr int kMany = 20;       // batches that the best of them are scored on
inline constexpr double kNear = 1.05;  // imbalance of the batches' sum below which the batches have to be looked at
inline constexpr int kIdle = 4;        // steps in a row that find nothing, each among other batches
inline constexpr int kFinalists = 3;   // candidates that are scored on all of them
inline constexpr int kCrowded = 24;    // experts, and slots, among which candidates are looked for
inline constexpr int kExchanged = 16;  // slots on crowded ranks whose expert may go elsewhere in exchange
inline constexpr int kQuietRanks = 6;  // ranks that a crowded rank may exchange experts with
inline constexpr int kScored = 8;      // candidates of either kind that the LP scores

inline constexpr double kLeastGain = 2e-4;            // of the mean imbalance, for a step
inline constexpr double kLikely = -0.5, kSure = 0.4;  // standard errors, on a few batches and on all

struct Candidate {
  SlotWrite first, second;  // second.slot < 0: one write alone
};

// What is best of many by a score, without more memory than is kept.
template <class T>
class Best {
 public:
  explicit Best(int most) : most_(most) {}
  void offer(double score, const T& item) {
    if (static_cast<int>(kept_.size()) == most_ && !(score > kept_.back().score)) return;
    if (static_cast<int>(kept_.size()) == most_) kept_.pop_back();
    size_t i = kept_.size();
    while (i > 0 && score > kept_[i - 1].score) --i;
    kept_.insert(kept_.begin() + i, {score, item});
  }
  struct Kept {
    double score;
    T item;
  };
  const std::vector<Kept>& kept() const { return kept_; }
  // What has to be exceeded.
  double floor() const { return static_cast<int>(kept_.size()) < most_ ? 0.0 : kept_.back().score; }

 private:
  int most_;
  std::vector<Kept> kept_;
};

}  // namespace change

template <class Solve>
class ChangeSearch {
 public:
  ChangeSearch(const ChangeTask& task, Solve solve)
      : task_(task),
        solve_(solve),
        start_(task.phy2log, task.phy2log + task.n_physical),
        at_start_(static_cast<size_t>(task.n_ranks) * task.n_logical, 0),
        left_(at_start_),
        group_of_(task.n_ranks),
        node_of_(task.n_ranks) {
    const int n_slots = task.n_physical / task.n_ranks;
    for (int s = 0; s < task.n_physical; ++s) at_start_[s / n_slots * task.n_logical + start_[s]] = 1;
    for (int r = 0; r < task.n_ranks; ++r) {
      group_of_[r] = r / task.group_size;
      node_of_[r] = r / task.ranks_per_node;
    }
  }

  ChangePath run() {
    descend_on_sum();
    const std::vector<int32_t> reached = draft_ ? draft_->expert_at : start_;
    widen(task_, reached, change::kMany);
    descend(task_.wanted, std::min(change::kIdle, (task_.batches + few_ - 1) / few_));
    return path_;
  }

 private:
  // Where the batches' sum is far from balanced, it says enough by itself, and is quick to ask.
  void descend_on_sum() {
    std::vector<int64_t> sum(task_.n_logical, 0);
    for (int b = 0; b < task_.batches; ++b)
      for (int e = 0; e < task_.n_logical; ++e) sum[e] += task_.loads[static_cast<int64_t>(b) * task_.n_logical + e];
    ChangeTask task = task_;
    task.loads = sum.data();
    task.batches = 1;
    widen(task, start_, 1);
    descend(std::max(task_.wanted, change::kNear), 1);
  }

  void widen(const ChangeTask& task, const std::vector<int32_t>& phy2log, int width) {
    now_task_ = task;
    now_task_.phy2log = phy2log.data();
    width_ = std::min(width, task.batches);
    few_ = std::min(change::kFew, width_);
    draft_ = std::make_unique<Draft<Solve>>(now_task_, width_, solve_);
    level_.assign(static_cast<size_t>(task_.n_ranks) * change::kFew, 0.0);
    share_.assign(static_cast<size_t>(task_.n_physical) * change::kFew, 0.0);
    now_.assign(width_, 0.0);
    then_.assign(width_, 0.0);
  }

  // Takes steps until the imbalance is low enough, or so many in a row find nothing, each among other batches.
  void descend(double wanted, int most_idle) {
    for (int step = 0, idle = 0; idle < most_idle && n_moved_ < task_.most_writes; ++step) {
      look(step);
      draft_->solve_and_level(now_.data(), few_, change::kFew, level_.data(), share_.data());
      const double now = average(now_, width_);
      if (now <= wanted) return;
      idle = take_best(now) ? 0 : idle + 1;
    }
  }

  static double average(const std::vector<double>& x, int n) {
    double sum = 0.0;
    for (int k = 0; k < n; ++k) sum += x[k];
    return sum / n;
  }

  // Batches far apart are next to each other in this order, and every step begins with others.
  void look(int step) {
    std::vector<int> rows(width_);
    const int stride = (now_task_.batches + few_ - 1) / few_;
    for (int k = 0; k < width_; ++k) {
      const int i = (step * few_ + k) % (stride * few_);
      rows[k] = (i / few_ + i % few_ * stride) % now_task_.batches;
    }
    draft_->look_at(now_task_, rows);
  }

  bool at_start(int rank, int e) const { return at_start_[rank * task_.n_logical + e] != 0; }

  // Of having e in a slot of that rank.
  double price(int rank, int e) const { return at_start(rank, e) ? 0.0 : task_.cost[e]; }
  double price_of(const SlotWrite& w) const {
    const int r = draft_->rank_of(w.slot);
    return price(r, w.expert) - price(r, draft_->expert_at[w.slot]);
  }
  double price_of(const change::Candidate& c) const {
    return price_of(c.first) + (c.second.slot < 0 ? 0.0 : price_of(c.second));
  }
  // Slots that differ from the start with it and do not without.
  int moves_of(const SlotWrite& w) const {
    const int r = draft_->rank_of(w.slot);
    return static_cast<int>(at_start(r, draft_->expert_at[w.slot])) - static_cast<int>(at_start(r, w.expert));
  }
  int moves_of(const change::Candidate& c) const {
    return moves_of(c.first) + (c.second.slot < 0 ? 0 : moves_of(c.second));
  }
  bool affordable(const change::Candidate& c) const {
    return n_moved_ + moves_of(c) <= task_.most_writes && spent_ + price_of(c) <= task_.most_cost;
  }
  // A write that undoes another is not free of all doubt.
  double weight_of(const change::Candidate& c) const {
    return std::max(price_of(c), 0.25 * task_.cost[c.first.expert]);
  }

  static double excess(double load) {
    const double x = load - 1.0;
    return x > 0.0 ? x * x : 0.0;
  }

  // What has left a rank does not come back: the search ends.
  bool open(int rank, int e) const {
    const bool held =
        draft_->home[e] == group_of_[rank] && draft_->ranks[e].has(rank - group_of_[rank] * task_.group_size);
    return !held && !left_[rank * task_.n_logical + e];
  }

  bool reaches_node(int e, int node) const {
    if (task_.ranks_per_node == task_.n_ranks) return true;
    for (auto left = draft_->ranks[e]; !left.empty();) {
      const int r = left.lowest();
      left.drop(r);
      if (node_of_[draft_->home[e] * task_.group_size + r] == node) return true;
    }
    return false;
  }
  bool may_be_copied(int e, int rank) const {
    return draft_->home[e] == group_of_[rank] && open(rank, e) && reaches_node(e, node_of_[rank]);
  }
  bool may_go(int e, int from, int to) const {
    if (!open(to, e) || node_of_[from] != node_of_[to]) return false;
    return draft_->count[e] == 1 || group_of_[from] == group_of_[to];
  }

  // What a slot's copy leaves behind, for every one of the few batches.
  struct Room {
    double at[change::kFew], low[change::kFew], other[change::kFew], freed[change::kFew];
    double most;  // of what writing it may save on its rank, less what that costs elsewhere
    int slot, rank;
  };

  void guess_copies(change::Best<change::Candidate>& best) const {
    change::Best<int> experts(change::kCrowded), slots(change::kCrowded);
    double level[change::kFew], share[change::kFew];
    for (int e = 0; e < task_.n_logical; ++e) {
      const double sum = crowding(e, level, share);
      if (sum > 0.0) experts.offer(sum, e);
    }
    for (int s = 0; s < task_.n_physical; ++s)
      if (draft_->count[draft_->expert_at[s]] > 1) slots.offer(room(s, level), s);
    std::vector<Room> rooms;
    for (const auto& kept : slots.kept()) rooms.push_back(room_of(kept.item));
    for (const auto& kept : experts.kept()) {
      const int e = kept.item;
      crowding(e, level, share);
      double most = 0.0;
      for (int k = 0; k < change::kFew; ++k) most += excess(level[k]) - excess(level[k] - share[k]);
      for (const Room& room : rooms) {
        if (hopeless(e, most + room.most, best) || !may_be_copied(e, room.rank)) continue;
        double saved = 0.0;
        for (int k = 0; k < change::kFew; ++k) {
          const double moved = std::min(share[k], std::max(0.0, 0.5 * (level[k] - room.low[k])));
          saved += excess(level[k]) - excess(level[k] - moved) + excess(room.at[k]) - excess(room.low[k] + moved) +
                   excess(room.other[k]) - excess(room.other[k] + room.freed[k]);
        }
        offer({{room.slot, e}, {-1, -1}}, saved, best);
      }
    }
  }

  Room room_of(int s) const {
    Room found;
    found.slot = s;
    found.rank = draft_->rank_of(s);
    found.most = 0.0;
    room(s, found.other);
    for (int k = 0; k < change::kFew; ++k) {
      found.at[k] = level_[found.rank * change::kFew + k];
      found.freed[k] = share_[s * change::kFew + k];
      found.low[k] = found.at[k] - found.freed[k];
      found.most +=
          excess(found.at[k]) - excess(found.low[k]) + excess(found.other[k]) - excess(found.other[k] + found.freed[k]);
    }
    return found;
  }

  // Whether a write of e that saves no more is not among the best, whatever else is true of it.
  bool hopeless(int e, double saved, const change::Best<change::Candidate>& best) const {
    return !(saved > 0.25 * task_.cost[e] * best.floor());
  }

  void offer(const change::Candidate& c, double saved, change::Best<change::Candidate>& best) const {
    if (saved > 0.0 && affordable(c)) best.offer(saved / weight_of(c), c);
  }

  double crowding(int e, double* level, double* share) const {
    double sum = 0.0;
    for (int k = 0; k < change::kFew; ++k) level[k] = share[k] = 0.0;
    for (auto left = draft_->ranks[e]; !left.empty();) {
      const int r = draft_->home[e] * task_.group_size + left.lowest();
      left.drop(left.lowest());
      const int s = draft_->slot_of(r, e);
      for (int k = 0; k < change::kFew; ++k)
        if (share_[s * change::kFew + k] > 0.0 && level_[r * change::kFew + k] > level[k]) {
          level[k] = level_[r * change::kFew + k];
          share[k] = share_[s * change::kFew + k];
        }
    }
    for (int k = 0; k < change::kFew; ++k) sum += std::max(0.0, level[k] - 1.0) * share[k];
    return sum;
  }

  // How much below the mean a rank is without what this slot takes, less what that puts above it elsewhere; and the
  // least loads elsewhere.
  double room(int s, double* elsewhere) const {
    const int e = draft_->expert_at[s], r = draft_->rank_of(s);
    for (int k = 0; k < change::kFew; ++k) elsewhere[k] = 1e9;
    for (auto left = draft_->ranks[e]; !left.empty();) {
      const int q = draft_->home[e] * task_.group_size + left.lowest();
      left.drop(left.lowest());
      if (q == r) continue;
      for (int k = 0; k < change::kFew; ++k) elsewhere[k] = std::min(elsewhere[k], level_[q * change::kFew + k]);
    }
    double sum = 0.0;
    for (int k = 0; k < few_; ++k) {
      const double y = share_[s * change::kFew + k];
      sum += 1.0 - (level_[r * change::kFew + k] - y) - std::max(0.0, elsewhere[k] + y - 1.0);
    }
    return sum;
  }

  void guess_exchanges(change::Best<change::Candidate>& best) const {
    change::Best<int> slots(change::kExchanged), quiet(change::kQuietRanks);
    for (int r = 0; r < task_.n_ranks; ++r) {
      double sum = 0.0;
      for (int k = 0; k < change::kFew; ++k) sum -= level_[r * change::kFew + k];
      quiet.offer(sum, r);
    }
    for (int s = 0; s < task_.n_physical; ++s) {
      double sum = 0.0;
      const int r = draft_->rank_of(s);
      for (int k = 0; k < change::kFew; ++k)
        sum += share_[s * change::kFew + k] * std::max(0.0, level_[r * change::kFew + k] - 1.0);
      if (sum > 0.0) slots.offer(sum, s);
    }
    for (const auto& kept : slots.kept()) {
      const int s = kept.item, q = draft_->rank_of(s), e = draft_->expert_at[s];
      const double *share = &share_[s * change::kFew], *high = &level_[q * change::kFew];
      double most = 0.0;
      for (int k = 0; k < change::kFew; ++k) most += excess(high[k]) - excess(high[k] - share[k]);
      for (const auto& kept_r : quiet.kept()) {
        const int r = kept_r.item;
        const double* low = &level_[r * change::kFew];
        double before = 0.0;
        for (int k = 0; k < change::kFew; ++k) before += excess(low[k]);
        if (q == r || hopeless(e, most + before, best) || !may_go(e, q, r)) continue;
        for (int k = 0; k < change::kFew; ++k) before += excess(high[k]);
        for (int t = r * draft_->n_slots; t < (r + 1) * draft_->n_slots; ++t) {
          double saved = before;
          for (int k = 0; k < change::kFew; ++k) {
            const double moved = share[k] - share_[t * change::kFew + k];
            saved -= excess(high[k] - moved) + excess(low[k] + moved);
          }
          const int f = draft_->expert_at[t];
          if (!hopeless(e, saved, best) && may_go(f, r, q)) offer({{t, e}, {s, f}}, saved, best);
        }
      }
    }
  }

  void close(int slot) { left_[draft_->rank_of(slot) * task_.n_logical + draft_->expert_at[slot]] = 1; }

  void apply(const change::Candidate& c) {
    if (c.second.slot < 0)
      draft_->write(c.first.slot, c.first.expert);
    else
      draft_->exchange(c.first.slot, c.second.slot);
  }

  void undo(const change::Candidate& c, int before) {
    if (c.second.slot < 0)
      draft_->write(c.first.slot, before);
    else
      draft_->exchange(c.first.slot, c.second.slot);
  }

  double gain_so_far(int n) const {
    double sum = 0.0;
    for (int k = 0; k < n; ++k) sum += now_[k] - then_[k];
    return sum / n;
  }

  // The most that a candidate can take off the imbalance of the first few batches, per weight, by the cuts known.
  double most_of(const change::Candidate& c) {
    const int before = draft_->expert_at[c.first.slot];
    const double weight = weight_of(c);
    apply(c);
    draft_->bound(then_.data(), few_);
    undo(c, before);
    const double most = gain_so_far(few_);
    return most > change::kLeastGain ? most / weight : 0.0;
  }

  // What a candidate takes off the imbalance of the first n batches, per weight; 0 unless they agree on it, or if it is
  // not above `wanted`, which is often clear before all batches are solved.
  double try_out(const change::Candidate& c, int n, double wanted) {
    const int before = draft_->expert_at[c.first.slot];
    const double weight = weight_of(c), least = std::max(change::kLeastGain, wanted * weight);
    apply(c);
    draft_->bound(then_.data(), n);
    for (int k = 0; k < n && gain_so_far(n) > least; ++k) then_[k] = draft_->solve_next(k);
    undo(c, before);
    const double mean = gain_so_far(n);
    if (!(mean > least)) return 0.0;
    double squares = 0.0;
    for (int k = 0; k < n; ++k) squares += (now_[k] - then_[k]) * (now_[k] - then_[k]);
    const double variance = std::max(0.0, squares / n - mean * mean);
    const double sure_by = n < width_ ? change::kLikely : change::kSure;
    return mean * mean * (n - 1) >= sure_by * sure_by * variance ? mean / weight : 0.0;
  }

  bool take_best(double now) {
    change::Best<change::Candidate> copies(change::kScored), exchanges(change::kScored), likely(2 * change::kScored);
    guess_copies(copies);
    guess_exchanges(exchanges);
    for (const auto* kind : {&copies, &exchanges})
      for (const auto& kept : kind->kept()) {
        const double most = most_of(kept.item);
        if (most > 0.0) likely.offer(most, kept.item);
      }
    const int n_finalists = width_ == few_ ? 1 : change::kFinalists;
    change::Best<change::Candidate> finalists(n_finalists), best(1);
    for (const auto& kept : likely.kept()) {
      if (!(kept.score > finalists.floor())) break;
      const double gain = try_out(kept.item, few_, finalists.floor());
      if (gain > 0.0) finalists.offer(gain, kept.item);
    }
    for (const auto& kept : finalists.kept()) {
      const double gain = width_ == few_ ? kept.score : try_out(kept.item, width_, best.floor());
      if (gain > 0.0) best.offer(gain, kept.item);
    }
    if (best.kept().empty()) return false;
    const change::Candidate& c = best.kept()[0].item;
    const double gain = best.kept()[0].score * weight_of(c);
    n_moved_ += moves_of(c);
    spent_ += price_of(c);
    path_.writes.push_back(c.first);
    close(c.first.slot);
    if (c.second.slot >= 0) {
      path_.writes.push_back(c.second);
      close(c.second.slot);
    }
    apply(c);
    path_.steps.push_back({static_cast<int32_t>(path_.writes.size()), now, now - gain});
    return true;
  }

  const ChangeTask& task_;
  ChangeTask now_task_{};  // the batches that are looked at
  Solve solve_;
  const std::vector<int32_t> start_;  // phy2log
  int width_ = 0, few_ = 0;           // batches looked at at once; those of them that candidates are guessed from
  std::unique_ptr<Draft<Solve>> draft_;
  std::vector<double> level_, share_;    // [n_ranks | n_physical, kFew], 0 beyond the batches there are
  std::vector<double> now_, then_;       // [width]
  int n_moved_ = 0;                      // slots that differ from the start
  double spent_ = 0.0;                   // on them
  std::vector<char> at_start_, left_;    // [n_ranks, n_logical] experts that were there; that were taken off a rank
  std::vector<int> group_of_, node_of_;  // [n_ranks]
  ChangePath path_;
};

}  // namespace LPLB_ISA
}  // namespace lplb
