// Least-loaded assignment under a warp of host threads: the bits that one thread gives, and no allocation.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <memory>
#include <numeric>
#include <string>
#include <vector>

#include "../csrc/core/llep.h"
#include "check.h"
#include "thread_team.h"

namespace llep_team {

using namespace lplb;

constexpr int kRanks[] = {8, 1, 2, 127, 3, 16, 5, 33, 64, 7, 72, 4, 12, 65};
constexpr int kMostCases = 56;     // at scale 1
constexpr int kBeforePlan = 0x55;  // what lies in a plan's memory

struct Case {
  std::string name;
  std::unique_ptr<TransferTables> tables;
  std::vector<int64_t> tokens;
  LlepRules rules;
};

// A third of experts at home anywhere, the others in blocks; some with further residents.
Case random_case(Random& random, int n_ranks) {
  const int n_experts = draw(random, 1, 3 * n_ranks), domains[] = {n_ranks, n_ranks, 1, n_ranks % 2 == 0 ? 2 : n_ranks};
  const int n_slots = draw(random, 0, 1) != 0 ? n_experts : draw(random, 1, 3), domain = domains[draw(random, 0, 3)];
  const bool replicated = draw(random, 0, 1) != 0;
  std::vector<int32_t> rank, expert;
  for (int e = 0; e < n_experts; ++e) {
    std::vector<int32_t> ranks{draw(random, 0, 2) == 0 ? draw(random, 0, n_ranks - 1) : e * n_ranks / n_experts};
    while (replicated && draw(random, 0, 2) == 0) ranks.push_back(draw(random, 0, n_ranks - 1));
    std::sort(ranks.begin(), ranks.end());
    ranks.erase(std::unique(ranks.begin(), ranks.end()), ranks.end());
    rank.insert(rank.end(), ranks.begin(), ranks.end());
    expert.insert(expert.end(), ranks.size(), e);
  }
  Case c;
  c.tables = std::make_unique<TransferTables>(rank, expert, n_experts, n_ranks, n_slots, domain);
  const double spread = draw(random, 0.0, 2.5);
  const int step = draw(random, 1, 300);  // equal loads, now and then
  for (int e = 0; e < n_experts; ++e)
    c.tokens.push_back(static_cast<int64_t>(500 * std::exp(draw(random, -spread, spread))) / step * step);
  c.tokens[draw(random, 0, n_experts - 1)] += draw(random, 0, 1) != 0 ? int64_t{1} << draw(random, 0, 40) : 0;
  const int64_t minima[] = {0, 1, 64, 1024};
  const int64_t all = std::accumulate(c.tokens.begin(), c.tokens.end(), int64_t{0});
  c.rules = {draw(random, 0, 2) == 0 ? 1.0 : draw(random, 1.0, 1.5), minima[draw(random, 0, 3)], 1.0,
             draw(random, 0, 2) == 0, draw(random, 0, 4) == 0 ? all / n_ranks : -1};
  c.name = "llep of " + std::to_string(n_experts) + " experts on " + std::to_string(n_ranks) + " ranks in domains of " +
           std::to_string(domain) + " with " + std::to_string(n_slots) + " slots, m " + std::to_string(c.rules.m) +
           (c.rules.compat ? ", as published" : "");
  return c;
}

// A plan and the memory that it is made in.
struct Plan {
  std::vector<std::byte> memory;
  JointSpace space{};
  std::vector<int64_t> quota, rank_load, numbers;
  std::vector<int32_t> transfers, guests;
  double bound = -1.0;

  explicit Plan(const TransferProblem& p)
      : memory(carve_joint(p, false, nullptr, space) + 16, std::byte{kBeforePlan}),
        quota(size_t(p.n_experts) * p.n_ranks, -7),
        rank_load(p.n_ranks, -7),
        numbers(kTransferNumbers, -7),
        transfers(3 * size_t(p.n_rows), -7),
        guests(size_t(p.n_ranks) * p.n_slots, -7) {
    carve_joint(p, false, memory.data() + (16 - reinterpret_cast<uintptr_t>(memory.data()) % 16) % 16, space);
  }
  TransferArrays arrays() {
    return {quota.data(), rank_load.data(), transfers.data(), guests.data(), numbers.data(), &bound};
  }
};

template <class Warp>
void make_plan(Warp& warp, const Case& c, Plan& plan) {
  const TransferProblem& p = c.tables->problem();
  if (set_words(p.n_ranks) == 1)
    llep_plan<1>(warp, p, c.rules, c.tokens.data(), plan.space, plan.arrays());
  else
    llep_plan<2>(warp, p, c.rules, c.tokens.data(), plan.space, plan.arrays());
}

// What any plan must be; tests/test_llep.py looks closer.
void check_plan(const Case& c, const Plan& plan) {
  const TransferProblem& p = c.tables->problem();
  std::vector<int64_t> load(p.n_ranks, 0);
  for (int e = 0; e < p.n_experts; ++e) {
    int64_t tokens = 0;
    for (int r = 0; r < p.n_ranks; ++r) {
      tokens += plan.quota[e * p.n_ranks + r];
      load[r] += plan.quota[e * p.n_ranks + r];
    }
    check(tokens == c.tokens[e], c.name + ": the quotas of an expert do not add up to its load");
  }
  check(load == plan.rank_load, c.name + ": the quotas of a rank do not add up to its load");
}

// allocations: how many there were in this program so far.
inline void compare(double scale, const std::atomic<long>& allocations) {
  Random random(4000);
  std::vector<Case> cases;
  std::vector<Plan> alone, together;
  for (int i = 0; i < scale * kMostCases; ++i) {
    const Case& c = cases.emplace_back(random_case(random, kRanks[i % (sizeof kRanks / sizeof *kRanks)]));
    Plan& plan = alone.emplace_back(c.tables->problem());
    together.emplace_back(c.tables->problem());
    Solo solo;
    const long before = allocations.load();
    make_plan(solo, c, plan);
    const long during = allocations.load() - before;  // apart: the text below allocates
    check(during == 0, c.name + ": " + std::to_string(during) + " allocations while planning");
    check_plan(c, plan);
  }
  run_warp([&](auto& warp) {
    for (size_t i = 0; i < cases.size(); ++i) make_plan(warp, cases[i], together[i]);
  });
  for (size_t i = 0; i < cases.size(); ++i) {
    const Plan &got = together[i], &wanted = alone[i];
    check(got.quota == wanted.quota, cases[i].name + ": quota by a warp");
    check(got.rank_load == wanted.rank_load, cases[i].name + ": rank_load by a warp");
    check(got.transfers == wanted.transfers, cases[i].name + ": transfers by a warp");
    check(got.guests == wanted.guests, cases[i].name + ": guests by a warp");
    check(got.numbers == wanted.numbers, cases[i].name + ": numbers by a warp");
    check(got.bound == wanted.bound, cases[i].name + ": bound by a warp");
  }
}

}  // namespace llep_team
