// Plans with transfers as the block of the CUDA backend makes them, on host threads: the bits that one thread gives.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <memory>
#include <numeric>
#include <string>
#include <vector>

#include "../csrc/cpu/ranges.h"
#include "../csrc/cuda/transfer_block.h"
#include "check.h"
#include "thread_team.h"

namespace joint_team {

using namespace lplb;

constexpr int kRanks[] = {8, 1, 2, 127, 3, 16, 5, 33, 64, 7, 72, 4, 12, 65};
constexpr int kMostCases = 28;  // per team size, at scale 1
constexpr int kPattern = 0x55;  // what lies in memory before

// Whose counts are not as they must be.
enum class Wrong { nothing, negative, one_too_large, too_many };

struct Case {
  std::string name;
  int n_ranks, n_experts, n_slots;
  std::unique_ptr<TransferTables> tables;
  std::unique_ptr<cpu::RangeMap> map;
  std::vector<int64_t> counts;  // [n_ranks, n_experts]
  std::vector<int32_t> held;    // [n_ranks, n_slots], or empty
  JointRules joint;
  LlepRules llep;
};

// Experts on one rank or more, tokens of a few hot ones, guests from before.
Case random_case(Random& random, int n_ranks) {
  Case c;
  c.n_ranks = n_ranks;
  const int n_experts = c.n_experts = draw(random, 1, 3 * n_ranks);
  const int domains[] = {n_ranks, n_ranks, 1, n_ranks % 2 == 0 ? 2 : n_ranks}, domain = domains[draw(random, 0, 3)];
  c.n_slots = draw(random, 0, 2) == 0 ? n_experts : draw(random, 1, 3);
  const bool replicated = draw(random, 0, 1) != 0;
  std::vector<std::pair<int32_t, int32_t>> residents;  // rank, expert
  for (int e = 0; e < n_experts; ++e) {
    residents.emplace_back(draw(random, 0, 2) == 0 ? draw(random, 0, n_ranks - 1) : e * n_ranks / n_experts, e);
    while (replicated && draw(random, 0, 2) == 0) residents.emplace_back(draw(random, 0, n_ranks - 1), e);
  }
  std::sort(residents.begin(), residents.end());
  residents.erase(std::unique(residents.begin(), residents.end()), residents.end());
  std::vector<int32_t> rank, expert;
  for (const auto& [r, e] : residents) rank.push_back(r), expert.push_back(e);
  c.tables = std::make_unique<TransferTables>(rank, expert, n_experts, n_ranks, c.n_slots, domain);
  c.map = std::make_unique<cpu::RangeMap>(rank, expert, n_experts, n_ranks, c.n_slots);

  c.counts.assign(static_cast<size_t>(n_ranks) * n_experts, 0);
  const double spread = draw(random, 0.0, 2.5);
  for (int e = 0; e < n_experts; ++e) {
    double tokens = 50.0 * std::exp(draw(random, -spread, spread));
    if (draw(random, 0, n_experts) == 0) tokens *= 100.0;
    for (int r = 0; r < n_ranks; ++r)
      c.counts[r * n_experts + e] = static_cast<int64_t>(tokens * draw(random, 0.0, 2.0));
  }
  const int64_t all = std::accumulate(c.counts.begin(), c.counts.end(), int64_t{0}), mean = all / n_ranks;

  if (draw(random, 0, 1) != 0) {
    c.held.assign(static_cast<size_t>(n_ranks) * c.n_slots, -1);
    for (int r = 0; r < n_ranks; ++r)
      for (int j = 0; j < std::min(c.n_slots, 4); ++j) {
        const int32_t e = draw(random, 0, n_experts - 1), *on_rank = &c.held[r * c.n_slots];
        const bool resident = std::binary_search(residents.begin(), residents.end(), std::pair<int32_t, int32_t>{r, e});
        const bool in_reach = std::any_of(residents.begin(), residents.end(), [&](const auto& copy) {
          return copy.second == e && copy.first / domain == r / domain;
        });
        if (!resident && in_reach && std::find(on_rank, on_rank + j, e) == on_rank + j) c.held[r * c.n_slots + j] = e;
      }
  }
  const int64_t minima[] = {1, 1, 16, 1024};
  const double tolerances[] = {0.0, 0.01, 0.3};
  c.joint = {tolerances[draw(random, 0, 2)], draw(random, 0, 4) == 0 ? mean : INT64_MAX,
             draw(random, 0, 3) == 0 ? draw(random, 0, 5) : INT32_MAX, minima[draw(random, 0, 3)]};
  c.llep = {draw(random, 0, 2) == 0 ? 1.0 : draw(random, 1.0, 1.5), minima[draw(random, 0, 3)], 1.0,
            draw(random, 0, 2) == 0, draw(random, 0, 4) == 0 ? mean : -1};
  c.name = std::to_string(n_experts) + " experts on " + std::to_string(n_ranks) + " ranks in domains of " +
           std::to_string(domain) + " with " + std::to_string(c.n_slots) + " slots" +
           (c.held.empty() ? "" : ", guests from before");
  return c;
}

void spoil(Case& c, Wrong wrong) {
  if (wrong == Wrong::negative) c.counts.back() = -1;
  if (wrong == Wrong::one_too_large) c.counts.back() = INT64_MAX;
  if (wrong == Wrong::too_many) c.counts.front() = c.counts.back() = kMostTransferTokens / 2;
}

struct Plan {
  std::vector<int64_t> quota, rank_load, numbers;
  std::vector<int32_t> transfers, guests;
  std::vector<double> bound;
  int64_t faults[4] = {0, 0, 0, 0};

