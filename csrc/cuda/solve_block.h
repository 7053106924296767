// What one block of the solve kernel does, for any team: tests run it on host threads. No CUDA runtime here.
#pragma once

#include "../core/solve.h"
#include "tables.h"

namespace lplb::cuda {

inline constexpr int kCheckWords = 3;  // of an exchange's row behind its error word

// Tokens per rank and logical expert as an exchange gathered them, and what becomes of them. `from.first` is null where
// loads are given instead.
struct ExchangedTable {
  Sources from;                // behind the n_logical counts of a row are an error word and n_words words
  int n_words;                 // 0: nobody to compare with
  int32_t words[kCheckWords];  // what every rank must have sent
  int32_t* halt;               // 1 where a row is not as it must be: nothing is mapped then
  int64_t* faults;             // host memory; [1] is then 1 + the rank, [2] is 1 where an expert has too many tokens
  void* counter;               // raised by the groups solved, or null
  int counter_bytes;
};

struct SolveArguments {
  const std::byte* image;  // of Tables
  int n_groups, n_logical, n_physical, n_ranks;
  Solver solver;
  int64_t fewest;  // groups with fewer tokens are not solved; 0 where loads are given
  int64_t* loads;  // [batch, n_logical], written where there is a table
  ExchangedTable table;
  // [batch, …] n_physical, n_ranks; the others n_groups
  int32_t* quota;
  int64_t *rank_load, *max_load;
  double *lower_bound, *gap;
  int32_t *iterations, *status;
  IterationRow* log;  // [n_groups, kMaxIterations + 1], or null; for a batch of one
};

// The first rank whose row is not as it must be, or -1. The same on all threads.
template <class Team>
LPLB_HD inline int odd_row(Team& team, const ExchangedTable& t, int n_logical) {
  auto& warp = team.warp();
  for (int first = 0; first < t.from.n_ranks && t.n_words > 0; first += kWarpSize) {
    const int r = first + warp.rank();
    bool odd = false;
    if (r < t.from.n_ranks) {
      const int32_t* words = t.from.first + r * t.from.stride + n_logical;
      odd = words[0] != 0;
      for (int i = 0; i < kCheckWords; ++i) odd = odd || (i < t.n_words && words[1 + i] != t.words[i]);
    }
    const uint32_t found = warp.ballot(odd);
    if (found != 0) return first + lowest_bit(found);
  }
  return -1;
}

// Tokens of a group's experts over all ranks. Whether the table may be used, as far as this group
// knows: where another group has too many tokens, this one is solved and counted.
template <class Team>
LPLB_HD inline bool add_up(Team& team, const SharedGroup& g, const SolveArguments& a) {
  constexpr int64_t kMost = INT32_MAX;
  const ExchangedTable& t = a.table;
  const int odd = odd_row(team, t, a.n_logical);
  if (odd >= 0 && team.rank() == 0) {
    team.note(t.halt, 1);
    team.note(t.faults + 1, 1 + odd);
  }
  bool too_many = false;
  team.each(g.n_singles + g.n_experts, [&](int i) {
    const int e = i < g.n_singles ? g.single_logical[i] : g.expert_logical[i - g.n_singles];
    int64_t all = 0;
    LPLB_UNROLL_16
    for (int r = 0; r < t.from.n_ranks; ++r) all += tokens_of(t.from, r, e);
    if (all > kMost) {
      too_many = true;
      team.note(t.halt, 1);
      team.note(t.faults + 2, 1);
      all = kMost;
    }
    a.loads[e] = all;
  });
  return !team.any(too_many) && odd < 0;  // any() is a barrier, too
}

// One block's share of a launch: block b has group b % n_groups of load b / n_groups. memory: solve_block_bytes()
// behind what the team itself wants. solver: a.solver, or OnlySolver of it. wait_for_input() is called by all members
// before they read or write anything of a but its image.
template <int kWords, class Team, class Algebra, class AnySolver, class F>
LPLB_HD inline void solve_block(Team& team, Algebra algebra, AnySolver solver, const SolveArguments& a, int64_t block,
                                std::byte* memory, F wait_for_input) {
  struct alignas(16) Word {
    uint64_t low, high;
  };
  const int group = static_cast<int>(block % a.n_groups);
  const int64_t load = block / a.n_groups;
  const DeviceGroup d = reinterpret_cast<const DeviceGroup*>(a.image)[group];
  team.each(static_cast<int>(d.staged_bytes / sizeof(Word)),
            [&](int i) { reinterpret_cast<Word*>(memory)[i] = reinterpret_cast<const Word*>(a.image + d.staged)[i]; });
  SharedGroup g = group_at(d, a.image, memory, nullptr);
  Workspace x;
  carve(g, memory + d.staged_bytes, x);
  g.expert_ranks = x.sets;
  g.rank_replica_ranks = x.sets + kWords * g.n_experts;
  wait_for_input();
  team.sync();

  const bool usable = a.table.from.first == nullptr || add_up(team, g, a);
  Result result{};
  const GroupPlan plan{a.quota + load * a.n_physical, a.rank_load + load * a.n_ranks, &result};
  const auto copy_sets = [&] {
    const auto* sets = reinterpret_cast<const uint64_t*>(a.image + d.sets);
    team.each(n_set_words(d), [&](int i) { x.sets[i] = sets[i]; });
  };
  const Fewest few{a.fewest, a.table.from, a.n_physical / a.n_ranks};
  solve_group<kWords>(team, algebra, g, x, a.loads + load * a.n_logical, few, solver, plan,
                      a.log != nullptr ? a.log + group * (kMaxIterations + 1) : nullptr, copy_sets);
  if (team.rank() != 0) return;
  a.max_load[block] = result.max_load;
  a.lower_bound[block] = result.lower_bound;
  a.gap[block] = result.gap;
  a.iterations[block] = result.iterations;
  const Status status = usable ? result.status : Status::refused;
  a.status[block] = static_cast<int32_t>(status);
  if (a.table.counter == nullptr || status != Status::solved) return;
  if (a.table.counter_bytes == 8)
    team.add(static_cast<unsigned long long*>(a.table.counter), 1ull);
  else
    team.add(static_cast<unsigned int*>(a.table.counter), 1u);
}

// Bytes of `memory` for any of these groups.
inline size_t solve_block_bytes(const std::vector<DeviceGroup>& groups) {
  size_t most = 0;
  for (const DeviceGroup& d : groups) {
    const size_t bytes = d.staged_bytes + solve_bytes(group_at(d, nullptr, nullptr, nullptr));
    most = bytes > most ? bytes : most;
  }
  return most;
}

}  // namespace lplb::cuda
