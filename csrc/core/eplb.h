// DeepSeek's EPLB (https://github.com/deepseek-ai/EPLB) for one layer: groups of experts are packed on nodes, experts
// of a node get copies, copies are packed on the node's GPUs. float32 as there; of equals the first, everywhere.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace lplb::eplb {

// n_slots is a multiple of n_gpus, n_gpus of n_nodes, n_logical of n_groups; n_groups ≥ n_nodes. Where n_nodes does not
// divide n_groups, some nodes have a group more than others; none may have more experts than slots.
struct Sizes {
  int n_logical, n_slots, n_groups, n_nodes, n_gpus;

  int slots_per_gpu() const { return n_slots / n_gpus; }
  int gpus_per_node() const { return n_gpus / n_nodes; }
  int slots_per_node() const { return n_slots / n_nodes; }
  int group_size() const { return n_logical / n_groups; }
};

// How copies are made and packed: as published; the same, but an expert has no more copies than its node has GPUs; or
// never twice on a GPU (eplb_distinct.h). The last two need n_slots ≤ n_gpus times the experts of any node.
enum class Rule { kPublished, kCapped, kDistinct };

// One layer's result: expert of each slot [n_slots], which of its expert's copies a slot is [n_slots], number of copies
// [n_logical].
struct Layer {
  int64_t* phy2log;
  int32_t* copy;
  int64_t* count;
};

// A load and an index in one word, ordered by load, then index. Loads are 0 or more, and no -0: such floats are ordered
// as their bits are.
inline uint64_t lightest_key(float load, int i) {
  uint32_t bits;
  std::memcpy(&bits, &load, sizeof bits);
  return uint64_t{bits} << 32 | static_cast<uint32_t>(i);
}

// The same by falling load.
inline uint64_t heaviest_key(float load, int i) {
  return lightest_key(load, i) ^ uint64_t { 0xffffffff } << 32;
}

inline int index_of(uint64_t key) { return static_cast<int>(key & 0xffffffff); }

// Which key is least, while keys change one at a time: a binary tree of matches.
class Tournament {
 public:
  static constexpr uint64_t kOut = ~uint64_t{0};

  template <class F>  // key(i) for i in [0, n), with index i, or kOut
  void start(int n, F key) {
    width_ = 1;
    while (width_ < n) width_ *= 2;
    if (static_cast<int>(key_.size()) < 2 * width_) key_.resize(2 * width_);
    for (int i = 0; i < width_; ++i) key_[width_ + i] = i < n ? key(i) : kOut;
    for (int p = width_ - 1; p > 0; --p) key_[p] = std::min(key_[2 * p], key_[2 * p + 1]);
  }
  int first() const { return index_of(key_[1]); }
  void set(int i, uint64_t key) {
    for (int p = width_ + i; p > 1; p /= 2) {
      key_[p] = key;
      key = std::min(key, key_[p ^ 1]);
    }
    key_[1] = key;
  }

 private:
  int width_ = 1;
  std::vector<uint64_t> key_;
};

// The items [0, n) by falling load, equals in order.
inline void heaviest_first(int n, const float* load, std::vector<uint64_t>& sorted) {
  sorted.resize(n);
  for (int i = 0; i < n; ++i) sorted[i] = heaviest_key(load[i], i);
  std::sort(sorted.begin(), sorted.end());
}

// Packs items: heaviest first, each into the lightest pack that has room. Packs get n / n_packs items; what is left of
// the division goes one each to whom it comes first.
class Packer {
 public:
  // packed [n]: the items pack by pack, in the order in which they came; begin [n_packs + 1]: where each pack begins.
  void pack(int n, int n_packs, const float* load, int32_t* packed, int32_t* begin) {
    const int room = n / n_packs;
    int more = n % n_packs;  // packs that may still take one item beyond `room`
    if (room == 1 && more == 0) {
      for (int i = 0; i < n; ++i) packed[i] = begin[i] = i;
      begin[n] = n;
      return;
    }
    heaviest_first(n, load, sorted_);
    pack_of_.resize(n);
    total_.assign(n_packs, 0.0f);
    filled_.assign(n_packs, 0);
    lightest_.start(n_packs, [](int p) { return lightest_key(0.0f, p); });
    for (int k = 0; k < n; ++k) {
      const int item = index_of(sorted_[k]), p = lightest_.first();
      pack_of_[k] = p;
      total_[p] += load[item];
      const int filled = ++filled_[p];
      if (filled > room && --more == 0) {
        for (int q = 0; q < n_packs; ++q)
          if (filled_[q] >= room) lightest_.set(q, Tournament::kOut);
      }
      lightest_.set(p, filled < room || (filled == room && more > 0) ? lightest_key(total_[p], p) : Tournament::kOut);
    }
    begin[0] = 0;
    for (int p = 0; p < n_packs; ++p) begin[p + 1] = begin[p] + filled_[p];
    for (int p = 0; p < n_packs; ++p) filled_[p] = begin[p];
    for (int k = 0; k < n; ++k) packed[filled_[pack_of_[k]]++] = index_of(sorted_[k]);
  }

