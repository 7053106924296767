// A placement as the kernels read it: one image of bytes, made on the host and copied to the device.
#pragma once

#include <cstdint>
#include <vector>

#include "../core/assign.h"
#include "../core/problem.h"

namespace lplb::cuda {

// Offsets from the image's begin, or, of what is staged, from the begin of the staged part.
struct DeviceGroup {
  int32_t n_ranks, n_padded, n_experts, n_replicas, n_singles, n_waves, first_rank, unit_speed;
  // every iteration reads these: a block copies them to shared memory, in words of 16 bytes
  uint32_t staged, staged_bytes;
  uint32_t expert_begin, replica_rank, replica_expert, rank_begin, rank_replica, wave_begin, wave_expert, speed,
      inv_speed;
  // flow and rounding read these, and copy them when the matrix is gone: expert_ranks, then rank_replica_ranks
  uint32_t sets;
  // these are read once or twice
  uint32_t expert_logical, replica_slot, single_begin, single_logical, single_slot;
};

using SharedGroup = BasicGroup<uint16_t, uint8_t>;

// The group as a kernel sees it: `image` in device memory, `staged` and `sets` where the block has copied them.
LPLB_HD inline SharedGroup group_at(const DeviceGroup& d, const std::byte* image, const std::byte* staged,
                                    const uint64_t* sets) {
  SharedGroup g;
  g.n_ranks = d.n_ranks;
  g.n_padded = d.n_padded;
  g.n_experts = d.n_experts;
  g.n_replicas = d.n_replicas;
  g.n_singles = d.n_singles;
  g.n_waves = d.n_waves;
  g.first_rank = d.first_rank;
  g.unit_speed = d.unit_speed != 0;
  g.expert_begin = reinterpret_cast<const uint16_t*>(staged + d.expert_begin);
  g.replica_rank = reinterpret_cast<const uint8_t*>(staged + d.replica_rank);
  g.replica_expert = reinterpret_cast<const uint16_t*>(staged + d.replica_expert);
  g.rank_begin = reinterpret_cast<const uint16_t*>(staged + d.rank_begin);
  g.rank_replica = reinterpret_cast<const uint16_t*>(staged + d.rank_replica);
  g.wave_begin = reinterpret_cast<const uint16_t*>(staged + d.wave_begin);
  g.wave_expert = reinterpret_cast<const uint16_t*>(staged + d.wave_expert);
  g.speed = reinterpret_cast<const double*>(staged + d.speed);
  g.inv_speed = reinterpret_cast<const double*>(staged + d.inv_speed);
  g.expert_ranks = sets;
  g.rank_replica_ranks = sets + set_words(d.n_ranks) * d.n_experts;
  g.expert_logical = reinterpret_cast<const int32_t*>(image + d.expert_logical);
  g.replica_slot = reinterpret_cast<const int32_t*>(image + d.replica_slot);
  g.single_begin = reinterpret_cast<const int32_t*>(image + d.single_begin);
  g.single_logical = reinterpret_cast<const int32_t*>(image + d.single_logical);
  g.single_slot = reinterpret_cast<const int32_t*>(image + d.single_slot);
  return g;
}

LPLB_HD inline int n_set_words(const DeviceGroup& d) { return set_words(d.n_ranks) * (d.n_experts + d.n_replicas); }

// Where the image has the Slots of assign.h.
struct SlotTables {
  int n_copies, slots_per_rank;
  size_t to, copy_slot, copy_end, copy_expert;

  Slots at(const std::byte* image, int n_logical) const {
    const auto words = [&](size_t offset) { return reinterpret_cast<const int32_t*>(image + offset); };
    return {n_logical, n_copies, slots_per_rank, words(to), words(copy_slot), words(copy_end), words(copy_expert)};
  }
};

struct Tables {
  std::vector<std::byte> image;     // begins with a DeviceGroup per group
  std::vector<DeviceGroup> groups;  // the same
  SlotTables slots;
};

// Throws std::invalid_argument for a group of more replicas than 16 bits count.
Tables make_tables(const GroupTables& groups, const std::vector<int32_t>& phy2log, int n_logical, int n_ranks);

}  // namespace lplb::cuda
