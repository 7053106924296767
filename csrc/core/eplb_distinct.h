// EPLB without an expert twice on a GPU. Copies are at most as many as GPUs of the node. A copy goes to the lightest
// GPU that has room and lacks the expert; what cannot be placed so is exchanged into place. Then, where a node is
// busiest, slots are exchanged between its busiest GPU and others while that helps, and after that copies are taken
// from experts on that GPU, for others to have.
#pragma once

#include <limits>
#include <utility>

#include "eplb.h"

namespace lplb::eplb {

// One node: its experts, numbered within the node, their copies, and the slots of its GPUs, heaviest first on each.
class Node {
 public:
  struct Slot {
    float load;
    int32_t expert, copy;
  };
  struct Exchange {
    int b = -1, i = 0, j = 0;  // slot i of the busiest GPU for slot j of GPU b; b < 0: none
    double level;              // the busier of the two afterwards
  };

  explicit Node(const Sizes& sizes)
      : n_gpus_(sizes.gpus_per_node()),
        room_(sizes.slots_per_gpu()),
        words_((n_gpus_ + 63) / 64),
        slot_(sizes.slots_per_node()),
        filled_(n_gpus_),
        load_(n_gpus_) {}

  // which [n]: the node's experts; loads are those of all experts.
  void start(int n, const int32_t* which, const float* loads) {
    n_ = n;
    which_ = which;
    loads_ = loads;
    most_.assign(n, n_gpus_);
  }

  // Copies and where they go. Returns whether that is as published.
  bool deal();
  // Lowers the busiest GPU by exchanges until it has at most `enough`, none lowers it, or no effort is left: looking
  // for an exchange with one GPU takes 1.
  void level_out(double enough, int64_t& effort);

  int n_experts() const { return n_; }
  int expert(int e) const { return which_[e]; }
  int count(int e) const { return copies_.count[e]; }
  const Slot* slots(int gpu) const { return &slot_[gpu * room_]; }
  int busiest() const {
    int a = 0;
    for (int g = 1; g < n_gpus_; ++g)
      if (load_[g] > load_[a]) a = g;
    return a;
  }
  int lightest() const {
    int a = 0;
    for (int g = 1; g < n_gpus_; ++g)
      if (load_[g] < load_[a]) a = g;
    return a;
  }
  double level() const { return load_[busiest()]; }
  double mean() const {
    double sum = 0.0;
    for (int g = 0; g < n_gpus_; ++g) sum += load_[g];
    return sum / n_gpus_;
  }

  // The same node with one copy of `expert` less, not dealt yet. False where slots would be left over.
  bool start_with_fewer(const Node& other, int expert) {
    start(other.n_, other.which_, other.loads_);
    most_ = other.most_;
    most_[expert] = other.count(expert) - 1;
    int64_t room = 0;
    for (int e = 0; e < n_; ++e) room += most_[e];
    return most_[expert] > 0 && room >= n_gpus_ * room_;
  }

 private:
  bool holds(int gpu, int e) const { return held_[e * words_ + gpu / 64] >> (gpu % 64) & 1; }
  void mark(int gpu, int e, bool on) {
    uint64_t& word = held_[e * words_ + gpu / 64];
    const uint64_t bit = uint64_t{1} << (gpu % 64);
    word = on ? word | bit : word & ~bit;
  }
  int times(int gpu, int e) const {
    int n = 0;
    for (int i = 0; i < room_; ++i) n += slots(gpu)[i].expert == e;
    return n;
  }
  double busier(int a, int i, int b, int j) const {
    const double moved = static_cast<double>(slots(a)[i].load) - slots(b)[j].load;
    return std::max(load_[a] - moved, load_[b] + moved);
  }
  int lightest_without(int e) const;
  void add(int gpu, const Slot& slot);
  void repair(int gpu);
  void find_exchange(int a, int b, Exchange& best) const;
  void exchange(int a, int i, int b, int j);
  void settle(int gpu, int i);

