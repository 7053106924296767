// The block-parallel code of csrc/core under host threads: a team of any size must give the bits that one thread gives.
// Also here, because they need C++: the Cholesky alone, no allocation while solving, and the arithmetic of Share.
//
//     team_test [scale]     scale 1 takes some seconds; 0.1 is a smoke test
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <limits>
#include <memory>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "../csrc/core/solve_traffic.h"
#include "../csrc/core/split.h"
#include "allocations.h"
#include "check.h"
#include "thread_team.h"

namespace {

using namespace lplb;

constexpr int kJustAWarp = 0;
constexpr int kTeamSizes[] = {kJustAWarp, kWarpSize, 64, 128};
constexpr int kGroupSizes[] = {128, 1, 16, 65, 3, 8, 33, 2, 72, 5, 24, 4, 64, 12, 31, 100, 7, 48, 63, 127};
constexpr int kMostCases = 60;       // per team size, at scale 1
constexpr double kWork = 24000;      // per team size, at scale 1: Σ ranks · members, which barriers take time for
constexpr double kResidual = 1e-13;  // of a solve, relative to n·|M|·|x|

template <class T>
void check_same_bits(const T* got, const T* wanted, size_t n, const std::string& what) {
  for (size_t i = 0; i < n; ++i) {
    if (std::memcmp(&got[i], &wanted[i], sizeof(T)) == 0) continue;
    std::ostringstream text;
    text.precision(17);
    text << what << "[" << i << "] of " << n << ": " << got[i] << ", with one thread " << wanted[i];
    fail(text.str());
  }
  ++passed;
}

// Problems

struct Problem {
  std::string name;
  int n_logical, n_ranks, group_size;
  std::vector<int32_t> phy2log;
  std::vector<int64_t> loads;
  std::vector<int32_t> counts;  // [n_ranks, n_logical], whose sums are the loads
  int ranks_per_node;
  double weight;    // of traffic
  double decimals;  // that speeds spread over, to either side
  std::vector<double> speed;
  std::unique_ptr<GroupTables> groups;
};

// Appends the slots of one group: experts first … first + n_experts - 1, every one on 1 to n_ranks different ranks.
void place_group(Random& random, int first, int n_experts, int n_ranks, int slots, std::vector<int32_t>& phy2log) {
  std::vector<int> copies(n_experts, 1);
  for (int spare = n_ranks * slots - n_experts; spare > 0;) {
    const int e = draw(random, 0, n_experts - 1);
    const int added = std::min({draw(random, 1, n_ranks), spare, n_ranks - copies[e]});
    copies[e] += added;
    spare -= added;
  }
  // Dealt like cards, round after round: at most n_ranks copies in a row never meet on a rank.
  std::vector<int32_t> held(n_ranks * slots);  // [n_ranks, slots]
  int card = 0;
  for (int e = 0; e < n_experts; ++e)
    for (int c = 0; c < copies[e]; ++c, ++card) held[card % n_ranks * slots + card / n_ranks] = first + e;
  const auto holds = [&](int r, int e) {
    return std::find(&held[r * slots], &held[r * slots] + slots, e) != &held[r * slots] + slots;
  };
  for (int swap = 0; swap < 2 * n_ranks * slots; ++swap) {
    const int a = draw(random, 0, n_ranks - 1), b = draw(random, 0, n_ranks - 1);
    int32_t &mine = held[a * slots + draw(random, 0, slots - 1)], &yours = held[b * slots + draw(random, 0, slots - 1)];
    if (!holds(a, yours) && !holds(b, mine)) std::swap(mine, yours);
  }
  phy2log.insert(phy2log.end(), held.begin(), held.end());
}

enum LoadKind { lognormal, one_hot, zeros, mostly_zeros, huge, few, kLoadKinds };
constexpr const char* kLoadNames[] = {"lognormal", "one hot", "zeros", "mostly zeros", "huge", "few"};

std::vector<int64_t> random_loads(Random& random, LoadKind kind, int n) {
  std::vector<int64_t> loads(n, 0);
  const int hot = draw(random, 0, n - 1);
  std::lognormal_distribution<double> tokens(6.0, draw(random, 0.1, 2.0));
  for (int e = 0; e < n; ++e) {
    if (kind == lognormal) loads[e] = static_cast<int64_t>(tokens(random));
    if (kind == one_hot) loads[e] = e == hot ? draw(random, 1, 1 << 20) : draw(random, 0, 20);
    if (kind == mostly_zeros && draw(random, 0, 9) == 0) loads[e] = draw(random, 1, 5000);
    if (kind == huge) loads[e] = draw(random, 0, 1000000000);
    if (kind == few) loads[e] = draw(random, 0, 3);
  }
  return loads;
}

// Tokens of every source rank: of each expert some ranks have most, or one has all.
std::vector<int32_t> random_sources(Random& random, const std::vector<int64_t>& loads, int n_ranks) {
  const int n_logical = static_cast<int>(loads.size());
  std::vector<int32_t> counts(n_ranks * loads.size(), 0);
  std::vector<double> share(n_ranks);
  for (int e = 0; e < n_logical; ++e) {
    const double skew = draw(random, 0.0, 6.0);
    double all = 0.0;
    for (double& s : share) all += s = std::pow(draw(random, 1e-3, 1.0), skew);
    int64_t left = loads[e];
    for (int r = 0; r < n_ranks && draw(random, 0, 9) != 0; ++r) {
      const int64_t tokens = static_cast<int64_t>(loads[e] * (share[r] / all));
      counts[r * n_logical + e] = static_cast<int32_t>(std::min(tokens, left));
      left -= counts[r * n_logical + e];
    }
    counts[draw(random, 0, n_ranks - 1) * n_logical + e] += static_cast<int32_t>(left);
  }
  return counts;
}

Problem random_problem(Random& random, int group_size, LoadKind kind) {
  Problem p;
  const int n_groups = group_size <= 16 ? draw(random, 1, 3) : 1;
  const int slots = draw(random, 1, group_size <= 16 ? 8 : 4);
  const int most = group_size * slots;
  const int n_experts = draw(random, 0, 1) != 0 ? draw(random, slots, most) : std::max(slots, most - group_size);
  p.group_size = group_size;
  p.n_ranks = n_groups * group_size;
  p.n_logical = n_groups * n_experts;
  for (int g = 0; g < n_groups; ++g) place_group(random, g * n_experts, n_experts, group_size, slots, p.phy2log);
  p.loads = random_loads(random, kind, p.n_logical);
  p.counts = random_sources(random, p.loads, p.n_ranks);
  p.ranks_per_node = draw(random, 1, std::min(p.n_ranks, 9));
  p.weight = std::pow(10.0, draw(random, -3.0, 1.0));
  p.speed.assign(p.n_ranks, 1.0);
  const double spread[] = {0.0, 0.0, 0.3, 6.0};  // decimals; 6 is the most that a planner takes
  const double decimals = p.decimals = spread[draw(random, 0, 3)];
  if (decimals > 0.0)
    for (double& v : p.speed) v = std::pow(10.0, draw(random, -decimals, decimals));
  p.groups = std::make_unique<GroupTables>(p.phy2log, p.n_logical, p.n_ranks, group_size, p.speed,
                                           BuiltinAlgebra<kMaxGroup>::width(group_size));
  std::ostringstream name;
  name << n_groups << " x " << group_size << " ranks, " << n_experts << " experts in " << most << " slots, load "
       << kLoadNames[kind] << ", speeds 1e±" << decimals << ", nodes of " << p.ranks_per_node << ", weight "
       << p.weight;
  p.name = name.str();
  return p;
}

// Expert e on ranks n-2-e and n-1-e, one more on rank 0 alone: the first fill leaves rank 0 with twice its share and
// rank n-1 with nothing, and all tokens have to move by one rank, along a path of more steps than a warp has members.
Problem chain() {
  constexpr int kRanks = 100, kTokens = 1000;
  Problem p;
  p.name = "a chain of 100 ranks";
  p.n_ranks = p.group_size = kRanks;
  p.n_logical = kRanks + 1;
  for (int r = 0; r < kRanks; ++r) {
    p.phy2log.push_back(r == 0 ? kRanks - 1 : kRanks - 1 - r);
    p.phy2log.push_back(r == kRanks - 1 ? kRanks : kRanks - 2 - r);
  }
  p.loads.assign(p.n_logical, kTokens);
  p.loads[kRanks] = 0;
  p.counts.assign(kRanks * p.n_logical, 0);
  for (int e = 0; e < kRanks; ++e) p.counts[e * p.n_logical + e] = kTokens;
  p.ranks_per_node = 8;
  p.weight = 0.1;
  p.speed.assign(kRanks, 1.0);
  p.groups = std::make_unique<GroupTables>(p.phy2log, p.n_logical, p.n_ranks, p.group_size, p.speed,
                                           BuiltinAlgebra<kMaxGroup>::width(p.group_size));
  return p;
}

// Solving

enum Way { ipm, flow, with_traffic, kWays };
constexpr const char* kWayNames[] = {", ipm", ", flow", ", ipm with traffic"};

struct Solution {
  std::vector<int32_t> quota;      // [n_physical]
  std::vector<int64_t> rank_load;  // [n_ranks]
  std::vector<Result> results;     // [n_groups]
  std::vector<IterationRow> log;   // [n_groups, kMaxIterations + 1]
  std::vector<double> split;       // [n_groups, n_physical] y, as far as the group has replicas
  std::vector<int32_t> seen;       // [n_physical] quota as the last member saw it

