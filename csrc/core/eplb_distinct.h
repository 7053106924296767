// EPLB without an expert twice on a GPU: copies are at most as many as GPUs of the node, a copy goes to the lightest GPU
// that has room and lacks the expert, what cannot be placed so is exchanged into place, and then slots are exchanged
// between the busiest GPU and others of its node for as long as that helps.
#pragma once

#include <limits>
#include <utility>

#include "eplb.h"

namespace lplb::eplb {

// Slots on the GPUs of one layer, heaviest first on each, and exchanges between GPUs of one node.
class Slots {
 public:
  explicit Slots(const Sizes& sizes)
      : room_(sizes.slots_per_gpu()),
        gpus_per_node_(sizes.gpus_per_node()),
        words_((sizes.gpus_per_node() + 63) / 64),
        slot_(sizes.n_slots),
        filled_(sizes.n_gpus),
        load_(sizes.n_gpus),
        held_(static_cast<size_t>(sizes.n_logical) * words_) {}

  struct Slot {
    float load;
    int32_t expert, copy;
  };

  int room() const { return room_; }
  int n_gpus() const { return static_cast<int>(load_.size()); }
  const Slot* slots(int gpu) const { return &slot_[gpu * room_]; }
  double load(int gpu) const { return load_[gpu]; }
  int first_of_node(int gpu) const { return gpu - gpu % gpus_per_node_; }
  int end_of_node(int gpu) const { return first_of_node(gpu) + gpus_per_node_; }
  bool has_room(int gpu) const { return filled_[gpu] < room_; }
  bool holds(int gpu, int expert) const {
    const int g = gpu % gpus_per_node_;
    return held_[expert * words_ + g / 64] >> (g % 64) & 1;
  }

  void clear() {
    std::fill(filled_.begin(), filled_.end(), 0);
    std::fill(load_.begin(), load_.end(), 0.0);
    std::fill(held_.begin(), held_.end(), 0);
  }

  void add(int gpu, const Slot& slot) {
    slot_[gpu * room_ + filled_[gpu]++] = slot;
    load_[gpu] += slot.load;
    mark(gpu, slot.expert, true);
  }

  void exchange(int a, int i, int b, int j) {
    std::swap(slot_[a * room_ + i], slot_[b * room_ + j]);
    const int moved[2] = {slot_[a * room_ + i].expert, slot_[b * room_ + j].expert};
    settle(a, i);
    settle(b, j);
    mark(a, moved[0], true);
    mark(b, moved[1], true);
    mark(a, moved[1], times(a, moved[1]) > 0);
    mark(b, moved[0], times(b, moved[0]) > 0);
  }

  int times(int gpu, int expert) const {
    int n = 0;
    for (int i = 0; i < room_; ++i) n += slots(gpu)[i].expert == expert;
    return n;
  }

 private:
  void mark(int gpu, int expert, bool on) {
    const int g = gpu % gpus_per_node_;
    uint64_t& word = held_[expert * words_ + g / 64];
    const uint64_t bit = uint64_t{1} << (g % 64);
    word = on ? word | bit : word & ~bit;
  }

  // Brings slot i of a GPU to where its load belongs, and adds the GPU's loads up again.
  void settle(int gpu, int i) {
    Slot* s = &slot_[gpu * room_];
    for (; i > 0 && s[i - 1].load < s[i].load; --i) std::swap(s[i - 1], s[i]);
    for (; i + 1 < room_ && s[i + 1].load > s[i].load; ++i) std::swap(s[i + 1], s[i]);
    double sum = 0.0;
    for (int k = 0; k < room_; ++k) sum += s[k].load;
    load_[gpu] = sum;
  }

