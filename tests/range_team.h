// Ranges and the tokens that go by them, on blocks of host threads, one after another, against the CPU backend.
#pragma once

#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

#include "../csrc/cpu/ranges.h"
#include "check.h"
#include "thread_team.h"

namespace {

using namespace lplb;

constexpr int kRangeCases = 12;  // per team size, at scale 1

template <class T>
void check_same(const std::vector<T>& got, const std::vector<T>& wanted, const std::string& what) {
  check(got.size() == wanted.size(), what + ": " + std::to_string(got.size()) + " elements");
  for (size_t i = 0; i < got.size(); ++i)
    if (std::memcmp(&got[i], &wanted[i], sizeof(T)) != 0)
      fail(what + "[" + std::to_string(i) + "] of " + std::to_string(got.size()) + ": " + std::to_string(got[i]) +
           ", with one thread " + std::to_string(wanted[i]));
  ++passed;
}

// The tokens of one source, what all have counted, and some plan for that.
template <class Index, class Count>
struct RoutedBatch {
  int n_logical, n_ranks, slots, source, ranks_per_node, n_blocks;
  std::vector<int32_t> resident_rank, resident_expert;
  std::vector<int32_t> guests;  // [n_ranks, slots]
  std::vector<Count> counts;    // [n_ranks, n_logical]
  std::vector<int64_t> quota;   // [n_logical, n_ranks]
  std::vector<Index> indices;   // with some -1
  std::string name;