  explicit Solution(const Problem& p)
      : quota(p.phy2log.size(), -1),
        rank_load(p.n_ranks, -1),
        results(p.groups->size()),
        log(p.groups->size() * (kMaxIterations + 1)),
        split(p.groups->size() * p.phy2log.size()),
        seen(p.phy2log.size()) {}
};

// Where solves work, filled with a pattern: a plan must not depend on what lies there.
class Memory {
 public:
  Memory(size_t bytes, int pattern) : begin_(::operator new(bytes, kAlignment)) { std::memset(begin_, pattern, bytes); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  ~Memory() { ::operator delete(begin_, kAlignment); }
  std::byte* begin() { return static_cast<std::byte*>(begin_); }

 private:
  static constexpr std::align_val_t kAlignment{64};
  void* begin_;
};

size_t problem_bytes(const Problem& p) {
  size_t bytes = 0;
  TrafficSpace f;
  for (int g = 0; g < p.groups->size(); ++g) {
    const Group& group = (*p.groups)[g];
    bytes = std::max(bytes, solve_bytes(group) + carve_traffic(group, nullptr, f));
  }
  return bytes;
}

template <int kWords, class Team>
void solve_one(Team& team, const Problem& p, Way way, const Group& group, std::byte* memory, const GroupPlan& plan,
               IterationRow* log) {
  Workspace x;
  std::byte* rest = memory + carve(group, memory, x);
  if (way == with_traffic) {
    TrafficSpace f;
    carve_traffic(group, rest, f);
    const Traffic traffic{{p.counts.data(), p.n_logical, p.n_ranks, p.ranks_per_node}, p.weight};
    solve_group_with_traffic<kWords>(team, BuiltinAlgebra<kMaxGroup>{}, group, x, f, p.loads.data(), traffic, plan,
                                     log);
    return;
  }
  const auto nothing = [] {};
  const Solver solver = way == ipm ? Solver::ipm : Solver::flow;
  solve_group<kWords>(team, BuiltinAlgebra<kMaxGroup>{}, group, x, p.loads.data(), Fewest{}, solver, plan,
                      way == ipm ? log : nullptr, nothing);
}

// All groups, one after another in the same memory. Allocates nothing.
template <class Team>
void solve_problem(Team& team, const Problem& p, Way way, Memory& memory, Solution& out) {
  for (int g = 0; g < p.groups->size(); ++g) {
    const Group& group = (*p.groups)[g];
    const GroupPlan plan{out.quota.data(), out.rank_load.data(), &out.results[g]};
    IterationRow* log = &out.log[g * (kMaxIterations + 1)];
    if (set_words(group.n_ranks) == 1)
      solve_one<1>(team, p, way, group, memory.begin(), plan, log);
    else
      solve_one<2>(team, p, way, group, memory.begin(), plan, log);
    if (team.rank() == team.size() - 1) {  // another member than the one that rounds
      Workspace x;
      carve(group, memory.begin(), x);
      std::copy(x.y, x.y + group.n_replicas, out.split.begin() + g * p.phy2log.size());
      std::copy(out.quota.begin(), out.quota.end(), out.seen.begin());
    }
    team.sync();
  }
}

Solution solve_alone(const Problem& p, Way way) {
  Solution s(p);
  Memory memory(problem_bytes(p), 0xFF);
  Solo team;
  const long before = allocations.load();
  solve_problem(team, p, way, memory, s);
  const long during = allocations.load() - before;
  check(during == 0, p.name + ": " + std::to_string(during) + " allocations while solving");
  return s;
}

// What any plan must keep to, whoever made it. Optimality is compared with other solvers in tests/test_solve.py and
// tests/test_traffic.py. With traffic, speeds of 1e-6 to 1e6 may take more iterations than there are.
void check_plan(const Problem& p, const Solution& s, Way way, const std::string& what) {
  std::vector<int64_t> tokens(p.n_logical, 0), load(p.n_ranks, 0);
  const int slots = static_cast<int>(p.phy2log.size()) / p.n_ranks;
  for (size_t i = 0; i < p.phy2log.size(); ++i) {
    if (s.quota[i] < 0) fail(what + ": quota " + std::to_string(s.quota[i]) + " of slot " + std::to_string(i));
    tokens[p.phy2log[i]] += s.quota[i];
    load[i / slots] += s.quota[i];
  }
  check(tokens == p.loads, what + ": the quotas of an expert do not add up to its load");
  check(load == s.rank_load, what + ": the quotas of a rank do not add up to its load");
  for (const Result& r : s.results) {
    if (way != with_traffic || p.decimals < 1.0)
      check(r.status == Status::solved, what + ": status " + std::to_string(static_cast<int>(r.status)));
    check(r.gap >= 0.0 && r.lower_bound >= 0.0, what + ": certificate");
    check(way == with_traffic || static_cast<double>(r.max_load) >= r.lower_bound * (1.0 - 1e-9), what + ": bound");
  }
}

void check_same_solution(const Solution& got, const Solution& wanted, const std::string& what) {
  check_same_bits(got.quota.data(), wanted.quota.data(), wanted.quota.size(), what + ": quota");
  check_same_bits(got.rank_load.data(), wanted.rank_load.data(), wanted.rank_load.size(), what + ": rank_load");
  check_same_bits(got.split.data(), wanted.split.data(), wanted.split.size(), what + ": y");
  check_same_bits(got.seen.data(), wanted.quota.data(), wanted.quota.size(), what + ": quota when solve returned");
  constexpr size_t kFields = sizeof(IterationRow) / sizeof(double);
  const double *rows = reinterpret_cast<const double*>(got.log.data()),
               *wanted_rows = reinterpret_cast<const double*>(wanted.log.data());
  check_same_bits(rows, wanted_rows, kFields * wanted.log.size(), what + ": iteration table");
  for (size_t g = 0; g < wanted.results.size(); ++g) {
    const Result &r = got.results[g], &w = wanted.results[g];
    check_same_bits(&r.max_load, &w.max_load, 1, what + ": max_load");
    check_same_bits(&r.lower_bound, &w.lower_bound, 1, what + ": lower_bound");
    check_same_bits(&r.gap, &w.gap, 1, what + ": gap");
    check_same_bits(&r.iterations, &w.iterations, 1, what + ": iterations");
    check(r.status == w.status, what + ": status");
  }
}

// Runs f(team) on a block of `size` threads, or on a warp by itself.
template <class F>
void run_team(int size, F f) {
  if (size == kJustAWarp)
    run_warp(f);
  else
    run_block(size, f);
}

std::string team_name(int size) { return size == kJustAWarp ? "a warp" : std::to_string(size) + " threads"; }

// One team solves all problems, in all ways, in the same memory.
void compare_solutions(int size, double scale) {
  Random random(1000 + size);
  std::vector<Problem> problems;
  double work = 0.0;
  for (int i = 0; i < scale * kMostCases; ++i) {
    const int group_size = kGroupSizes[i % std::size(kGroupSizes)];
    const int members = std::max(size, kWarpSize);
    if (i > 0 && work + group_size * members > scale * kWork) continue;  // the first, with 128 ranks, always
    const auto kind = static_cast<LoadKind>((i + i / std::size(kGroupSizes)) % kLoadKinds);  // each size meets all
    problems.push_back(random_problem(random, group_size, kind));
    work += problems.back().n_ranks * members;
  }

  if (size == kJustAWarp) problems.push_back(chain());

  std::vector<Solution> alone, together;
  size_t bytes = 0;
  for (const Problem& p : problems) {
    for (int way = 0; way < kWays; ++way) {
      alone.push_back(solve_alone(p, static_cast<Way>(way)));
      together.emplace_back(p);
      check_plan(p, alone.back(), static_cast<Way>(way), p.name + kWayNames[way]);
    }
    const Solution* of_ways = &alone[alone.size() - kWays];
    for (size_t g = 0; g < of_ways->results.size(); ++g) {
      const Result &by_ipm = of_ways[ipm].results[g], &by_flow = of_ways[flow].results[g];
      check(by_ipm.max_load == by_flow.max_load, p.name + ": max_load " + std::to_string(by_ipm.max_load) +
                                                     " by ipm, " + std::to_string(by_flow.max_load) + " by flow");
    }
    bytes = std::max(bytes, problem_bytes(p));
  }

  Memory memory(bytes, 0x55);
  run_team(size, [&](auto& team) {
    for (size_t i = 0; i < together.size(); ++i)
      solve_problem(team, problems[i / kWays], static_cast<Way>(i % kWays), memory, together[i]);
  });
  for (size_t i = 0; i < together.size(); ++i)
    check_same_solution(together[i], alone[i],
                        team_name(size) + ", " + problems[i / kWays].name + kWayNames[i % kWays]);
}

// The Cholesky by itself

constexpr int kColumns = 2;

struct System {
  int n;
  std::vector<double> m, rhs;  // column-major, symmetric; kColumns right-hand sides
};

// B·Bᵀ + shift·1 with rows of very different size, as late iterations have.
System random_system(Random& random, int n) {
  std::vector<double> b(n * n);
  const double spread = draw(random, 0.0, 3.0);
  for (int i = 0; i < n; ++i) {
    const double size = std::exp(draw(random, -spread, spread));
    for (int k = 0; k < n; ++k) b[i * n + k] = size * draw(random, -1.0, 1.0);
  }
  System s{n, std::vector<double>(n * n), std::vector<double>(kColumns * n)};
  for (int j = 0; j < n; ++j)
    for (int i = j; i < n; ++i) {
      double sum = i == j ? 1e-3 : 0.0;
      for (int k = 0; k < n; ++k) sum += b[i * n + k] * b[j * n + k];
      s.m[j * n + i] = s.m[i * n + j] = sum;
    }
  for (double& x : s.rhs) x = draw(random, -1.0, 1.0);
  return s;
}

// What a team leaves behind. `one` is the first column again, solved by itself.
struct Factored {
  std::vector<double> m, inv_d, x, one;
  std::vector<int> answer;  // of every member

