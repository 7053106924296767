// One balance group, compiled from a placement, and the memory one solve of it needs.
//
// Ranks are numbered inside the group. Logical experts with one slot are "singles": their tokens are a_r. The others
// are the "experts" of the LP, numbered 0 … n_experts-1 by ascending number of slots (the most bound first, as the flow
// solver's first fill wants them); their slots are the "replicas" p, numbered expert by expert, in slot order.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "team.h"

namespace lplb {

inline constexpr int kMaxGroup = 128;  // ranks per group: two 64-bit words in a RankSet
inline constexpr int kMaxIterations = 20;
inline constexpr double kGapTolerance = 1e-4;

// Words of a RankSet for a group of this size.
LPLB_HD constexpr int set_words(int n_ranks) { return n_ranks <= 64 ? 1 : 2; }

// Index counts replicas and experts, Rank counts ranks: as small as the backend has them.
template <class Index, class Rank>
struct BasicGroup {
  int n_ranks, n_padded, n_experts, n_replicas, n_singles;
  int first_rank;                      // of the group, in the placement
  bool unit_speed;                     // every v_r is 1
  const Index* expert_begin;           // [n_experts + 1] first replica of an expert
  const Rank* replica_rank;            // [n_replicas]
  const Index* replica_expert;         // [n_replicas]
  const Index* rank_begin;             // [n_ranks + 1] into rank_replica
  const Index* rank_replica;           // [n_replicas] the replicas of a rank, ascending
  int n_waves;                         // of experts, none of which share a rank
  const Index* wave_begin;             // [n_waves + 1] into wave_expert
  const Index* wave_expert;            // [n_experts] every expert is in a later wave than those before it on its ranks
  const double* speed;                 // [n_ranks] v_r
  const double* inv_speed;             // [n_ranks] 1 / v_r
  const uint64_t* expert_ranks;        // [n_experts, set_words] the ranks that hold an expert, as a set
  const uint64_t* rank_replica_ranks;  // [n_replicas, set_words] the same for the experts of rank_replica
  const int32_t* expert_logical;       // [n_experts]
  const int32_t* replica_slot;         // [n_replicas] physical expert
  const int32_t* single_begin;         // [n_ranks + 1] into single_*
  const int32_t* single_logical;       // [n_singles]
  const int32_t* single_slot;          // [n_singles] physical expert
};
using Group = BasicGroup<int32_t, int32_t>;

// skipped: too few tokens to be worth a plan. refused: the counts were not as they must be, and the plan is of nothing.
enum class Status : int32_t { solved = 0, iteration_limit = 1, numerical = 2, skipped = 3, refused = 4 };

LPLB_HD constexpr bool takes_fixed_split(int32_t status) { return status >= static_cast<int32_t>(Status::skipped); }

enum class Solver : int32_t { ipm = 0, flow = 1 };

// How a source rank's tokens share out the quotas. plain: all sources alike. local_first: a copy takes tokens of its
// own rank first, then of its node, then the rest.
enum class Split : int32_t { plain = 0, local_first = 1 };

// Who sends how many tokens: rank r's of logical expert e at first[r·stride + e]. A node is ranks_per_node consecutive
// ranks; 0 where the one row is tokens of no rank in particular.
template <class Count>
struct BasicSources {
  const Count* first;
  int64_t stride;
  int n_ranks, ranks_per_node;
};
using Sources = BasicSources<int32_t>;

// A group with fewer tokens than `least`, of these sources, is not solved: it takes the fixed split. 0 solves all.
struct Fewest {
  int64_t least;
  Sources from;
  int slots_per_rank;
};

// One row of the interior point's iteration table.
struct IterationRow {
  double primal, dual, gap, mu, step_primal, step_dual;
};

// What a solve says about one group.
struct Result {
  int64_t max_load;    // whole tokens; with speeds ⌈max load_r / v_r⌉
  double lower_bound;  // tokens (per unit of speed)
  double gap;          // (fractional objective - lower_bound) / lower_bound
  int32_t iterations;
  Status status;
};

// Where a plan for a batch of loads is written: quota [batch, n_physical], rank_load [batch, n_ranks], the others
// [batch, n_groups].
struct PlanArrays {
  int32_t* quota;
  int64_t *rank_load, *max_load;
  double *lower_bound, *gap;
  int32_t *iterations, *status;
};

// Where one solve works; every pointer has the size its Group asks for. Nothing is kept between solves.
struct Workspace {
  double *a, *b, *rhs, *inv_d;             // per rank, padded; rhs has two columns
  double *w, *inv_sigma, *q;               // per expert
  double *y, *z, *h, *dz, *inv_z, *extra;  // per complementary pair: replicas, then ranks; extra replaces inv_z
  int64_t *tokens, *single_tokens;         // per expert, per rank
  double* m;                               // the matrix in the ranks
  // Flow and rounding come when the matrix is done with, and have its memory.
  int64_t *quota, *rank_tokens, *rank_capacity;  // per replica; the others per rank
  double *rank_load, *rank_limit;                // per rank: the flow solver's fractional loads and capacities
  uint64_t *reach, *level;        // [n_ranks, set_words] where a rank can send tokens at once; [n_ranks + 1, …]
  int32_t *path, *giver, *taker;  // [n_ranks + 1] a way along which tokens move
  uint64_t* sets;                 // [n_experts + n_replicas, set_words] room for a copy of the rank sets
};

// Hands out the memory at `base`, or only measures it where base is null. Returns the bytes used.
template <class AnyGroup>
LPLB_HD inline size_t carve(const AnyGroup& g, std::byte* base, Workspace& ws) {
  constexpr size_t kAlign = 64;
  size_t used = 0;
  auto take = [&](auto*& pointer, size_t count) {
    using T = std::remove_reference_t<decltype(*pointer)>;
    if (base != nullptr) pointer = reinterpret_cast<T*>(base + used);
    used += (count * sizeof(T) + kAlign - 1) / kAlign * kAlign;
  };
  const size_t n = g.n_padded, e = g.n_experts, p = g.n_replicas, r = g.n_ranks, words = set_words(g.n_ranks);
  take(ws.a, n);
  take(ws.b, n);
  take(ws.rhs, 2 * n);
  take(ws.inv_d, n);
  take(ws.w, e);
  take(ws.inv_sigma, e);
  take(ws.q, e);
  take(ws.y, p + r);
  take(ws.z, p + r);
  take(ws.inv_z, p + r);
  take(ws.h, p + r);
  take(ws.dz, p + r);
  ws.extra = ws.inv_z;
  take(ws.tokens, e);
  take(ws.single_tokens, r);
  const size_t shared = used;
  take(ws.m, n * n);
  const size_t with_matrix = used;
  used = shared;
  take(ws.quota, p);
  take(ws.rank_tokens, r);
  take(ws.rank_capacity, r);
  take(ws.rank_load, r);
  take(ws.rank_limit, r);
  take(ws.reach, words * r);
  take(ws.level, words * (r + 1));
  take(ws.path, r + 1);
  take(ws.giver, r + 1);
  take(ws.taker, r + 1);
  take(ws.sets, words * (e + p));
  return used > with_matrix ? used : with_matrix;
}

template <class AnyGroup>
size_t solve_bytes(const AnyGroup& g) {
  Workspace ws{};
  return carve(g, nullptr, ws);
}

// A placement cut into groups, with the memory behind every Group. The caller has checked the placement.
class GroupTables {
 public:
  // width: of the matrix, as the algebra in use wants it for this group size.
  GroupTables(const std::vector<int32_t>& phy2log, int n_logical, int n_ranks, int group_size,
              const std::vector<double>& speed, int width);
  int size() const { return static_cast<int>(groups_.size()); }
  const Group& operator[](int i) const { return groups_[i]; }