  int n_gpus_, room_, words_, n_ = 0;
  const int32_t* which_ = nullptr;
  const float* loads_ = nullptr;
  std::vector<int32_t> most_;  // [n] copies that an expert may have
  Copies copies_;
  std::vector<Slot> slot_;  // [n_gpus, room]
  std::vector<int32_t> filled_;
  std::vector<double> load_;
  std::vector<uint64_t> held_;  // [n, words] the GPUs that hold an expert
  Tournament lightest_;
  std::vector<uint64_t> sorted_;
  std::vector<float> total_;
};

inline void Node::add(int gpu, const Slot& slot) {
  slot_[gpu * room_ + filled_[gpu]++] = slot;
  load_[gpu] += slot.load;
  mark(gpu, slot.expert, true);
}

inline int Node::lightest_without(int e) const {
  int best = -1;
  for (int g = 0; g < n_gpus_; ++g)
    if (filled_[g] < room_ && !holds(g, e) && (best < 0 || total_[g] < total_[best])) best = g;
  return best;
}

// Heaviest first, each to the lightest GPU that has room and lacks the expert, or else to the lightest with room.
inline bool Node::deal() {
  copies_.replicate(n_, n_gpus_ * room_, most_.data(), loads_, which_);
  heaviest_first(n_gpus_ * room_, copies_.slot_load.data(), sorted_);
  std::fill(filled_.begin(), filled_.end(), 0);
  std::fill(load_.begin(), load_.end(), 0.0);
  held_.assign(static_cast<size_t>(n_) * words_, 0);
  total_.assign(n_gpus_, 0.0f);
  lightest_.start(n_gpus_, [](int g) { return lightest_key(0.0f, g); });
  bool as_published = true, doubled = false;
  for (const uint64_t key : sorted_) {
    const int s = index_of(key), e = copies_.expert[s];
    int g = lightest_.first();
    if (holds(g, e)) {
      as_published = false;
      const int other = lightest_without(e);
      if (other >= 0)
        g = other;
      else
        doubled = true;
    }
    add(g, {copies_.slot_load[s], e, copies_.copy[s]});
    total_[g] += copies_.slot_load[s];
    lightest_.set(g, filled_[g] < room_ ? lightest_key(total_[g], g) : Tournament::kOut);
  }
  if (doubled)
    for (int g = 0; g < n_gpus_; ++g) repair(g);
  for (int e = 0; e < n_; ++e) as_published &= copies_.count[e] < n_gpus_ || n_gpus_ == 1;
  return as_published;
}

// Exchanges every slot that repeats an expert of its GPU for one that makes matters better, the one that leaves the two
// GPUs lightest. Call the surplus the number of slots that repeat an expert of their GPU. An exchange that lowers it
// always exists: let GPU a hold e twice. As e has no more copies than the node has GPUs, some b lacks e. If b holds an
// f that a lacks, e for f takes one repeat from a and adds none. Otherwise b's experts are among the at most room - 2
// others on a, so b repeats one of them, f; e for f takes a repeat from a, adds one to a, and takes one from b.
inline void Node::repair(int a) {
  for (;;) {
    Exchange best;
    best.level = std::numeric_limits<double>::infinity();
    for (int i = 0; i < room_; ++i) {
      const int e = slots(a)[i].expert;
      if (times(a, e) < 2) continue;
      for (int b = 0; b < n_gpus_; ++b) {
        if (holds(b, e)) continue;
        for (int j = 0; j < room_; ++j) {
          const int f = slots(b)[j].expert;
          if (holds(a, f) && times(b, f) < 2) continue;
          const double level = busier(a, i, b, j);
          if (level < best.level) best = {b, i, j, level};
        }
      }
    }
    if (best.b < 0) return;
    exchange(a, best.i, best.b, best.j);
  }
}

// Brings slot i of a GPU to where its load belongs, and adds the GPU's loads up again.
inline void Node::settle(int gpu, int i) {
  Slot* s = &slot_[gpu * room_];
  for (; i > 0 && s[i - 1].load < s[i].load; --i) std::swap(s[i - 1], s[i]);
  for (; i + 1 < room_ && s[i + 1].load > s[i].load; ++i) std::swap(s[i + 1], s[i]);
  double sum = 0.0;
  for (int k = 0; k < room_; ++k) sum += s[k].load;
  load_[gpu] = sum;
}

inline void Node::exchange(int a, int i, int b, int j) {
  std::swap(slot_[a * room_ + i], slot_[b * room_ + j]);
  const int to_a = slots(a)[i].expert, to_b = slots(b)[j].expert;
  settle(a, i);
  settle(b, j);
  mark(a, to_a, true);
  mark(b, to_b, true);
  mark(a, to_b, times(a, to_b) > 0);
  mark(b, to_a, times(b, to_a) > 0);
}

// The exchange of a slot of `a` for one of `b` that leaves the busier of the two lightest, if below best.level.
inline void Node::find_exchange(int a, int b, Exchange& best) const {
  const double half = 0.5 * (load_[a] - load_[b]);  // what had best move
  int below = 0;                                    // first slot of b that is lighter than wanted
  for (int i = 0; i < room_; ++i) {
    const Slot& mine = slots(a)[i];
    if (holds(b, mine.expert)) continue;
    const double wanted = mine.load - half;
    while (below < room_ && slots(b)[below].load >= wanted) ++below;
    // The nearest allowed on either side; further ones are worse.
    const auto better = [&](int j) {
      const double level = busier(a, i, b, j);
      if (!(level < best.level)) return true;
      if (holds(a, slots(b)[j].expert)) return false;
      best = {b, i, j, level};
      return true;
    };
    for (int j = below - 1; j >= 0 && !better(j); --j) {
    }
    for (int j = below; j < room_ && !better(j); ++j) {
    }
  }
}

inline void Node::level_out(double enough, int64_t& effort) {
  constexpr double kWorthwhile = 1.0 - 1e-7;  // an exchange brings the busier of two GPUs below this share
  constexpr double kContent = 0.2;            // one that makes up for so much of what is too much is taken at once
  const int most = 16 * n_gpus_;              // exchanges; more than have been seen
  for (int k = 0; k < most && effort > 0; ++k) {
    const int a = busiest();
    if (load_[a] <= enough) return;
    const double content = (1.0 - kContent) * load_[a] + kContent * enough;
    Exchange best;
    best.level = load_[a] * kWorthwhile;
    int b = lightest();
    for (int tried = 0; tried < n_gpus_ && (best.b < 0 || best.level > content); ++tried) {
      if (0.5 * (load_[a] + load_[b]) < best.level) {
        find_exchange(a, b, best);
        --effort;
      }
      if (++b == n_gpus_) b = 0;
    }
    if (best.b < 0) return;
    exchange(a, best.i, best.b, best.j);
  }
}

// Layer after layer in the same memory. No node may have more slots than experts times GPUs.
class Distinct {
 public:
  explicit Distinct(const Sizes& sizes)
      : sizes_(sizes), node_(sizes.n_nodes, Node(sizes)), trial_(sizes), next_(sizes), walk_(sizes) {}

