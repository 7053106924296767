#include "eplb.h"

#include "../core/eplb_distinct.h"
#include "share_out.h"

namespace lplb::cpu {

namespace {

template <class Placer>
void place_all(const Placer& fresh, const eplb::Sizes& sizes, const Layers& layers, int threads) {
  share_out(layers.n, threads, [&] {
    return [&, placer = fresh](int64_t layer) mutable {
      const float* groups = layers.group_loads != nullptr ? layers.group_loads + layer * sizes.n_groups : nullptr;
      placer.place(layers.loads + layer * sizes.n_logical, groups,
                   {layers.phy2log + layer * sizes.n_slots, layers.copy + layer * sizes.n_slots,
                    layers.count + layer * sizes.n_logical});
    };
  });
}

}  // namespace

int64_t place_layers(const eplb::Sizes& sizes, const Layers& layers, eplb::Rule rule, int threads) {
  if (rule == eplb::Rule::kDistinct)
    place_all(eplb::Distinct(sizes), sizes, layers, threads);
  else
    place_all(eplb::Published(sizes, rule == eplb::Rule::kCapped), sizes, layers, threads);
  return *std::max_element(layers.count, layers.count + layers.n * sizes.n_logical);
}

void list_slots(const eplb::Sizes& sizes, const Layers& layers, int64_t most_copies, int64_t* log2phy, int threads) {
  const int64_t cells = sizes.n_logical * most_copies;
  share_out(layers.n, threads, [&] {
    return [&](int64_t layer) {
      int64_t* row = log2phy + layer * cells;
      std::fill(row, row + cells, int64_t{-1});
      const int64_t first = layer * sizes.n_slots;
      for (int s = 0; s < sizes.n_slots; ++s) row[layers.phy2log[first + s] * most_copies + layers.copy[first + s]] = s;
    };
  });
}

}  // namespace lplb::cpu
