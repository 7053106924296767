#include "placing.h"

#include <cmath>

namespace lplb::cpu {

namespace {

constexpr int kAlign = 64;
constexpr int kFixedPointBits = 50;  // of a sum of loads: whole numbers that doubles and their sums hold exactly

}  // namespace

Scorer::Scorer(const std::vector<int32_t>& phy2log, int n_logical, int n_ranks, int group_size)
    // The flow solver wants no matrix: no width.
    : groups_(phy2log, n_logical, n_ranks, group_size, std::vector<double>(n_ranks, 1.0), group_size),
      isa_(best_instruction_set()),
      workspaces_(groups_.size()) {
  size_t bytes = 0;
  for (int g = 0; g < groups_.size(); ++g) bytes = std::max(bytes, solve_bytes(groups_[g]));
  memory_.reset(new std::byte[bytes + kAlign]);
  std::byte* base = memory_.get() + (kAlign - reinterpret_cast<uintptr_t>(memory_.get()) % kAlign) % kAlign;
  for (int g = 0; g < groups_.size(); ++g) carve(groups_[g], base, workspaces_[g]);
}

void Scorer::optima(const int64_t* loads, double* out) const {
  for (int g = 0; g < groups_.size(); ++g) out[g] = isa_.find_optimum(groups_[g], workspaces_[g], loads);
}

double to_fixed_point(const double* loads, int n, int64_t* out) {
  double sum = 0.0;
  for (int e = 0; e < n; ++e) sum += loads[e];
  if (!(sum > 0.0)) {
    for (int e = 0; e < n; ++e) out[e] = 0;
    return 1.0;
  }
  int exponent;  // sum < 2^exponent
  std::frexp(sum, &exponent);
  const double scale = std::ldexp(1.0, kFixedPointBits - exponent);
  for (int e = 0; e < n; ++e) out[e] = std::llrint(loads[e] * scale);
  return scale;
}

void placement_optima(const int32_t* phy2log, int n_physical, int n_logical, int n_ranks, int group_size,
                      const double* loads, int64_t batch, double* out, int threads) {
  const std::vector<int32_t> experts(phy2log, phy2log + n_physical);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const Scorer scorer(experts, n_logical, n_ranks, group_size);
    std::vector<int64_t> fixed(n_logical);
#pragma omp for schedule(static)
    for (int64_t b = 0; b < batch; ++b) {
      double* t = out + b * scorer.n_groups();
      const double scale = to_fixed_point(loads + b * n_logical, n_logical, fixed.data());
      scorer.optima(fixed.data(), t);
      for (int g = 0; g < scorer.n_groups(); ++g) t[g] /= scale;
    }
  }
}

}  // namespace lplb::cpu
