#include "eplb.h"

#include "../core/eplb_distinct.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace lplb::cpu {

namespace {

template <class Placer>
void place_all(const eplb::Sizes& sizes, const Layers& layers, int threads) {
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    Placer placer(sizes);
#pragma omp for schedule(static)
    for (int64_t layer = 0; layer < layers.n; ++layer) {
      const float* groups = layers.group_loads != nullptr ? layers.group_loads + layer * sizes.n_groups : nullptr;
      placer.place(layers.loads + layer * sizes.n_logical, groups,
                   {layers.phy2log + layer * sizes.n_slots, layers.copy + layer * sizes.n_slots,
                    layers.count + layer * sizes.n_logical});
    }
  }
}

}  // namespace

int64_t place_layers(const eplb::Sizes& sizes, const Layers& layers, bool distinct, int threads) {
  if (distinct)
    place_all<eplb::Distinct>(sizes, layers, threads);
  else
    place_all<eplb::Published>(sizes, layers, threads);
  return *std::max_element(layers.count, layers.count + layers.n * sizes.n_logical);
}

void list_slots(const eplb::Sizes& sizes, const Layers& layers, int64_t most_copies, int64_t* log2phy, int threads) {
  const int64_t cells = sizes.n_logical * most_copies;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (int64_t layer = 0; layer < layers.n; ++layer) {
    int64_t* row = log2phy + layer * cells;
    std::fill(row, row + cells, int64_t{-1});
    const int64_t first = layer * sizes.n_slots;
    for (int s = 0; s < sizes.n_slots; ++s) row[layers.phy2log[first + s] * most_copies + layers.copy[first + s]] = s;
  }
}

}  // namespace lplb::cpu