 private:
  std::vector<uint64_t> sorted_;
  std::vector<int32_t> pack_of_, filled_;
  std::vector<float> total_;
  Tournament lightest_;
};

// The experts of a node with their copies: slot s < n is expert s's first, later slots are copies as they were added.
struct Copies {
  std::vector<float> load, share;     // [n] of each expert, and of each of its copies
  std::vector<int32_t> count;         // [n] copies of each expert
  std::vector<int32_t> expert, copy;  // [n_slots] of each slot
  std::vector<float> slot_load;       // [n_slots]

  // Each further slot goes to the expert with most load per copy. which [n]: the experts whose loads to take. most [n]:
  // copies that an expert may have; null for any number.
  void replicate(int n, int n_slots, const int32_t* most, const float* loads, const int32_t* which) {
    const auto key = [&](int e) {
      return most == nullptr || count[e] < most[e] ? heaviest_key(share[e], e) : Tournament::kOut;
    };
    load.resize(n);
    share.resize(n);
    for (int e = 0; e < n; ++e) share[e] = load[e] = loads[which[e]] + 0.0f;  // makes +0 of -0
    count.assign(n, 1);
    expert.resize(n_slots);
    copy.assign(n_slots, 0);
    slot_load.resize(n_slots);
    for (int e = 0; e < n; ++e) expert[e] = e;
    if (n < n_slots) heaviest_.start(n, key);
    for (int s = n; s < n_slots; ++s) {
      const int e = heaviest_.first();
      expert[s] = e;
      copy[s] = count[e]++;
      share[e] = load[e] / static_cast<float>(count[e]);
      heaviest_.set(e, key(e));
    }
    for (int s = 0; s < n_slots; ++s) slot_load[s] = share[expert[s]];
  }

 private:
  Tournament heaviest_;
};

// Packs groups on nodes: experts [n_logical] node by node, begin [n_nodes + 1] the first of each node. group_load
// [n_groups] comes from outside, because whoever adds it up decides how it rounds; not read where nothing is packed.
class Nodes {
 public:
  void pack(const Sizes& sizes, const float* group_load) {
    const int size = sizes.group_size();
    groups_.resize(sizes.n_groups);
    begin_.resize(sizes.n_nodes + 1);
    experts_.resize(sizes.n_logical);
    packer_.pack(sizes.n_groups, sizes.n_nodes, group_load, groups_.data(), begin_.data());
    for (int g = 0; g < sizes.n_groups; ++g)
      for (int i = 0; i < size; ++i) experts_[g * size + i] = groups_[g] * size + i;
    for (int node = 0; node <= sizes.n_nodes; ++node) begin_[node] *= size;
  }
  const int32_t* experts(int node) const { return &experts_[begin_[node]]; }
  int size(int node) const { return begin_[node + 1] - begin_[node]; }

 private:
  std::vector<int32_t> groups_, begin_, experts_;
  Packer packer_;
};

// The published algorithm, capped or not, layer after layer in the same memory.
class Published {
 public:
  Published(const Sizes& sizes, bool capped) : sizes_(sizes) {
    if (capped) most_.assign(sizes.n_logical, sizes.gpus_per_node());
  }

  // loads [n_logical] and group_load [n_groups]: finite, 0 or more.
  void place(const float* loads, const float* group_load, const Layer& out) {
    const int n_slots = sizes_.slots_per_node(), n_gpus = sizes_.gpus_per_node();
    packed_.resize(n_slots);
    begin_.resize(n_gpus + 1);
    nodes_.pack(sizes_, group_load);
    for (int node = 0, first = 0; node < sizes_.n_nodes; ++node, first += n_slots) {
      const int32_t* experts = nodes_.experts(node);
      copies_.replicate(nodes_.size(node), n_slots, most_.empty() ? nullptr : most_.data(), loads, experts);
      packer_.pack(n_slots, n_gpus, copies_.slot_load.data(), packed_.data(), begin_.data());
      for (int s = 0; s < n_slots; ++s) {
        out.phy2log[first + s] = experts[copies_.expert[packed_[s]]];
        out.copy[first + s] = copies_.copy[packed_[s]];
      }
      for (int e = 0; e < nodes_.size(node); ++e) out.count[experts[e]] = copies_.count[e];
    }
  }

 private:
  Sizes sizes_;
  Nodes nodes_;
  Copies copies_;
  Packer packer_;
  std::vector<int32_t> packed_, begin_;
  std::vector<int32_t> most_;  // copies of each expert, in any node; empty: any number
};

}  // namespace lplb::eplb
