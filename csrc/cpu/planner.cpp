#include "planner.h"

#include "../core/linalg.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace lplb::cpu {

namespace {

int thread_index() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

size_t aligned(size_t bytes) { return (bytes + 63) / 64 * 64; }

// A group's rows of the log, if there is one.
IterationRow* rows_of(IterationRow* log, int group) {
  return log != nullptr ? log + group * (kMaxIterations + 1) : nullptr;
}

int64_t tokens_of(const Group& g, const int64_t* loads) {
  int64_t tokens = 0;
  for (int i = 0; i < g.n_singles; ++i) tokens += loads[g.single_logical[i]];
  for (int e = 0; e < g.n_experts; ++e) tokens += loads[g.expert_logical[e]];
  return tokens;
}

void store(const PlanArrays& out, int64_t i, const Result& r) {
  out.max_load[i] = r.max_load;
  out.lower_bound[i] = r.lower_bound;
  out.gap[i] = r.gap;
  out.iterations[i] = r.iterations;
  out.status[i] = static_cast<int32_t>(r.status);
}

}  // namespace

Planner::Planner(const std::vector<int32_t>& phy2log, int n_logical, int n_ranks, int group_size,
                 const std::vector<double>& speed, int max_threads)
    : log2phy_begin_(n_logical + 1, 0),
      log2phy_(phy2log.size()),
      n_logical_(n_logical),
      n_physical_(static_cast<int>(phy2log.size())),
      n_ranks_(n_ranks),
      group_size_(group_size),
      groups_(phy2log, n_logical, n_ranks, group_size, speed, BuiltinAlgebra<kMaxGroup>::width(group_size)),
      isa_(best_instruction_set()) {
  for (const int32_t e : phy2log) ++log2phy_begin_[e + 1];
  for (int e = 0; e < n_logical; ++e) log2phy_begin_[e + 1] += log2phy_begin_[e];
  std::vector<int32_t> next(log2phy_begin_.begin(), log2phy_begin_.end() - 1);
  for (int p = 0; p < n_physical_; ++p) log2phy_[next[phy2log[p]]++] = p;

  size_t group_bytes = 0, traffic_bytes = 0;
  traffic_spaces_.resize(groups_.size());
  for (int g = 0; g < groups_.size(); ++g) {
    group_bytes = std::max(group_bytes, solve_bytes(groups_[g]));
    traffic_bytes = std::max(traffic_bytes, carve_traffic(groups_[g], nullptr, traffic_spaces_[g]));
  }
  const size_t share_bytes = aligned((n_physical_ + 1) * sizeof(Share));
  const size_t counter_bytes = aligned((n_logical_ + 1) * sizeof(int32_t));
  const size_t per_thread = group_bytes + share_bytes + counter_bytes;
  memory_size_ = per_thread * max_threads + traffic_bytes + 64;
  memory_.reset(new std::byte[memory_size_]);  // not touched: threads that never run cost no memory
  std::byte* base = memory_.get() + (64 - reinterpret_cast<uintptr_t>(memory_.get()) % 64) % 64;
  workspaces_.resize(static_cast<size_t>(max_threads) * groups_.size());
  for (int t = 0; t < max_threads; ++t, base += per_thread) {
    for (int g = 0; g < groups_.size(); ++g) carve(groups_[g], base, workspaces_[t * groups_.size() + g]);
    shares_.push_back(reinterpret_cast<Share*>(base + group_bytes));
    counters_.push_back(reinterpret_cast<int32_t*>(base + group_bytes + share_bytes));
  }
  for (int g = 0; g < groups_.size(); ++g) carve_traffic(groups_[g], base, traffic_spaces_[g]);
}

template <class Index>
int64_t Planner::count(const Index* indices, Chunks chunks, int32_t* prefix, int threads) const {
  int64_t bad = chunks.n;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static) reduction(min : bad)
  for (int c = 0; c < chunks.count; ++c) {
    int32_t* counter = counters_[thread_index()];
    for (int e = 0; e <= n_logical_; ++e) counter[e] = 0;
    for (int64_t i = chunks.begin(c), end = chunks.end(c); i < end; ++i) {
      const auto shifted = static_cast<std::make_unsigned_t<Index>>(indices[i]) + 1;
      if (shifted > static_cast<std::make_unsigned_t<Index>>(n_logical_)) {
        bad = std::min(bad, i);
        break;
      }
      ++counter[shifted];
    }
    for (int e = 0; e < n_logical_; ++e) prefix[static_cast<int64_t>(c) * n_logical_ + e] = counter[e + 1];
  }
  for (int64_t c = 1; c < chunks.count; ++c)
    for (int e = 0; e < n_logical_; ++e) prefix[c * n_logical_ + e] += prefix[(c - 1) * n_logical_ + e];
  return bad < chunks.n ? bad : -1;
}

int64_t Planner::solve(const int64_t* loads, int64_t batch, const Sources& from, int64_t fewest, Solver solver,
                       const PlanArrays& out, IterationRow* log, int threads) {
  const int n_groups = groups_.size();
  const Fewest few{fewest, from, n_physical_ / n_ranks_};
  int64_t solved = 0;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(dynamic, 1) reduction(+ : solved)
  for (int64_t job = 0; job < batch * n_groups; ++job) {
    const int64_t b = job / n_groups;
    const int g = static_cast<int>(job % n_groups);
    Result r;
    isa_.solve_group(groups_[g], workspaces_[thread_index() * n_groups + g], loads + b * n_logical_, few, solver,
                     out.quota + b * n_physical_, out.rank_load + b * n_ranks_, &r, rows_of(log, g));
    store(out, job, r);
    solved += r.status == Status::solved;
  }
  return solved;
}