  // As Published::place. On a GPU the slots stand heaviest first.
  void place(const float* loads, const float* group_load, const Layer& out) {
    nodes_.pack(sizes_, group_load);
    double published = 0.0, enough = 0.0;
    for (int n = 0; n < sizes_.n_nodes; ++n) {
      Node& node = node_[n];
      node.start(nodes_.size(n), nodes_.experts(n), loads);
      const bool as_published = node.deal();
      published = std::max(published, as_published ? node.level() : published_level(n, loads));
      enough = std::max(enough, node.mean());
    }
    improve(std::max(enough, std::min(enough * kEnough, published)), published);
    write(out);
  }

 private:
  // Of the busiest node's mean load of a GPU: what is not worth an exchange, and what is not worth other copies.
  static constexpr double kEnough = 1.002, kGood = 1.01;
  // Of a walk over copy counts; where the published placement has a lower maximum, which may have an expert twice.
  static constexpr int kSteps = 2, kStepsBehind = 12;
  static constexpr int kEffort = 1 << 15, kEffortPerSlot = 32;

  // What a layer may take: as Node::level_out counts, and as much as it has slots for copies to be dealt once more.
  // Common shapes end before that; few experts with nearly all load, on 128 GPUs, would go on fifty times as long.
  int64_t effort() const { return std::max<int64_t>(kEffort, int64_t{kEffortPerSlot} * sizes_.n_slots); }