 private:
  struct Storage {
    std::vector<int32_t> expert_begin, expert_logical, replica_rank, replica_expert, replica_slot, rank_begin,
        rank_replica, wave_begin, wave_expert, single_begin, single_logical, single_slot;
    std::vector<uint64_t> expert_ranks, rank_replica_ranks;
    std::vector<double> speed, inv_speed;
  };
  static void find_waves(Storage& t, int n_ranks);

  std::vector<Storage> storage_;
  std::vector<Group> groups_;
};

// The flow solver fills experts one after another; those of a wave may be filled at once, with the same result.
inline void GroupTables::find_waves(Storage& t, int n_ranks) {
  const int n_experts = static_cast<int>(t.expert_logical.size());
  std::vector<int> filled(n_ranks, 0), wave_of(n_experts);  // filled: waves up to and with a rank's last
  int n_waves = 0;
  for (int e = 0; e < n_experts; ++e) {
    int wave = 0;
    for (int p = t.expert_begin[e]; p < t.expert_begin[e + 1]; ++p) wave = std::max(wave, filled[t.replica_rank[p]]);
    for (int p = t.expert_begin[e]; p < t.expert_begin[e + 1]; ++p) filled[t.replica_rank[p]] = wave + 1;
    wave_of[e] = wave;
    n_waves = std::max(n_waves, wave + 1);
  }
  for (int wave = 0; wave < n_waves; ++wave) {
    t.wave_begin.push_back(static_cast<int32_t>(t.wave_expert.size()));
    for (int e = 0; e < n_experts; ++e)
      if (wave_of[e] == wave) t.wave_expert.push_back(e);
  }
  t.wave_begin.push_back(n_experts);
}

inline GroupTables::GroupTables(const std::vector<int32_t>& phy2log, int n_logical, int n_ranks, int group_size,
                                const std::vector<double>& speed, int width) {
  const int words = set_words(group_size);
  const int slots = static_cast<int>(phy2log.size()) / n_ranks;
  const int n_groups = n_ranks / group_size;
  storage_.resize(n_groups);
  groups_.resize(n_groups);
  std::vector<std::vector<int32_t>> slots_of(n_logical);
  for (size_t p = 0; p < phy2log.size(); ++p) slots_of[phy2log[p]].push_back(static_cast<int32_t>(p));

  std::vector<int> by_slots(n_logical);
  for (int e = 0; e < n_logical; ++e) {
    by_slots[e] = e;
    if (slots_of[e].empty()) throw std::invalid_argument("logical expert " + std::to_string(e) + " has no slot");
  }
  std::stable_sort(by_slots.begin(), by_slots.end(),
                   [&](int a, int b) { return slots_of[a].size() < slots_of[b].size(); });

  for (int g = 0; g < n_groups; ++g) {
    Storage& t = storage_[g];
    const int first_rank = g * group_size;
    std::vector<std::vector<int32_t>> singles(group_size), replicas(group_size);
    t.expert_begin.push_back(0);
    for (const int e : by_slots) {
      const auto& where = slots_of[e];
      if (where[0] / slots / group_size != g) continue;
      if (where.size() == 1) {
        singles[where[0] / slots - first_rank].push_back(e);
        continue;
      }
      uint64_t ranks[2] = {0, 0};
      for (const int32_t slot : where) {
        const int r = slot / slots - first_rank;
        if (r < 0 || r >= group_size)
          throw std::invalid_argument("logical expert " + std::to_string(e) + " has slots in two groups");
        if (ranks[r / 64] >> (r % 64) & 1)
          throw std::invalid_argument("logical expert " + std::to_string(e) + " is twice on one rank");
        ranks[r / 64] |= uint64_t{1} << (r % 64);
        replicas[r].push_back(static_cast<int32_t>(t.replica_slot.size()));
        t.replica_slot.push_back(slot);
        t.replica_rank.push_back(r);
        t.replica_expert.push_back(static_cast<int32_t>(t.expert_logical.size()));
      }
      t.expert_logical.push_back(e);
      t.expert_begin.push_back(static_cast<int32_t>(t.replica_slot.size()));
      t.expert_ranks.insert(t.expert_ranks.end(), ranks, ranks + words);
    }
    t.rank_begin.push_back(0);
    t.single_begin.push_back(0);
    for (int r = 0; r < group_size; ++r) {
      t.rank_replica.insert(t.rank_replica.end(), replicas[r].begin(), replicas[r].end());
      t.rank_begin.push_back(static_cast<int32_t>(t.rank_replica.size()));
      t.single_logical.insert(t.single_logical.end(), singles[r].begin(), singles[r].end());
      t.single_begin.push_back(static_cast<int32_t>(t.single_logical.size()));
    }
    find_waves(t, group_size);
    for (const int32_t p : t.rank_replica) {
      const auto ranks = t.expert_ranks.begin() + words * t.replica_expert[p];
      t.rank_replica_ranks.insert(t.rank_replica_ranks.end(), ranks, ranks + words);
    }
    for (const int32_t e : t.single_logical) t.single_slot.push_back(slots_of[e][0]);
    t.speed.assign(speed.begin() + first_rank, speed.begin() + first_rank + group_size);
    for (const double v : t.speed) t.inv_speed.push_back(1.0 / v);

    Group& v = groups_[g];
    v.n_ranks = group_size;
    v.n_padded = width;
    v.n_experts = static_cast<int>(t.expert_logical.size());
    v.n_replicas = static_cast<int>(t.replica_slot.size());
    v.n_singles = static_cast<int>(t.single_logical.size());
    v.first_rank = first_rank;
    v.unit_speed = true;
    for (const double s : t.speed) v.unit_speed = v.unit_speed && s == 1.0;
    v.expert_begin = t.expert_begin.data();
    v.expert_logical = t.expert_logical.data();
    v.replica_rank = t.replica_rank.data();
    v.replica_expert = t.replica_expert.data();
    v.replica_slot = t.replica_slot.data();
    v.rank_begin = t.rank_begin.data();
    v.rank_replica = t.rank_replica.data();
    v.n_waves = static_cast<int>(t.wave_begin.size()) - 1;
    v.wave_begin = t.wave_begin.data();
    v.wave_expert = t.wave_expert.data();
    v.single_begin = t.single_begin.data();
    v.single_logical = t.single_logical.data();
    v.single_slot = t.single_slot.data();
    v.expert_ranks = t.expert_ranks.data();
    v.rank_replica_ranks = t.rank_replica_ranks.data();
    v.speed = t.speed.data();
    v.inv_speed = t.inv_speed.data();
  }
}

}  // namespace lplb
