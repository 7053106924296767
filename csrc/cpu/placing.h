// Placements, scored and made on the CPU. Pointers and sizes only; the caller has checked all arguments.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "solve.h"

namespace lplb::cpu {

// A placement compiled for one thread that asks for nothing but the optimum.
class Scorer {
 public:
  Scorer(const std::vector<int32_t>& phy2log, int n_logical, int n_ranks, int group_size);
  int n_groups() const { return groups_.size(); }

  // out [n_groups]: t* of whole tokens [n_logical]. In tokens per rank.
  void optima(const int64_t* loads, double* out) const;

 private:
  GroupTables groups_;
  InstructionSet isa_;
  std::unique_ptr<std::byte[]> memory_;
  std::vector<Workspace> workspaces_;
};

// Loads in fixed point: times a power of two that puts their sum just below 2^50, so that whole tokens stay exact.
// Returns that power.
double to_fixed_point(const double* loads, int n, int64_t* out);

// out [batch, n_groups]: t* of every load [batch, n_logical], finite and not negative, on the placement
// phy2log [n_physical]. In the loads' unit per rank; relative error below 1e-9, and none but the last bits' for whole
// tokens.
void placement_optima(const int32_t* phy2log, int n_physical, int n_logical, int n_ranks, int group_size,
                      const double* loads, int64_t batch, double* out, int threads);

}  // namespace lplb::cpu