int64_t Planner::solve_traffic(const int64_t* loads, const Sources& from, int64_t fewest, double weight,
                               const PlanArrays& out, IterationRow* log) {
  const Fewest few{fewest, from, n_physical_ / n_ranks_};
  const Traffic traffic{from, weight};
  int64_t solved = 0;
  for (int g = 0; g < groups_.size(); ++g) {
    Result r;
    if (tokens_of(groups_[g], loads) < fewest)
      isa_.solve_group(groups_[g], workspaces_[g], loads, few, Solver::ipm, out.quota, out.rank_load, &r, nullptr);
    else
      isa_.solve_group_with_traffic(groups_[g], workspaces_[g], traffic_spaces_[g], loads, traffic, out.quota,
                                    out.rank_load, &r, rows_of(log, g));
    store(out, g, r);
    solved += r.status == Status::solved;
  }
  return solved;
}

template <class Put>
int64_t Planner::shares_of(const Copies& copies, const Sources& from, int source, Split split, const int32_t* status,
                           Put put) const {
  const int group = copies.rank(0) / group_size_;
  if (takes_fixed_split(status[group])) return FixedShares(from, copies, source).put_all(put);
  return own_shares(from, copies, source, split, put);
}

void Planner::shares(const Sources& from, int source, Split split, const int32_t* quota, const int32_t* status,
                     Shares out) const {
  for (int e = 0; e < n_logical_; ++e) {
    const Copies copies = copies_of(e, quota);
    if (copies.n == 1) continue;
    out.starts[e] = static_cast<int32_t>(shares_of(copies, from, source, split, status, [&](int i, int64_t weight) {
      out.weights[copies.slot[i]] = static_cast<int32_t>(weight);
    }));
  }
}

void Planner::tokens_by_source(const Sources& from, Split split, const int32_t* quota, const int32_t* status,
                               int32_t* tokens) const {
  std::vector<int64_t> weight(n_ranks_);
  for (int e = 0; e < n_logical_; ++e) {
    const Copies copies = copies_of(e, quota);
    for (int r = 0; r < from.n_ranks; ++r) {
      const int64_t first = shares_of(copies, from, r, split, status, [&](int i, int64_t w) { weight[i] = w; });
      spread(
          first, tokens_of(from, r, e), copies.n, [&](int i) { return weight[i]; },
          [&](int i, int64_t n) {
            tokens[static_cast<int64_t>(r) * n_physical_ + copies.slot[i]] = static_cast<int32_t>(n);
          });
    }
  }
}

template <class Index>
void Planner::assign(const Index* indices, Chunks chunks, const int32_t* prefix, Shares shares, Index* physical,
                     int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (int c = 0; c < chunks.count; ++c) {
    Share* nest = shares_[thread_index()];
    nest[0] = {0, 0, 0, -1, -1};
    int32_t spare = n_logical_ + 1;  // third and later replicas follow the experts
    for (int e = 0; e < n_logical_; ++e) {
      const int32_t *slot = &log2phy_[log2phy_begin_[e]], *end = &log2phy_[0] + log2phy_begin_[e + 1];
      Share* share = nest + first_share(e);
      if (end - slot == 1) {
        *share = {0, 0, 0, *slot, *slot};
        continue;
      }
      uint64_t k = static_cast<uint32_t>(shares.starts[e]);  // of another batch than prefix: the sum may pass 2^31
      if (c > 0) k += static_cast<uint32_t>(prefix[static_cast<int64_t>(c - 1) * n_logical_ + e]);
      uint32_t tokens = 0;
      for (const int32_t* s = slot; s < end; ++s) tokens += shares.weights[*s];
      for (;; ++slot) {
        share->quota = shares.weights[*slot];
        share->tokens = tokens;
        share->hit = *slot;
        k = share->start_at(k);
        tokens -= share->quota;
        share->miss = slot[1];
        if (end - slot == 2) break;  // the last replica takes all that is left
        share->miss = Share::beyond(spare);
        share = nest + spare++;
      }
    }
    for (int64_t i = chunks.begin(c), stop = chunks.end(c); i < stop; ++i) {
      int32_t to = nest[indices[i] + 1].next();
      while (to < -1) to = nest[-2 - to].next();
      physical[i] = static_cast<Index>(to);
    }
  }
}

int64_t total(const Sources& from, int n_logical, int64_t* loads) {
  for (int e = 0; e < n_logical; ++e) loads[e] = from.first[e];
  for (int r = 1; r < from.n_ranks; ++r)
    for (int e = 0; e < n_logical; ++e) loads[e] += from.first[r * from.stride + e];
  return *std::max_element(loads, loads + n_logical);
}

template int64_t Planner::count<int32_t>(const int32_t*, Chunks, int32_t*, int) const;
template int64_t Planner::count<int64_t>(const int64_t*, Chunks, int32_t*, int) const;
template void Planner::assign<int32_t>(const int32_t*, Chunks, const int32_t*, Shares, int32_t*, int);
template void Planner::assign<int64_t>(const int64_t*, Chunks, const int32_t*, Shares, int64_t*, int);

}  // namespace lplb::cpu
