// The CPU backend: the four stages' loops over tokens, loads and groups. Pointers and sizes only; no allocation after
// construction; one caller at a time.
#pragma once

#include <memory>
#include <vector>

#include "../core/shares.h"
#include "../core/split.h"
#include "solve.h"

namespace lplb::cpu {

// Chunk i of n tokens is [i·length, (i+1)·length), clipped.
struct Chunks {
  int64_t n;
  int count;
  int64_t length;
  int64_t begin(int i) const { return i * length < n ? i * length : n; }
  int64_t end(int i) const { return begin(i + 1); }
};

// How one source's tokens go where: weights [n_physical] of copies, and the number of the first token of every expert
// [n_logical]; see core/shares.h. Those of experts with one slot are not used.
struct Shares {
  int32_t *weights, *starts;
};

class Planner {
 public:
  Planner(const std::vector<int32_t>& phy2log, int n_logical, int n_ranks, int group_size,
          const std::vector<double>& speed, int max_threads);

  int64_t workspace_bytes() const { return static_cast<int64_t>(memory_size_); }

  // prefix [chunks.count, n_logical]: tokens per expert in the chunks up to and with this one. -1 counts nowhere.
  // Returns the position of the first index outside [-1, n_logical), or -1.
  template <class Index>
  int64_t count(const Index* indices, Chunks chunks, int32_t* prefix, int threads) const;

  // loads [batch, n_logical] whole tokens, those of `from` where fewest is not 0: groups with fewer tokens are not
  // solved, and batch must be 1. log, if not null: [n_groups, kMaxIterations + 1], for a batch
  // of 1. Returns how many groups were solved.
  int64_t solve(const int64_t* loads, int64_t batch, const Sources& from, int64_t fewest, Solver solver,
                const PlanArrays& out, IterationRow* log, int threads);

  // The same for one load on one thread, with a cost on traffic; see core/traffic.h.
  int64_t solve_traffic(const int64_t* loads, const Sources& from, int64_t fewest, double weight, const PlanArrays& out,
                        IterationRow* log);

  // The shares of rank `source` under a plan for the tokens of `from`.
  void shares(const Sources& from, int source, Split split, const int32_t* quota, const int32_t* status,
              Shares out) const;

  // Tokens of every source on every physical expert [from.n_ranks, n_physical] under the same plan.
  void tokens_by_source(const Sources& from, Split split, const int32_t* quota, const int32_t* status,
                        int32_t* tokens) const;

  // Maps tokens by shares; prefix as count() left it. `physical` may be `indices` itself.
  template <class Index>
  void assign(const Index* indices, Chunks chunks, const int32_t* prefix, Shares shares, Index* physical, int threads);

 private:
  int first_share(int e) const { return e + 1; }  // share 0 is for index -1
  Copies copies_of(int e, const int32_t* quota) const {
    const int32_t begin = log2phy_begin_[e];
    return {e, log2phy_begin_[e + 1] - begin, &log2phy_[begin], quota, n_physical_ / n_ranks_};
  }
  template <class Put>
  int64_t shares_of(const Copies& copies, const Sources& from, int source, Split split, const int32_t* status,
                    Put put) const;

  std::vector<int32_t> log2phy_begin_, log2phy_;  // slots of every logical expert, ascending
  int n_logical_, n_physical_, n_ranks_, group_size_;
  GroupTables groups_;
  InstructionSet isa_;
  size_t memory_size_ = 0;
  std::unique_ptr<std::byte[]> memory_;
  std::vector<Workspace> workspaces_;         // [max_threads, n_groups]; groups of one thread share their memory
  std::vector<TrafficSpace> traffic_spaces_;  // [n_groups], all in the same memory
  std::vector<Share*> shares_;                // [max_threads] n_physical + 1 each
  std::vector<int32_t*> counters_;            // [max_threads] n_logical + 1 each
};

// loads[e] = Σ over ranks of tokens. Returns the largest.
int64_t total(const Sources& from, int n_logical, int64_t* loads);

}  // namespace lplb::cpu
