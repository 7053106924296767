// Count, solve and assign as the blocks of the CUDA backend run them, on blocks of host threads, one after another:
// every result must have the bits of the CPU backend.
//
//     stage_test [scale]     scale 1 takes some seconds
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "../csrc/core/assign.h"
#include "../csrc/cpu/planner.h"
#include "../csrc/cuda/solve_block.h"
#include "check.h"
#include "thread_team.h"

namespace {

using namespace lplb;

constexpr int kTeamSizes[] = {32, 64, 128, 256};
constexpr int kGroupSizes[] = {8, 3, 16, 32, 1, 64, 12, 72, 5};
constexpr int kCases = 18;       // per team size, at scale 1
constexpr double kWork = 60000;  // per team size, at scale 1: Σ ranks · members, which barriers take time for
constexpr int kWordsBehind = 1 + cuda::kCheckWords;

template <class T>
void check_same(const std::vector<T>& got, const std::vector<T>& wanted, const std::string& what) {
  check(got.size() == wanted.size(), what + ": " + std::to_string(got.size()) + " elements");
  for (size_t i = 0; i < got.size(); ++i)
    if (std::memcmp(&got[i], &wanted[i], sizeof(T)) != 0)
      fail(what + "[" + std::to_string(i) + "] of " + std::to_string(got.size()) + ": " + std::to_string(got[i]) +
           ", on the CPU backend " + std::to_string(wanted[i]));
  ++passed;
}

// One batch: a placement, the tokens of one rank, and what the other ranks have counted.
struct Batch {
  int n_logical, n_ranks, group_size, source, n_blocks, ranks_per_node;
  Split split;
  int64_t fewest;
  std::vector<int32_t> phy2log;
  std::vector<double> speed;
  std::vector<int64_t> indices;  // with some outside [-1, n_logical)
  int64_t outside;
  std::vector<int32_t> others;  // [n_ranks, n_logical], the row of `source` is filled in by its count
  std::string name;
};

// Every expert of a group once, then copies of the first ones, dealt out like cards.
Batch random_batch(Random& random, int group_size) {
  Batch b;
  b.group_size = group_size;
  const int n_groups = group_size <= 16 ? draw(random, 1, 3) : 1, slots = draw(random, 2, 9);
  b.n_ranks = n_groups * group_size;
  const int spare = group_size > 1 ? draw(random, 0, group_size * slots / 2) : 0,
            n_experts = group_size * slots - spare;
  b.n_logical = n_groups * n_experts;
  b.phy2log.resize(b.n_ranks * slots);
  for (int g = 0; g < n_groups; ++g) {
    std::vector<int> copies(n_experts, 1);
    for (int i = 0; i < spare;) {
      const int e = draw(random, 0, n_experts - 1) * draw(random, 0, n_experts - 1) / std::max(1, n_experts - 1);
      if (copies[e] < group_size) ++copies[e], ++i;
    }
    int card = 0;
    for (int e = 0; e < n_experts; ++e)
      for (int k = 0; k < copies[e]; ++k, ++card)
        b.phy2log[(g * group_size + card % group_size) * slots + card / group_size] = g * n_experts + e;
  }
  b.speed.assign(b.n_ranks, 1.0);
  if (draw(random, 0, 2) == 0)
    for (double& v : b.speed) v = std::uniform_real_distribution<double>(0.5, 2.0)(random);

  b.source = draw(random, 0, b.n_ranks - 1);
  b.split = draw(random, 0, 2) == 0 ? Split::plain : Split::local_first;
  b.ranks_per_node = draw(random, 1, b.n_ranks);
  b.fewest = draw(random, 0, 3) == 0 ? draw(random, 1, 4000) : 0;
  b.n_blocks = draw(random, 1, 7);
  const int n = draw(random, 0, 4) == 0 ? draw(random, 0, 40) : draw(random, 0, 6000);
  b.outside = 0;
  for (int i = 0; i < n; ++i) {
    const int kind = draw(random, 0, 60);
    // hot experts: the smallest of three draws
    int64_t e = std::min(
        {draw(random, 0, b.n_logical - 1), draw(random, 0, b.n_logical - 1), draw(random, 0, b.n_logical - 1)});
    if (kind == 0) e = -1;
    if (kind == 1) e = draw(random, 0, 1) == 0 ? b.n_logical + draw(random, 0, 5) : -2 - draw(random, 0, 5);
    b.outside += e < -1 || e >= b.n_logical;
    b.indices.push_back(e);
  }
  b.others.resize(b.n_ranks * b.n_logical);
  for (int32_t& tokens : b.others) tokens = draw(random, 0, 2) == 0 ? draw(random, 0, 900) : draw(random, 0, 20);
  b.name = std::to_string(n_groups) + " x " + std::to_string(group_size) + " ranks, " + std::to_string(b.n_logical) +
           " experts in " + std::to_string(b.phy2log.size()) + " slots, " + std::to_string(n) + " tokens in " +
           std::to_string(b.n_blocks) + " blocks";
  return b;
}

// All that the stages write.
template <class Index>
struct Results {
  std::vector<int32_t> prefix, row, quota, iterations, status;
  std::vector<int64_t> loads, rank_load, max_load;
  std::vector<double> lower_bound, gap;
  std::vector<Index> physical;
  int64_t counter = 5;