  // The busiest node is worked on until it is no longer busiest, nothing helps, or no effort is left.
  void improve(double enough, double published) {
    int64_t effort = this->effort();
    while (effort > 0) {
      int n = 0;
      for (int k = 1; k < sizes_.n_nodes; ++k)
        if (node_[k].level() > node_[n].level()) n = k;
      const double before = node_[n].level();
      node_[n].level_out(enough, effort);
      if (node_[n].level() < before) continue;
      if (before <= enough || (before <= published && before < kGood * enough)) return;
      if (before <= published)
        recount(node_[n], enough, enough, kSteps, effort);
      else
        recount(node_[n], enough, published, kStepsBehind, effort);
      if (!(node_[n].level() < before)) return;
    }
  }

  // A walk over copy counts: at each step one expert of the busiest GPU must do with a copy less; of these the least
  // bad is gone on from, the best of all is kept. Ends where the node has at most `goal`.
  void recount(Node& node, double enough, double goal, int steps, int64_t& effort) {
    walk_ = node;
    for (int step = 0; step < steps && effort > 0; ++step) {
      const int a = walk_.busiest();
      bool any = false;
      for (int i = 0; i < std::min(sizes_.slots_per_gpu(), 4); ++i) {
        const int e = walk_.slots(a)[i].expert;
        if (walk_.count(e) < 2) continue;
        if (!trial_.start_with_fewer(walk_, e)) continue;
        trial_.deal();
        effort -= sizes_.slots_per_node();
        trial_.level_out(enough, effort);
        if (any && !(trial_.level() < next_.level())) continue;
        std::swap(next_, trial_);
        any = true;
      }
      if (!any) return;
      std::swap(walk_, next_);
      if (walk_.level() < node.level() * (1 - 1e-7)) {
        node = walk_;
        if (node.level() <= goal) return;
      }
    }
  }

  double published_level(int n, const float* loads) {
    const int n_slots = sizes_.slots_per_node(), n_gpus = sizes_.gpus_per_node(), room = sizes_.slots_per_gpu();
    packed_.resize(n_slots);
    begin_.resize(n_gpus + 1);
    copies_.replicate(nodes_.size(n), n_slots, nullptr, loads, nodes_.experts(n));
    packer_.pack(n_slots, n_gpus, copies_.slot_load.data(), packed_.data(), begin_.data());
    double level = 0.0;
    for (int g = 0; g < n_gpus; ++g) {
      double load = 0.0;
      for (int i = 0; i < room; ++i) load += copies_.slot_load[packed_[g * room + i]];
      level = std::max(level, load);
    }
    return level;
  }

  void write(const Layer& out) const {
    int p = 0;
    for (const Node& node : node_) {
      for (int e = 0; e < node.n_experts(); ++e) out.count[node.expert(e)] = node.count(e);
      for (int s = 0; s < sizes_.slots_per_node(); ++s, ++p) {
        const Node::Slot& slot = node.slots(0)[s];
        out.phy2log[p] = node.expert(slot.expert);
        out.copy[p] = slot.copy;
      }
    }
  }

  Sizes sizes_;
  std::vector<Node> node_;
  Node trial_, next_, walk_;
  Nodes nodes_;
  Copies copies_;
  Packer packer_;
  std::vector<int32_t> packed_, begin_;
};

}  // namespace lplb::eplb
