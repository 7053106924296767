// The CPU backend: the four stages' loops over tokens, loads and groups. Pointers and sizes only; no allocation after
// construction; one caller at a time.
#pragma once

#include <memory>
#include <vector>

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

// Tokens per rank and logical expert: row r starts at first + r·stride.
struct RankCounts {
  const int32_t* first;
  int64_t stride;
  const int32_t* row(int r) const { return first + r * stride; }
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

  // loads [batch, n_logical] whole tokens. log, if not null: [n_groups, kMaxIterations + 1]; batch must be 1.
  // Returns how many groups were solved.
  int64_t solve(const int64_t* loads, int64_t batch, Solver solver, const PlanArrays& out, IterationRow* log,
                int threads);

  // Plans one load, the sums of all ranks' counts, with a cost on traffic; see Traffic in core/ipm_traffic.h. On one
  // thread. out and log are as for solve(). Returns how many groups were solved.
  int64_t solve_traffic(RankCounts counts, int ranks_per_node, double weight, const PlanArrays& out, IterationRow* log);

  // Maps the tokens of rank `source`; prefix as count() left it. An expert's quotas sum to its total over all ranks.
  // `physical` may be `indices` itself.
  template <class Index>
  void assign(const Index* indices, Chunks chunks, const int32_t* prefix, RankCounts counts, int source,
              const int32_t* quota, Index* physical, int threads);

 private:
  int first_share(int e) const { return e + 1; }  // share 0 is for index -1

  std::vector<int32_t> log2phy_begin_, log2phy_;  // slots of every logical expert, ascending
  int n_logical_, n_physical_, n_ranks_, max_threads_;
  GroupTables groups_;
  InstructionSet isa_;
  size_t memory_size_ = 0;
  std::unique_ptr<std::byte[]> memory_;
  std::vector<Workspace> workspaces_;         // [max_threads, n_groups]; groups of one thread share their memory
  std::vector<TrafficSpace> traffic_spaces_;  // [n_groups], all in the same memory
  int64_t* loads_;                            // [n_logical] of solve_traffic()
  std::vector<Share*> shares_;                // [max_threads] n_physical + 1 each
  std::vector<int32_t*> counters_;            // [max_threads] n_logical + 1 each
};

// loads[e] = Σ over ranks of counts. Returns the largest.
int64_t total(RankCounts counts, int n_ranks, int n_logical, int64_t* loads);

}  // namespace lplb::cpu