  Results(const Batch& b)
      : prefix(b.n_blocks * b.n_logical),
        row(b.n_logical),
        quota(b.phy2log.size(), -7),
        iterations(b.n_ranks / b.group_size),
        status(iterations),
        loads(b.n_logical),
        rank_load(b.n_ranks),
        max_load(iterations.size()),
        lower_bound(iterations.size()),
        gap(iterations.size()),
        physical(b.indices.size(), -7) {}
};

template <class Index>
std::vector<Index> indices_of(const Batch& b) {
  return {b.indices.begin(), b.indices.end()};
}

template <class Index>
int64_t length_of(const Batch& b) {
  return std::max<int64_t>(1, (static_cast<int64_t>(b.indices.size()) + b.n_blocks - 1) / b.n_blocks);
}

template <class Index>
Results<Index> on_the_cpu(const Batch& b, Solver solver) {
  Results<Index> r(b);
  std::vector<Index> indices = indices_of<Index>(b);
  for (Index& e : indices)
    if (e < -1 || e >= b.n_logical) e = -1;
  cpu::Planner planner(b.phy2log, b.n_logical, b.n_ranks, b.group_size, b.speed, 1);
  const cpu::Chunks chunks{static_cast<int64_t>(indices.size()), b.n_blocks, length_of<Index>(b)};
  check(planner.count(indices.data(), chunks, r.prefix.data(), 1) == -1, b.name + ": count() refuses");
  std::copy(r.prefix.end() - b.n_logical, r.prefix.end(), r.row.begin());
  std::vector<int32_t> table = b.others;
  std::copy(r.row.begin(), r.row.end(), table.begin() + b.source * b.n_logical);
  const Sources from{table.data(), b.n_logical, b.n_ranks, b.ranks_per_node};
  cpu::total(from, b.n_logical, r.loads.data());
  const PlanArrays out{r.quota.data(), r.rank_load.data(),  r.max_load.data(), r.lower_bound.data(),
                       r.gap.data(),   r.iterations.data(), r.status.data()};
  r.counter += planner.solve(r.loads.data(), 1, from, b.fewest, solver, out, nullptr, 1);
  std::vector<int32_t> weights(b.phy2log.size()), starts(b.n_logical);
  const cpu::Shares shares{weights.data(), starts.data()};
  planner.shares(from, b.source, b.split, r.quota.data(), r.status.data(), shares);
  planner.assign(indices.data(), chunks, r.prefix.data(), shares, r.physical.data(), 1);
  return r;
}

// What is wrong with the table that the other ranks sent.
enum class Wrong { nothing, error_word, another_word, too_many };

template <class Index>
struct Blocks {
  Results<Index> results;
  int64_t outside = 0, faults[4] = {0, 0, 0, 0};
  int32_t halt = 0;  // set to 1 before a good call, as one that failed before it would leave it
};

int odd_rank(const Batch& b) { return (b.source + 1) % b.n_ranks; }

template <class Index>
Blocks<Index> on_blocks(const Batch& b, Solver solver, int size, Wrong wrong) {
  Blocks<Index> out{Results<Index>(b)};
  Results<Index>& r = out.results;
  out.halt = wrong == Wrong::nothing;
  const GroupTables groups(b.phy2log, b.n_logical, b.n_ranks, b.group_size, b.speed,
                           BuiltinAlgebra<kMaxGroup>::width(b.group_size));
  const cuda::Tables tables = cuda::make_tables(groups, b.phy2log, b.n_logical, b.n_ranks);
  std::vector<std::byte> memory(cuda::solve_block_bytes(tables.groups) + 16);
  std::byte* aligned = memory.data() + (16 - reinterpret_cast<uintptr_t>(memory.data()) % 16) % 16;
  const int n_warps = size / kWarpSize, stride = b.n_logical + kWordsBehind;
  std::vector<int32_t> counters(std::max(n_warps * b.n_logical, size));
  std::vector<int32_t> warp_prefix(b.n_blocks * n_warps * b.n_logical), table(b.n_ranks * stride);
  std::vector<int64_t> outside(size);
  std::vector<Index> indices = indices_of<Index>(b);
  const Cut cut{static_cast<int64_t>(indices.size()), length_of<Index>(b)};
  const Slots slots = tables.slots.at(tables.image.data(), b.n_logical);
  std::vector<Proportion> shares(slots.n_copies);
  std::vector<int32_t> weight(slots.n_copies), start(slots.n_copies);

  for (int rank = 0; rank < b.n_ranks; ++rank) {
    int32_t* row = &table[rank * stride];
    std::copy_n(&b.others[rank * b.n_logical], b.n_logical, row);
    const int32_t words[kWordsBehind] = {0, 11, 22, 33};
    std::copy_n(words, kWordsBehind, row + b.n_logical);
  }
  if (wrong == Wrong::error_word) table[odd_rank(b) * stride + b.n_logical] = 2;
  if (wrong == Wrong::another_word) table[odd_rank(b) * stride + b.n_logical + 3] = 34;
  if (wrong == Wrong::too_many)
    for (int rank = 0; rank < b.n_ranks; ++rank) table[rank * stride] = INT32_MAX;

  cuda::SolveArguments a{};
  a.image = tables.image.data();
  a.n_groups = groups.size();
  a.n_logical = b.n_logical;
  a.n_physical = static_cast<int>(b.phy2log.size());
  a.n_ranks = b.n_ranks;
  a.solver = solver;
  a.fewest = b.fewest;
  a.loads = r.loads.data();
  const Sources from{table.data(), stride, b.n_ranks, b.ranks_per_node};
  a.table = {from, cuda::kCheckWords, {11, 22, 33}, &out.halt, out.faults, &r.counter, 8};
  a.quota = r.quota.data();
  a.rank_load = r.rank_load.data();
  a.max_load = r.max_load.data();
  a.lower_bound = r.lower_bound.data();
  a.gap = r.gap.data();
  a.iterations = r.iterations.data();
  a.status = r.status.data();

  run_block(size, [&](ThreadBlock& block) {
    for (int c = 0; c < b.n_blocks; ++c) {
      outside[block.rank()] += count_block(block, indices.data(), cut, c, b.n_logical, counters.data(),
                                           &warp_prefix[c * n_warps * b.n_logical], &r.prefix[c * b.n_logical]);
      block.sync();
    }
    scan_blocks(block, b.n_blocks, b.n_logical, counters.data(), r.prefix.data(), r.row.data());
    if (wrong != Wrong::too_many) block.each(b.n_logical, [&](int e) { table[b.source * stride + e] = r.row[e]; });
    block.sync();
    for (int g = 0; g < a.n_groups; ++g) {
      // the teams and algebras of solve.cu
      if (b.group_size <= 16) {
        if (block.warp_index() == 0)
          cuda::solve_block<1>(block.warp(), BuiltinAlgebra<16>{}, solver, a, g, aligned, [] {});
      } else if (b.group_size <= 64)
        cuda::solve_block<1>(block, BuiltinAlgebra<64>{}, solver, a, g, aligned, [] {});
      else
        cuda::solve_block<2>(block, BuiltinAlgebra<kMaxGroup>{}, solver, a, g, aligned, [] {});
      block.sync();
    }
    const ShareRule rule{from, b.source, b.split, b.group_size, r.quota.data(), r.status.data()};
    find_shares(block, slots, rule, weight.data(), start.data(), shares.data());
    block.sync();
    for (int c = 0; c < b.n_blocks; ++c) {
      assign_block(block, indices.data(), r.physical.data(), cut, c, slots, shares.data(), start.data(),
                   counters.data(), &warp_prefix[c * n_warps * b.n_logical],
                   c > 0 ? &r.prefix[(c - 1) * b.n_logical] : nullptr);
      block.sync();
    }
  });
  out.outside = std::accumulate(outside.begin(), outside.end(), int64_t{0});
  return out;
}

template <class Index>
void compare(const Batch& b, Solver solver, int size) {
  const std::string what = std::to_string(size) + " threads, " + b.name + (solver == Solver::ipm ? ", ipm" : ", flow");
  const Results<Index> wanted = on_the_cpu<Index>(b, solver);
  const Blocks<Index> got = on_blocks<Index>(b, solver, size, Wrong::nothing);
  const Results<Index>& r = got.results;
  check_same(r.prefix, wanted.prefix, what + ": counts of blocks");
  check_same(r.row, wanted.row, what + ": counts");
  check_same(r.loads, wanted.loads, what + ": loads");
  check_same(r.quota, wanted.quota, what + ": quota");
  check_same(r.rank_load, wanted.rank_load, what + ": rank_load");
  check_same(r.max_load, wanted.max_load, what + ": max_load");
  check_same(r.lower_bound, wanted.lower_bound, what + ": lower_bound");
  check_same(r.gap, wanted.gap, what + ": gap");
  check_same(r.iterations, wanted.iterations, what + ": iterations");
  check_same(r.status, wanted.status, what + ": status");
  check_same(r.physical, wanted.physical, what + ": physical");
  check(r.counter == wanted.counter, what + ": counter " + std::to_string(r.counter));
  check(got.outside == b.outside, what + ": outside " + std::to_string(got.outside));
  check(got.faults[1] == 0 && got.faults[2] == 0, what + ": a fault is noted");
}

void check_refusals(const Batch& b, int size) {
  for (const Wrong wrong : {Wrong::error_word, Wrong::another_word, Wrong::too_many}) {
    const Blocks<int64_t> got = on_blocks<int64_t>(b, Solver::ipm, size, wrong);
    const std::string what = b.name + ": a table that is wrong in way " + std::to_string(static_cast<int>(wrong));
    check(got.halt == 1, what + " is taken");
    check(got.results.status[0] == static_cast<int32_t>(Status::refused), what + " has a plan");
    // expert 0 has too many, so only its group is not counted
    const int others = wrong == Wrong::too_many ? b.n_ranks / b.group_size - 1 : 0;
    check(got.results.counter == 5 + others, what + " leaves the counter at " + std::to_string(got.results.counter));
    check(got.faults[1] == (wrong == Wrong::too_many ? 0 : 1 + odd_rank(b)),
          what + " is put down to rank " + std::to_string(got.faults[1] - 1));
    check(got.faults[2] == (wrong == Wrong::too_many), what + " is not said to have too many tokens");
  }
}

// Proportion, for tokens in any order, against the formula in split.h.
void check_proportions(double scale) {
  Random random(4000);
  constexpr uint64_t kMost = INT32_MAX;
  const auto up_to = [&](uint64_t most) { return std::uniform_int_distribution<uint64_t>(0, most)(random); };
  const auto one = [](uint64_t q, uint64_t n, uint64_t k) {
    auto left = static_cast<uint32_t>(k);
    const bool takes = Proportion::of(static_cast<uint32_t>(q), static_cast<uint32_t>(n)).takes(left);
    const bool wanted = (k + 1) * q / n > k * q / n;  // products below 2^62
    const std::string what = "token " + std::to_string(k) + " of " + std::to_string(n) + ", quota " + std::to_string(q);
    check(takes == wanted, what);
    if (!takes) check(left == k - k * q / n, what + " goes on as " + std::to_string(left));
  };
  for (const uint64_t n : {uint64_t{1}, uint64_t{2}, uint64_t{3}, kMost - 1, kMost})
    for (const uint64_t q : {uint64_t{0}, uint64_t{1}, n / 3, n / 2, n - 1, n})
      for (const uint64_t k : {uint64_t{0}, uint64_t{1}, n / 3, n / 2, n - 1})
        if (k < n) one(q, n, k);
  for (int i = 0; i < scale * 400000; ++i) {
    const uint64_t n = 1 + up_to(kMost >> draw(random, 0, 30)) % kMost, q = up_to(n);
    // where k·q is a multiple of n, or one less, is where rounding could go wrong
    const uint64_t turn = q > 0 ? up_to(q - 1) * n / q : 0;
    for (const uint64_t k : {up_to(n - 1), turn, turn + 1})
      if (k < n) one(q, n, k);
  }
}

}  // namespace

int main(int argc, char** argv) {
  const double scale = argc > 1 ? std::atof(argv[1]) : 1.0;
  if (!(scale > 0.0 && scale <= 1000.0)) {
    std::printf("scale %s, allowed is above 0 and up to 1000\n", argv[1]);
    return 2;
  }
  check_proportions(scale);
  for (const int size : kTeamSizes) {
    Random random(3000 + size);
    double work = 0.0;
    for (int i = 0; i < scale * kCases; ++i) {
      const Batch b = random_batch(random, kGroupSizes[i % std::size(kGroupSizes)]);
      if (i > 0 && work + b.n_ranks * size > scale * kWork) continue;
      work += b.n_ranks * size;
      const Solver solver = i % 4 == 3 ? Solver::flow : Solver::ipm;
      if (i % 2 == 0)
        compare<int64_t>(b, solver, size);
      else
        compare<int32_t>(b, solver, size);
      if (i == 0) check_refusals(b, size);
    }
  }
  std::printf("%ld passed, 0 failed\n", passed);
  return 0;
}
