#include "bottleneck.h"

#include "../core/bottleneck.h"

namespace lplb::cpu {

namespace {

template <int kWords>
void find(const Group& g, const Workspace& x, const int64_t* loads, std::vector<bool>& found) {
  Solo team;
  const RankSet<kWords> set = lplb::bottleneck_ranks<kWords>(team, g, x, loads);
  for (int r = 0; r < g.n_ranks; ++r) found[g.first_rank + r] = set.has(r);
}

}  // namespace

std::vector<bool> bottleneck_ranks(const std::vector<int32_t>& phy2log, int n_logical, int n_ranks, int group_size,
                                   const int64_t* loads) {
  const GroupTables groups(phy2log, n_logical, n_ranks, group_size, std::vector<double>(n_ranks, 1.0), group_size);
  std::vector<bool> found(n_ranks);
  for (int i = 0; i < groups.size(); ++i) {
    const Group& g = groups[i];
    std::vector<std::byte> memory(solve_bytes(g) + 64);
    std::byte* base = memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64) % 64;
    Workspace x{};
    carve(g, base, x);
    if (set_words(g.n_ranks) == 1)
      find<1>(g, x, loads, found);
    else
      find<2>(g, x, loads, found);
  }
  return found;
}

}  // namespace lplb::cpu
