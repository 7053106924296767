// Placements, scored and made on the CPU. Pointers and sizes only; the caller has checked all arguments.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "solve.h"

namespace lplb::cpu {

// Memory of one thread, which grows to what the largest group wants.
class Scratch {
 public:
  Workspace workspace(const Group& g);

 private:
  size_t size_ = 0;
  std::unique_ptr<std::byte[]> memory_;
};

// A placement compiled for nothing but its optimum.
class Scorer {
 public:
  Scorer(const std::vector<int32_t>& phy2log, int n_logical, int n_ranks, int group_size);
  int n_groups() const { return groups_.size(); }

  // t* of one group for whole tokens [n_logical], in tokens per rank.
  double optimum(int group, const int64_t* loads, Scratch& scratch) const;

 private:
  GroupTables groups_;
  InstructionSet isa_;
};

// Loads in fixed point: times a power of two that puts their sum just below 2^50, so that whole tokens stay exact.
// Returns that power.
double to_fixed_point(const double* loads, int n, int64_t* out);

// out [batch, n_groups]: t* of every load [batch, n_logical], finite and not negative, on the placement
// phy2log [n_physical]. In the loads' unit per rank; exact for whole tokens but for the last bits.
void placement_optima(const int32_t* phy2log, int n_physical, int n_logical, int n_ranks, int group_size,
                      const double* loads, int64_t batch, double* out, int threads);

// What all layers of a placement for the LP have in common. Consecutive ranks in equal parts: no expert has copies in
// two. A part is a balance group, or a node where routing is limited to nodes.
struct Geometry {
  int n_logical, n_ranks, n_physical, n_parts;
  int ranks_per_node;
  bool even;  // batches may be split evenly instead: no hubs, and even splits count as much as the LP's
};

// phy2log [layers, n_physical] holds a placement for each layer, which says what experts are in what part; `also`
// another with the same parts. The better of the two is kept where nothing better is found for history [layers,
// batches, n_logical]. Where a part is made of several nodes, its ranks are put on nodes by from [layers, n_nodes,
// n_logical], the loads that each sends.
void place_for_lp(const Geometry& geometry, const double* history, int64_t layers, int64_t batches, const double* from,
                  const int32_t* also, int32_t* phy2log, int threads);

// The loads [kScenarios, n_logical] on which a layer's placements are compared, each adding up to 1.
void likely_loads(const double* history, int64_t batches, int n_logical, double* out);

}  // namespace lplb::cpu