  int room_, gpus_per_node_, words_;
  std::vector<Slot> slot_;
  std::vector<int32_t> filled_;
  std::vector<double> load_;
  std::vector<uint64_t> held_;  // [n_logical, words_] the GPUs of the node that hold an expert
};

struct Exchange {
  int a = -1, i = 0, b = 0, j = 0;  // slot i of GPU a for slot j of GPU b; a < 0: none
  double level;                     // the busier of the two afterwards
};

inline double busier(const Slots& s, int a, int i, int b, int j) {
  const double moved = static_cast<double>(s.slots(a)[i].load) - s.slots(b)[j].load;
  return std::max(s.load(a) - moved, s.load(b) + moved);
}

// Exchanges every slot that repeats an expert of its GPU for one that makes matters better, the one that leaves the two
// GPUs lightest. Call the surplus the number of slots that repeat an expert of their GPU. An exchange that lowers it
// always exists: let GPU a hold e twice. As e has no more copies than the node has GPUs, some b lacks e. If b holds an f
// that a lacks, e for f takes one repeat from a and adds none. Otherwise b's experts are among the at most room - 2
// others on a, so b repeats one of them, f; e for f takes a repeat from a, adds one to a, and takes one from b.
inline void repair(Slots& s, int a) {
  for (;;) {
    Exchange best;
    best.level = std::numeric_limits<double>::infinity();
    for (int i = 0; i < s.room(); ++i) {
      const int e = s.slots(a)[i].expert;
      if (s.times(a, e) < 2) continue;
      for (int b = s.first_of_node(a); b < s.end_of_node(a); ++b) {
        if (s.holds(b, e)) continue;
        for (int j = 0; j < s.room(); ++j) {
          const int f = s.slots(b)[j].expert;
          if (s.holds(a, f) && s.times(b, f) < 2) continue;
          const double level = busier(s, a, i, b, j);
          if (level < best.level) best = {a, i, b, j, level};
        }
      }
    }
    if (best.a < 0) return;
    s.exchange(best.a, best.i, best.b, best.j);
  }
}

inline constexpr double kWorthwhile = 1.0 - 1e-7;  // an exchange brings the busier of two GPUs below this share

// The exchange of a slot of `a` for one of `b` that leaves the busier of the two lightest, if below best.level.
inline void find_exchange(const Slots& s, int a, int b, Exchange& best) {
  const double half = 0.5 * (s.load(a) - s.load(b));  // what had best move
  int below = 0;                                      // first slot of b that is lighter than wanted
  for (int i = 0; i < s.room(); ++i) {
    const Slots::Slot& mine = s.slots(a)[i];
    if (s.holds(b, mine.expert)) continue;
    const double wanted = mine.load - half;
    while (below < s.room() && s.slots(b)[below].load >= wanted) ++below;
    // The nearest allowed on either side; further ones are worse.
    for (int j = below - 1; j >= 0; --j) {
      const double level = busier(s, a, i, b, j);
      if (!(level < best.level)) break;
      if (s.holds(a, s.slots(b)[j].expert)) continue;
      best = {a, i, b, j, level};
      break;
    }
    for (int j = below; j < s.room(); ++j) {
      const double level = busier(s, a, i, b, j);
      if (!(level < best.level)) break;
      if (s.holds(a, s.slots(b)[j].expert)) continue;
      best = {a, i, b, j, level};
      break;
    }
  }
}

// Lowers the busiest GPU of all, the first of equals, by exchanges within its node until none lowers it.
inline void level_out(Slots& s) {
  const int most = 16 * s.n_gpus();  // exchanges; far more than have been seen
  for (int k = 0; k < most; ++k) {
    int a = 0;
    for (int g = 1; g < s.n_gpus(); ++g)
      if (s.load(g) > s.load(a)) a = g;
    Exchange best;
    best.level = s.load(a) * kWorthwhile;
    for (int b = s.first_of_node(a); b < s.end_of_node(a); ++b)
      if (0.5 * (s.load(a) + s.load(b)) < best.level) find_exchange(s, a, b, best);
    if (best.a < 0) return;
    s.exchange(best.a, best.i, best.b, best.j);
  }
}

// Layer after layer in the same memory. No node may have more slots than experts times GPUs.
class Distinct {
 public:
  explicit Distinct(const Sizes& sizes) : sizes_(sizes), slots_(sizes) {}

  // As Published::place. On a GPU the slots stand heaviest first.
  void place(const float* loads, const float* group_load, const Layer& out) {
    slots_.clear();
    nodes_.pack(sizes_, group_load);
    for (int node = 0; node < sizes_.n_nodes; ++node) {
      const int32_t* experts = nodes_.experts(node);
      const int first = node * sizes_.gpus_per_node();
      copies_.replicate(nodes_.size(node), sizes_.slots_per_node(), sizes_.gpus_per_node(), loads, experts);
      if (deal(experts, first))
        for (int g = first; g < first + sizes_.gpus_per_node(); ++g) repair(slots_, g);
      for (int e = 0; e < nodes_.size(node); ++e) out.count[experts[e]] = copies_.count[e];
    }
    level_out(slots_);
    for (int g = 0, p = 0; g < sizes_.n_gpus; ++g)
      for (int i = 0; i < slots_.room(); ++i, ++p) {
        out.phy2log[p] = slots_.slots(g)[i].expert;
        out.copy[p] = slots_.slots(g)[i].copy;
      }
  }

 private:
  // Heaviest first, each to the lightest GPU that has room and lacks the expert, or else to the lightest with room.
  // Returns whether that had to be.
  bool deal(const int32_t* experts, int first_gpu) {
    const int n_gpus = sizes_.gpus_per_node();
    bool doubled = false;
    heaviest_first(sizes_.slots_per_node(), copies_.slot_load.data(), sorted_);
    total_.assign(n_gpus, 0.0f);
    lightest_.start(n_gpus, [](int g) { return lightest_key(0.0f, g); });
    for (const uint64_t key : sorted_) {
      const int s = index_of(key), e = experts[copies_.expert[s]];
      int g = lightest_.first();
      if (slots_.holds(first_gpu + g, e)) {
        const int other = lightest_without(e, first_gpu);
        if (other >= 0)
          g = other;
        else
          doubled = true;
      }
      slots_.add(first_gpu + g, {copies_.slot_load[s], e, copies_.copy[s]});
      total_[g] += copies_.slot_load[s];
      lightest_.set(g, slots_.has_room(first_gpu + g) ? lightest_key(total_[g], g) : Tournament::kOut);
    }
    return doubled;
  }

  int lightest_without(int e, int first_gpu) const {
    int best = -1;
    for (int g = 0; g < sizes_.gpus_per_node(); ++g)
      if (slots_.has_room(first_gpu + g) && !slots_.holds(first_gpu + g, e) && (best < 0 || total_[g] < total_[best]))
        best = g;
    return best;
  }

  Sizes sizes_;
  Slots slots_;
  Nodes nodes_;
  Copies copies_;
  Tournament lightest_;
  std::vector<uint64_t> sorted_;
  std::vector<float> total_;
};

}  // namespace lplb::eplb