  Factored(const System& s, int members)
      : m(s.m), inv_d(s.n, -1.0), x(s.rhs), one(s.rhs.begin(), s.rhs.begin() + s.n), answer(members, -1) {
    // only the lower triangle is input
    for (int j = 0; j < s.n; ++j)
      for (int i = 0; i < j; ++i) m[j * s.n + i] = std::numeric_limits<double>::quiet_NaN();
  }
};

template <class Team>
void factor_and_solve(Team& team, int n, Factored& f) {
  const bool positive =
      BuiltinAlgebra<kMaxGroup>::factor_and_solve<kColumns>(team, n, f.m.data(), f.inv_d.data(), f.x.data());
  f.answer[team.rank()] = positive;
  if (positive) BuiltinAlgebra<kMaxGroup>::solve(team, n, f.m.data(), f.inv_d.data(), f.one.data());
  team.sync();
}

void check_residual(const System& s, const Factored& f, const std::string& what) {
  const int n = s.n;
  for (int c = 0; c < kColumns; ++c)
    for (int i = 0; i < n; ++i) {
      double residual = -s.rhs[c * n + i], size = std::abs(s.rhs[c * n + i]);
      for (int j = 0; j < n; ++j) {
        residual += s.m[j * n + i] * f.x[c * n + j];
        size += std::abs(s.m[j * n + i] * f.x[c * n + j]);
      }
      if (!(std::abs(residual) <= kResidual * n * size))
        fail(what + ": residual " + std::to_string(residual / size) + " in row " + std::to_string(i));
    }
  check_same_bits(f.one.data(), f.x.data(), n, what + ": one right-hand side against two");
}

void compare_factors(int size) {
  Random random(2000 + size);
  std::vector<System> systems;
  for (int n = 8; n <= kMaxGroup; n += 8) systems.push_back(random_system(random, n));
  const size_t n_positive = systems.size();
  for (size_t i = 0; i < n_positive; ++i) {  // and the same sizes with a pivot that is not positive
    System s = systems[i];
    const int k = draw(random, 0, s.n - 1);
    for (int j = 0; j < s.n; ++j) s.m[k * s.n + j] = s.m[j * s.n + k] = 0.0;
    const double pivots[] = {0.0, -1.0, std::numeric_limits<double>::quiet_NaN()};
    s.m[k * s.n + k] = pivots[draw(random, 0, 2)];
    systems.push_back(s);
  }

  std::vector<Factored> together;
  for (const System& s : systems) together.emplace_back(s, std::max(size, kWarpSize));
  run_team(size, [&](auto& team) {
    for (size_t i = 0; i < systems.size(); ++i) factor_and_solve(team, systems[i].n, together[i]);
  });
  for (size_t i = 0; i < systems.size(); ++i) {
    const std::string what = team_name(size) + ", matrix of " + std::to_string(systems[i].n);
    const bool positive = i < n_positive;
    Factored alone(systems[i], 1);
    Solo solo;
    factor_and_solve(solo, systems[i].n, alone);
    check(alone.answer[0] == positive, what + ": factor() alone says " + std::to_string(alone.answer[0]));
    for (const int answer : together[i].answer)
      check(answer == positive, what + ": factor() says " + std::to_string(answer) + " to a member");
    if (!positive) continue;
    check_residual(systems[i], alone, what);
    check_same_bits(together[i].m.data(), alone.m.data(), alone.m.size(), what + ": L and U");
    check_same_bits(together[i].inv_d.data(), alone.inv_d.data(), alone.inv_d.size(), what + ": 1/D");
    check_same_bits(together[i].x.data(), alone.x.data(), alone.x.size(), what + ": two solutions");
    check_same_bits(together[i].one.data(), alone.one.data(), alone.one.size(), what + ": one solution");
  }
}

// Shares

// Tokens k … k + steps - 1 of n for a replica with quota q, against the formula in split.h.
void check_share(uint64_t q, uint64_t n, uint64_t k, uint64_t steps) {
  constexpr int32_t kHit = 5, kMiss = 6;
  Share share{0xDEADBEEF, static_cast<uint32_t>(q), static_cast<uint32_t>(n), kHit, kMiss};
  std::ostringstream what;
  what << "share of " << q << " in " << n << " from token " << k;
  check(share.start_at(k) == k - k * q / n, what.str() + ": tokens that go on");
  for (uint64_t i = k; i < k + steps && i < n; ++i) {
    const bool takes = (i + 1) * q / n > i * q / n;  // products below 2^62
    if (share.next() != (takes ? kHit : kMiss)) fail(what.str() + ": token " + std::to_string(i));
  }
  ++passed;
}

void check_shares(double scale) {
  Random random(3000);
  constexpr uint64_t kMost = std::numeric_limits<int32_t>::max();
  const auto up_to = [&](uint64_t most) { return std::uniform_int_distribution<uint64_t>(0, most)(random); };
  for (const uint64_t n : {uint64_t{1}, uint64_t{2}, kMost - 1, kMost})
    for (const uint64_t q : {uint64_t{0}, uint64_t{1}, n / 2, n - 1, n})
      for (const uint64_t k : {uint64_t{0}, uint64_t{1}, n / 2, n - 1, n}) check_share(q, n, k, 1000);
  for (int i = 0; i < scale * 4000; ++i) {
    const uint64_t n = 1 + up_to(kMost >> draw(random, 0, 30)) % kMost;
    check_share(up_to(n), n, up_to(n), 200);
  }
}

}  // namespace

int main(int argc, char** argv) {
  const double scale = argc > 1 ? std::atof(argv[1]) : 1.0;
  if (!(scale > 0.0 && scale <= 1000.0)) {
    std::printf("scale %s, allowed is above 0 and up to 1000\n", argv[1]);
    return 2;
  }
  check_allocations_are_counted();
  check_shares(scale);
  for (const int size : kTeamSizes) {
    compare_factors(size);
    compare_solutions(size, scale);
  }
  std::printf("%ld passed, 0 failed\n", passed);
  return 0;
}