  BasicSources<Count> from() const { return {counts.data(), n_logical, n_ranks, ranks_per_node}; }
  ServingPlan plan() const { return {quota.data(), guests.data()}; }
};

// Residents on one to four ranks each, guests wherever the expert is not, tokens shared out at random.
template <class Index, class Count>
RoutedBatch<Index, Count> random_routed(Random& random) {
  RoutedBatch<Index, Count> b;
  b.n_ranks = draw(random, 0, 3) == 0 ? draw(random, 33, 130) : draw(random, 1, 16);
  b.n_logical = draw(random, 1, 90);
  b.slots = draw(random, 0, 3);
  b.source = draw(random, 0, b.n_ranks - 1);
  b.ranks_per_node = draw(random, 1, b.n_ranks);
  b.n_blocks = draw(random, 1, 3);
  std::vector<char> holds(b.n_ranks * b.n_logical, 0);  // [n_ranks, n_logical]
  for (int e = 0; e < b.n_logical; ++e)
    for (int copies = draw(random, 1, 4); copies > 0; --copies)
      holds[draw(random, 0, b.n_ranks - 1) * b.n_logical + e] = 1;
  for (int i = 0; i < b.n_ranks * b.n_logical; ++i)
    if (holds[i]) b.resident_rank.push_back(i / b.n_logical), b.resident_expert.push_back(i % b.n_logical);
  b.guests.assign(b.n_ranks * b.slots, -1);
  for (int i = 0; i < b.n_ranks * b.slots; ++i) {
    const int e = draw(random, 0, b.n_logical - 1);
    char& held = holds[i / b.slots * b.n_logical + e];
    if (!held) held = 1, b.guests[i] = e;
  }
  b.counts.resize(b.n_ranks * b.n_logical);
  b.quota.assign(b.n_logical * b.n_ranks, 0);
  for (int e = 0; e < b.n_logical; ++e) {
    std::vector<int> holders;
    for (int r = 0; r < b.n_ranks; ++r)
      if (holds[r * b.n_logical + e]) holders.push_back(r);
    const int most = draw(random, 0, 2) == 0 ? 0 : draw(random, 1, 120);
    for (int r = 0; r < b.n_ranks; ++r) {
      const int tokens = draw(random, 0, most);
      b.counts[r * b.n_logical + e] = static_cast<Count>(tokens);
      for (int left = tokens; left > 0;) {
        const int some = draw(random, 1, left), h = draw(random, 0, static_cast<int>(holders.size()) - 1);
        b.quota[e * b.n_ranks + holders[h]] += some;
        left -= some;
      }
      if (r == b.source) b.indices.insert(b.indices.end(), tokens, static_cast<Index>(e));
    }
  }
  b.indices.insert(b.indices.end(), draw(random, 0, 40), Index{-1});
  std::shuffle(b.indices.begin(), b.indices.end(), random);
  b.name = std::to_string(b.n_ranks) + " ranks, " + std::to_string(b.n_logical) + " experts, " +
           std::to_string(b.slots) + " guest slots, nodes of " + std::to_string(b.ranks_per_node) + ", source " +
           std::to_string(b.source) + " with " + std::to_string(b.indices.size()) + " tokens";
  return b;
}

template <class Index>
struct RoutedTokens {
  std::vector<Index> slots;
  std::vector<int64_t> send;
};

template <class Index, class Count>
RoutedTokens<Index> route_alone(const RoutedBatch<Index, Count>& b, const cpu::RangeMap& map) {
  RoutedTokens<Index> out{std::vector<Index>(b.indices.size(), -7),
                          std::vector<int64_t>(b.n_ranks * map.tables().width(), -7)};
  const auto n = static_cast<int64_t>(b.indices.size());
  const cpu::Chunks chunks{n, b.n_blocks, std::max<int64_t>(1, (n + b.n_blocks - 1) / b.n_blocks)};
  const cpu::RouteFault fault =
      cpu::route(map, b.plan(), b.from(), b.source, b.indices.data(), chunks, out.slots.data(), out.send.data(), 1);
  check(fault.index == -1 && fault.expert == -1, b.name + ": the CPU backend refuses");
  return out;
}

template <class Index, class Count>
RoutedTokens<Index> route_on_blocks(const RoutedBatch<Index, Count>& b, const cpu::RangeMap& map, int size) {
  const RangeTables& t = map.tables();
  RoutedTokens<Index> out{std::vector<Index>(b.indices.size(), -7), std::vector<int64_t>(b.n_ranks * t.width(), 0)};
  const int n_warps = size / kWarpSize;
  const auto n = static_cast<int64_t>(b.indices.size());
  const Cut cut{n, std::max<int64_t>(1, (n + b.n_blocks - 1) / b.n_blocks)};
  std::vector<int32_t> counters(std::max(n_warps * b.n_logical, size)), warp_prefix(b.n_blocks * n_warps * b.n_logical),
      prefix(b.n_blocks * b.n_logical), row(b.n_logical), lengths(b.n_logical), only(b.n_logical),
      ends(b.n_logical * b.n_ranks, 0x55555555), slots(ends);
  const Ranges ranges{lengths.data(), ends.data(), slots.data()};
  std::vector<char> differing(size, 1), noticed(size, 0);
  run_block(size, [&](ThreadBlock& block) {
    for (int c = 0; c < b.n_blocks; ++c) {
      count_block(block, b.indices.data(), cut, c, b.n_logical, counters.data(),
                  &warp_prefix[c * n_warps * b.n_logical], &prefix[c * b.n_logical]);
      block.sync();
    }
    scan_blocks(block, b.n_blocks, b.n_logical, counters.data(), prefix.data(), row.data());
    differing[block.rank()] = counts_differ(block, b.from(), b.source, row.data(), b.n_logical);
    if (block.rank() == 0) ++row[b.n_logical - 1];
    block.sync();
    noticed[block.rank()] = counts_differ(block, b.from(), b.source, row.data(), b.n_logical);
    find_ranges(block, t, b.plan(), b.from(), b.source, 0, b.n_logical, ranges, out.send.data());
    block.sync();
    find_only(block, t, ranges, only.data());
    block.sync();
    for (int c = 0; c < b.n_blocks; ++c) {
      route_block(block, t, ranges, only.data(), b.indices.data(), out.slots.data(), cut, c, counters.data(),
                  &warp_prefix[c * n_warps * b.n_logical], c > 0 ? &prefix[(c - 1) * b.n_logical] : nullptr);
      block.sync();
    }
  });
  for (const char differs : differing) check(!differs, b.name + ": counts differ from the indices");
  for (const char noted : noticed) check(noted, b.name + ": a token more than counted is not noticed");
  return out;
}

template <class Index, class Count>
void compare_routed(Random& random, int size) {
  const auto b = random_routed<Index, Count>(random);
  const cpu::RangeMap map(b.resident_rank, b.resident_expert, b.n_logical, b.n_ranks, b.slots);
  const RoutedTokens<Index> wanted = route_alone(b, map), got = route_on_blocks(b, map, size);
  const std::string what = std::to_string(size) + " threads, " + b.name;
  check_same(got.slots, wanted.slots, what + ": virtual slots");
  check_same(got.send, wanted.send, what + ": tokens sent");
}

void compare_ranges(int size, double scale) {
  Random random(4000 + size);
  for (int i = 0; i == 0 || i < scale * kRangeCases; ++i) {
    compare_routed<int32_t, int32_t>(random, size);
    compare_routed<int64_t, int64_t>(random, size);
    compare_routed<int32_t, int64_t>(random, size);
  }
}

}  // namespace
