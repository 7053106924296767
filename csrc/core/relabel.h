// The same placement with as few writes as possible: which of its ranks plays which of the ranks there are, and which
// slot each expert of a rank takes.
#pragma once

#include <algorithm>

#include "matching.h"
#include "team.h"

namespace lplb {

// Blocks of consecutive ranks, each in one of the next size: block [n_sizes], ascending, from 1 to n_ranks. Ranks
// change places within their block of the second size, such blocks within theirs, and so on.
struct Blocks {
  const int32_t* size;
  int n_sizes;
};

inline namespace LPLB_ISA {

// kind [n_ranks]: only ranks of one kind stand for each other.
class Relabelling {
 public:
  Relabelling(const int32_t* current, const int32_t* target, int n_physical, int n_logical, int n_ranks,
              const int32_t* kind, Blocks blocks)
      : current_(current), target_(target), n_ranks_(n_ranks), n_slots_(n_physical / n_ranks), blocks_(blocks) {
    kept_.assign(static_cast<size_t>(n_ranks) * n_ranks, 0);
    std::vector<char> held(n_logical);
    for (int r = 0; r < n_ranks; ++r) {  // there is
      std::fill(held.begin(), held.end(), 0);
      for (int j = 0; j < n_slots_; ++j) held[current[r * n_slots_ + j]] = 1;
      for (int q = 0; q < n_ranks; ++q) {  // wanted
        int64_t n = 0;
        for (int j = 0; j < n_slots_; ++j) n += held[target[q * n_slots_ + j]];
        // No sum of kept experts makes up for a pair that is not allowed; every block paired with itself is.
        kept_[q * n_ranks + r] = kind[q] == kind[r] ? n : -4 * static_cast<int64_t>(n_physical);
      }
    }
  }

  // out [n_physical].
  void run(int32_t* out) {
    pair_up();
    for (int q = 0; q < n_ranks_; ++q) seat(q, rank_of_[q], out);
  }

 private:
  // From the smallest blocks to the largest: what pairs of blocks keep at best follows from pairs of the blocks in
  // them.
  void pair_up() {
    std::vector<int64_t> kept = kept_;  // [blocks, blocks] of the size so far
    int n_blocks = n_ranks_;
    std::vector<std::vector<int32_t>> partner;  // by size, by pair of blocks: of every block inside
    for (int level = 1; level < blocks_.n_sizes; ++level) {
      const int inside = blocks_.size[level] / blocks_.size[level - 1], n = n_blocks / inside;
      std::vector<int64_t> next(static_cast<size_t>(n) * n), weight(static_cast<size_t>(inside) * inside);
      partner.emplace_back(static_cast<size_t>(n) * n * inside);
      for (int a = 0; a < n; ++a)
        for (int b = 0; b < n; ++b) {
          for (int i = 0; i < inside; ++i)
            for (int j = 0; j < inside; ++j)
              weight[i * inside + j] = kept[static_cast<size_t>(a * inside + i) * n_blocks + b * inside + j];
          const size_t pair = static_cast<size_t>(a) * n + b;
          next[pair] = match(inside, weight.data(), &partner.back()[pair * inside]);
        }
      kept = std::move(next);
      n_blocks = n;
    }
    rank_of_.assign(n_ranks_, 0);  // of blocks, from the largest down
    int n = 1;
    for (int level = blocks_.n_sizes - 1; level > 0; --level) {
      const int inside = blocks_.size[level] / blocks_.size[level - 1];
      std::vector<int32_t> finer(static_cast<size_t>(n) * inside);
      for (int a = 0; a < n; ++a)
        for (int i = 0; i < inside; ++i) {
          const size_t pair = static_cast<size_t>(a) * n + rank_of_[a];
          finer[a * inside + i] = rank_of_[a] * inside + partner[level - 1][pair * inside + i];
        }
      n *= inside;
      rank_of_.assign(finer.begin(), finer.end());
    }
  }

  // What stays keeps its slot; the others take the free slots in order.
  void seat(int q, int r, int32_t* out) const {
    const int32_t *there = current_ + r * n_slots_, *wanted = target_ + q * n_slots_;
    int32_t* slots = out + r * n_slots_;
    std::vector<char> placed(n_slots_, 0), taken(n_slots_, 0);
    for (int i = 0; i < n_slots_; ++i)
      for (int j = 0; j < n_slots_; ++j)
        if (wanted[i] == there[j]) {
          slots[j] = wanted[i];
          placed[i] = taken[j] = 1;
        }
    int j = 0;
    for (int i = 0; i < n_slots_; ++i) {
      if (placed[i]) continue;
      while (taken[j]) ++j;
      slots[j++] = wanted[i];
    }
  }

  const int32_t *current_, *target_;
  const int n_ranks_, n_slots_;
  const Blocks blocks_;
  std::vector<int64_t> kept_;     // [n_ranks, n_ranks] experts that a rank of the target finds on a rank there is
  std::vector<int32_t> rank_of_;  // [n_ranks] of the target: the rank it becomes
};

}  // namespace LPLB_ISA
}  // namespace lplb
