#include "tables.h"

#include <cstring>
#include <limits>
#include <stdexcept>

#include "image.h"

namespace lplb::cuda {

namespace {

DeviceGroup add_group(Image& image, const Group& g) {
  constexpr int kMost = std::numeric_limits<uint16_t>::max();
  if (g.n_replicas > kMost)
    throw std::invalid_argument("a group of " + std::to_string(g.n_ranks) + " ranks has " +
                                std::to_string(g.n_replicas) + " replicas, allowed on CUDA are " +
                                std::to_string(kMost));
  DeviceGroup d{};
  d.n_ranks = g.n_ranks;
  d.n_padded = g.n_padded;
  d.n_experts = g.n_experts;
  d.n_replicas = g.n_replicas;
  d.n_singles = g.n_singles;
  d.n_waves = g.n_waves;
  d.first_rank = g.first_rank;
  d.unit_speed = g.unit_speed;
  d.staged = static_cast<uint32_t>(image.size());
  const auto staged = [&](size_t at) { return static_cast<uint32_t>(at - d.staged); };
  d.speed = staged(image.add<double>(g.speed, g.n_ranks));
  d.inv_speed = staged(image.add<double>(g.inv_speed, g.n_ranks));
  d.expert_begin = staged(image.add<uint16_t>(g.expert_begin, g.n_experts + 1));
  d.rank_begin = staged(image.add<uint16_t>(g.rank_begin, g.n_ranks + 1));
  d.replica_expert = staged(image.add<uint16_t>(g.replica_expert, g.n_replicas));
  d.rank_replica = staged(image.add<uint16_t>(g.rank_replica, g.n_replicas));
  d.wave_begin = staged(image.add<uint16_t>(g.wave_begin, g.n_waves + 1));
  d.wave_expert = staged(image.add<uint16_t>(g.wave_expert, g.n_experts));
  d.replica_rank = staged(image.add<uint8_t>(g.replica_rank, g.n_replicas));
  d.staged_bytes = static_cast<uint32_t>(image.size()) - d.staged;

  const int words = set_words(g.n_ranks);
  std::vector<uint64_t> sets(g.expert_ranks, g.expert_ranks + words * g.n_experts);
  sets.insert(sets.end(), g.rank_replica_ranks, g.rank_replica_ranks + words * g.n_replicas);
  d.sets = static_cast<uint32_t>(image.add<uint64_t>(sets.data(), sets.size()));
  const auto whole = [&](const int32_t* values, size_t n) {
    return static_cast<uint32_t>(image.add<int32_t>(values, n));
  };
  d.expert_logical = whole(g.expert_logical, g.n_experts);
  d.replica_slot = whole(g.replica_slot, g.n_replicas);
  d.single_begin = whole(g.single_begin, g.n_ranks + 1);
  d.single_logical = whole(g.single_logical, g.n_singles);
  d.single_slot = whole(g.single_slot, g.n_singles);
  return d;
}

}  // namespace

Tables make_tables(const GroupTables& groups, const std::vector<int32_t>& phy2log, int n_logical, int n_ranks) {
  Tables t;
  Image image(t.image);
  image.room(groups.size() * sizeof(DeviceGroup));
  for (int g = 0; g < groups.size(); ++g) t.groups.push_back(add_group(image, groups[g]));
  std::memcpy(t.image.data(), t.groups.data(), t.groups.size() * sizeof(DeviceGroup));

  std::vector<std::vector<int32_t>> slots_of(n_logical);
  for (size_t p = 0; p < phy2log.size(); ++p) slots_of[phy2log[p]].push_back(static_cast<int32_t>(p));
  std::vector<int32_t> to, copy_slot, copy_end, copy_expert;
  for (int e = 0; e < n_logical; ++e) {
    const std::vector<int32_t>& slots = slots_of[e];
    if (slots.size() == 1) {
      to.push_back(slots[0]);
      continue;
    }
    to.push_back(Slots::first_copy(static_cast<int32_t>(copy_slot.size())));
    copy_slot.insert(copy_slot.end(), slots.begin(), slots.end());
    copy_end.resize(copy_slot.size(), static_cast<int32_t>(copy_slot.size()));
    copy_expert.resize(copy_slot.size(), e);
  }
  t.slots.n_copies = static_cast<int>(copy_slot.size());
  t.slots.slots_per_rank = static_cast<int>(phy2log.size()) / n_ranks;
  t.slots.to = image.add<int32_t>(to.data(), to.size());
  t.slots.copy_slot = image.add<int32_t>(copy_slot.data(), copy_slot.size());
  t.slots.copy_end = image.add<int32_t>(copy_end.data(), copy_end.size());
  t.slots.copy_expert = image.add<int32_t>(copy_expert.data(), copy_expert.size());
  return t;
}

}  // namespace lplb::cuda
