// Which ranks set the optimum, on the CPU.
#pragma once

#include <cstdint>
#include <vector>

namespace lplb::cpu {

// loads [n_logical] whole tokens, below 2^52 in all. Returns for every rank whether it is in its group's largest
// such set; see core/bottleneck.h. The caller has checked the placement.
std::vector<bool> bottleneck_ranks(const std::vector<int32_t>& phy2log, int n_logical, int n_ranks, int group_size,
                                   const int64_t* loads);

}  // namespace lplb::cpu
