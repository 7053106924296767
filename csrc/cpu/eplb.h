// EPLB on the CPU: layers in turn, or shared out over threads.
#pragma once

#include <cstdint>

#include "../core/eplb.h"

namespace lplb::cpu {

// What is read and written for all layers; see core/eplb.h. log2phy's other dimension is known when all is placed.
struct Layers {
  int64_t n;
  const float *loads, *group_loads;  // [n, n_logical]; [n, n_groups], or null where no groups are packed
  int64_t* phy2log;                  // [n, n_slots]
  int32_t* copy;                     // [n, n_slots]
  int64_t* count;                    // [n, n_logical]
};

// Returns the largest number of copies of any expert.
int64_t place_layers(const eplb::Sizes& sizes, const Layers& layers, eplb::Rule rule, int threads);

// Writes log2phy [n, n_logical, most_copies]: the slots of each expert in the order of their copies, padded with -1.
void list_slots(const eplb::Sizes& sizes, const Layers& layers, int64_t most_copies, int64_t* log2phy, int threads);

}  // namespace lplb::cpu
