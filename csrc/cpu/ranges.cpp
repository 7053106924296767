#include "ranges.h"

#include <algorithm>

namespace lplb::cpu {

namespace {

struct RangeMemory {
  explicit RangeMemory(const RangeTables& t)
      : n(t.n_experts), end(static_cast<size_t>(t.n_experts) * t.n_ranks), slot(end.size()) {}
  Ranges at() { return {n.data(), end.data(), slot.data()}; }

  std::vector<int32_t> n, end, slot;
};

// The range that tokens of an expert have come to.
struct Open {
  int64_t left;  // tokens until the next
  int32_t slot, next;
};

// Tokens per expert before each chunk [count, n_logical], and of the whole behind them; the position of the first index
// outside [-1, n_logical), or -1.
template <class Index>
int64_t count_chunks(const Index* indices, Chunks chunks, int n_logical, std::vector<int64_t>& before, int threads) {
  const int row = n_logical + 1;  // index -1 has a counter, too
  before.assign(static_cast<size_t>(chunks.count + 1) * row, 0);
  int64_t bad = chunks.n;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static) reduction(min : bad)
  for (int c = 0; c < chunks.count; ++c) {
    std::vector<int64_t> counter(row, 0);  // of this thread: neighbours in `before` would share lines of the cache
    for (int64_t i = chunks.begin(c), end = chunks.end(c); i < end; ++i) {
      const auto shifted = static_cast<std::make_unsigned_t<Index>>(indices[i]) + 1;
      if (shifted > static_cast<std::make_unsigned_t<Index>>(n_logical)) {
        bad = std::min(bad, i);
        break;
      }
      ++counter[shifted];
    }
    std::copy(counter.begin(), counter.end(), before.begin() + static_cast<int64_t>(c + 1) * row);
  }
  for (int64_t i = row; i < static_cast<int64_t>(before.size()); ++i) before[i] += before[i - row];
  return bad < chunks.n ? bad : -1;
}

Open open_at(const RangeTables& t, const Ranges& ranges, int e, int64_t k) {
  const int64_t first = static_cast<int64_t>(e) * t.n_ranks;
  int i = 0;
  while (k >= ranges.end[first + i]) ++i;
  return {ranges.end[first + i] - k, ranges.slot[first + i], i + 1};
}

template <class Index>
void route_chunk(const RangeTables& t, const Ranges& ranges, const int64_t* before, const Index* indices,
                 int64_t n_indices, Index* slots, Open* open) {
  open[0] = {INT64_MAX, -1, 0};
  for (int e = 0; e < t.n_experts; ++e) open[e + 1] = open_at(t, ranges, e, before[e + 1]);
  for (int64_t i = 0; i < n_indices; ++i) {
    Open& now = open[indices[i] + 1];
    if (now.left == 0) {  // never of the last, which ends at INT32_MAX
      const int64_t at = static_cast<int64_t>(indices[i]) * t.n_ranks + now.next;
      now = {ranges.end[at] - ranges.end[at - 1], ranges.slot[at], now.next + 1};
    }
    --now.left;
    slots[i] = static_cast<Index>(now.slot);
  }
}

}  // namespace

RangeMap::RangeMap(const std::vector<int32_t>& resident_rank, const std::vector<int32_t>& resident_expert,
                   int n_logical, int n_ranks, int slots)
    : resident_slot_(static_cast<size_t>(n_logical) * n_ranks, -1), home_slot_(n_logical, -1) {
  std::vector<int32_t> residents(n_ranks, 0);
  for (const int32_t r : resident_rank) ++residents[r];
  const int most = n_ranks > 0 ? *std::max_element(residents.begin(), residents.end()) : 0;
  tables_ = {n_logical, n_ranks, slots, most, resident_slot_.data(), home_slot_.data()};
  std::fill(residents.begin(), residents.end(), 0);
  for (size_t i = 0; i < resident_rank.size(); ++i) {
    const int r = resident_rank[i], e = resident_expert[i];
    const int32_t slot = r * tables_.width() + residents[r]++;
    int32_t& known = resident_slot_[static_cast<size_t>(e) * n_ranks + r];
    if (known < 0) known = slot;
    if (home_slot_[e] < 0) home_slot_[e] = slot;
  }
}

template <class Index, class Count>
RouteFault route(const RangeMap& map, const ServingPlan& plan, const BasicSources<Count>& from, int source,
                 const Index* indices, Chunks chunks, Index* slots, int64_t* send, int threads) {
  const RangeTables& t = map.tables();
  std::vector<int64_t> before;
  const int64_t bad = count_chunks(indices, chunks, t.n_experts, before, threads);
  if (bad >= 0) return {bad, -1};
  const int row = t.n_experts + 1;
  const int64_t* all = &before[static_cast<int64_t>(chunks.count) * row];
  for (int e = 0; e < t.n_experts; ++e)
    if (all[e + 1] != tokens_of(from, source, e)) return {-1, e};

  Solo team;
  RangeMemory memory(t);
  if (send != nullptr) std::fill(send, send + static_cast<int64_t>(t.n_ranks) * t.width(), 0);
  find_ranges(team, t, plan, from, source, 0, t.n_experts, memory.at(), send);
  const Ranges ranges = memory.at();
  std::vector<Open> open(static_cast<size_t>(chunks.count) * row);
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (int c = 0; c < chunks.count; ++c) {
    const int64_t begin = chunks.begin(c);
    route_chunk(t, ranges, &before[static_cast<int64_t>(c) * row], indices + begin, chunks.end(c) - begin,
                slots + begin, &open[static_cast<int64_t>(c) * row]);
  }
  return {-1, -1};
}

template <class Count>
void send_all(const RangeMap& map, const ServingPlan& plan, const BasicSources<Count>& from, int64_t* tokens) {
  const RangeTables& t = map.tables();
  const int64_t row = static_cast<int64_t>(t.n_ranks) * t.width();
  std::fill(tokens, tokens + from.n_ranks * row, 0);
  for (int source = 0; source < from.n_ranks; ++source)
    for (int e = 0; e < t.n_experts; ++e)
      ranges::shares_of(t, plan, from, source, e, [&](int r, int64_t n) {
        const int32_t slot = ranges::slot_at(t, plan, e, r);
        if (slot >= 0) tokens[source * row + slot] = n;
      });
}

#define LPLB_ROUTE(Index, Count)                                                                                \
  template RouteFault route<Index, Count>(const RangeMap&, const ServingPlan&, const BasicSources<Count>&, int, \
                                          const Index*, Chunks, Index*, int64_t*, int);
LPLB_ROUTE(int32_t, int32_t)
LPLB_ROUTE(int32_t, int64_t)
LPLB_ROUTE(int64_t, int32_t)
LPLB_ROUTE(int64_t, int64_t)
#undef LPLB_ROUTE
template void send_all<int32_t>(const RangeMap&, const ServingPlan&, const BasicSources<int32_t>&, int64_t*);
template void send_all<int64_t>(const RangeMap&, const ServingPlan&, const BasicSources<int64_t>&, int64_t*);

}  // namespace lplb::cpu