  explicit Plan(const TransferProblem& p)
      : quota(static_cast<size_t>(p.n_experts) * p.n_ranks, -7),
        rank_load(p.n_ranks, -7),
        numbers(kTransferNumbers, -7),
        transfers(3 * static_cast<size_t>(p.n_rows), -7),
        guests(static_cast<size_t>(p.n_ranks) * p.n_slots, -7),
        bound(1, -7.0) {}
  TransferArrays arrays() {
    return {quota.data(), rank_load.data(), transfers.data(), guests.data(), numbers.data(), bound.data()};
  }
};

size_t space_bytes(const Case& c) {
  JointSpace x;
  return carve_joint(c.tables->problem(), !c.held.empty(), nullptr, x);
}

// On a boundary of 16 bytes, as the kernels have it.
class Memory {
 public:
  explicit Memory(size_t bytes) : bytes_(bytes + 16, std::byte{kPattern}) {}
  std::byte* begin() { return bytes_.data() + (16 - reinterpret_cast<uintptr_t>(bytes_.data()) % 16) % 16; }

 private:
  std::vector<std::byte> bytes_;
};

// Plans on one thread, without blocks. Allocates nothing.
template <int kWords>
void plan_alone(const Case& c, bool llep, const std::vector<int64_t>& tokens, std::byte* memory, Plan& plan) {
  Solo warp;
  JointSpace x;
  const TransferProblem& p = c.tables->problem();
  carve_joint(p, !c.held.empty(), memory, x);
  if (llep) {
    llep_plan<kWords>(warp, p, c.llep, tokens.data(), x, plan.arrays());
    return;
  }
  const TransferBatch batch{tokens.data(), c.held.empty() ? nullptr : c.held.data()};
  Joint<kWords, Solo> joint(warp, p, c.joint, batch, x);
  joint.plan();
  joint.write(std::accumulate(tokens.begin(), tokens.end(), int64_t{0}), plan.arrays());
}

Plan plan_on_block(const Case& c, bool llep, int size, bool narrow, bool staged, bool on_device) {
  Plan plan(c.tables->problem());
  const cuda::TransferImage image = cuda::make_transfer_image(c.tables->problem(), c.map->tables());
  const size_t space = space_bytes(c), inside = cuda::transfers::partial_words(c.n_experts, size) * sizeof(int64_t);
  Memory image_memory(image.bytes.size()), device(space),
      shared(cuda::TransferMemory(image.offsets, staged).space + (on_device ? inside : std::max(space, inside)));
  std::copy(image.bytes.begin(), image.bytes.end(), image_memory.begin());
  std::vector<int32_t> small(c.counts.begin(), c.counts.end());
  cuda::JointArguments joint{};
  joint.image = image_memory.begin();
  joint.offsets = image.offsets;
  joint.counts = {c.counts.data(), 8, c.n_experts, c.n_ranks, 0};
  if (narrow) joint.counts.first = small.data(), joint.counts.bytes = 4;
  joint.out = plan.arrays();
  joint.staged = staged;
  joint.space = on_device ? device.begin() : nullptr;
  joint.faults = plan.faults;
  cuda::LlepArguments least_loaded{};
  static_cast<cuda::TransferArguments&>(least_loaded) = joint;
  joint.held = c.held.empty() ? nullptr : c.held.data();
  joint.rules = c.joint;
  least_loaded.rules = c.llep;
  run_block(size, [&](ThreadBlock& block) {
    const bool narrow_sets = set_words(c.n_ranks) == 1;
    if (llep && narrow_sets)
      cuda::llep_block<1>(block, least_loaded, shared.begin());
    else if (llep)
      cuda::llep_block<2>(block, least_loaded, shared.begin());
    else if (narrow_sets)
      cuda::joint_block<1>(block, joint, shared.begin());
    else
      cuda::joint_block<2>(block, joint, shared.begin());
  });
  return plan;
}

template <class T>
void check_same(const std::vector<T>& got, const std::vector<T>& wanted, const std::string& what) {
  for (size_t i = 0; i < wanted.size(); ++i)
    if (got[i] != wanted[i])
      fail(what + "[" + std::to_string(i) + "] is " + std::to_string(got[i]) + ", with one thread " +
           std::to_string(wanted[i]));
  ++passed;
}

void compare(const Case& c, bool llep, int size, Wrong wrong, Random& random, const std::atomic<long>& allocations) {
  std::vector<int64_t> tokens(c.n_experts, 0);
  if (wrong == Wrong::nothing)
    for (size_t i = 0; i < c.counts.size(); ++i) tokens[i % c.n_experts] += c.counts[i];
  Plan alone(c.tables->problem());
  Memory memory(space_bytes(c));
  const long before = allocations.load();
  if (set_words(c.n_ranks) == 1)
    plan_alone<1>(c, llep, tokens, memory.begin(), alone);
  else
    plan_alone<2>(c, llep, tokens, memory.begin(), alone);
  const long during = allocations.load() - before;  // apart: the text below allocates
  check(during == 0, c.name + ": " + std::to_string(during) + " allocations while planning");

  const bool narrow = wrong == Wrong::nothing && draw(random, 0, 1) != 0, on_device = draw(random, 0, 1) != 0,
             staged = draw(random, 0, 2) != 0;
  const Plan block = plan_on_block(c, llep, size, narrow, staged, on_device);
  const std::string what = std::to_string(size) + " threads, " + (llep ? "llep" : "joint") + ", " + c.name;
  check_same(block.quota, alone.quota, what + ": quota");
  check_same(block.rank_load, alone.rank_load, what + ": rank_load");
  check_same(block.transfers, alone.transfers, what + ": transfers");
  check_same(block.guests, alone.guests, what + ": guests");
  check_same(block.numbers, alone.numbers, what + ": numbers");
  check_same(block.bound, alone.bound, what + ": bound");
  check((block.faults[cuda::kNegative] != 0) == (wrong == Wrong::negative), what + ": notes negative counts");
  check((block.faults[cuda::kTooMany] != 0) == (wrong == Wrong::one_too_large || wrong == Wrong::too_many),
        what + ": notes too many tokens");
}

void compare_all(int size, double scale, const std::atomic<long>& allocations) {
  Random random(5000 + size);
  for (int i = 0; i < std::max(1.0, scale * kMostCases); ++i) {
    Case c = random_case(random, kRanks[i % (sizeof kRanks / sizeof *kRanks)]);
    for (const bool llep : {false, true}) compare(c, llep, size, Wrong::nothing, random, allocations);
    if (c.counts.size() < 2 || i % 4 != 0) continue;
    const Wrong wrong = static_cast<Wrong>(1 + i / 4 % 3);
    spoil(c, wrong);
    compare(c, i % 8 == 0, size, wrong, random, allocations);
  }
}

}  // namespace joint_team
