// Plans with transfers, and tokens by range, on CUDA: which kernels, with which memory, for one placement. As
// planner.h: all memory is the caller's, a call launches and returns, and the constructor makes no CUDA call.
#pragma once

#include <vector>

#include "../cpu/ranges.h"
#include "planner.h"
#include "ranges.h"
#include "transfers.h"

namespace lplb::cuda {

class TransferPlanner {
 public:
  // Residents in rank order, then slot order; shared_bytes and sms as for Planner.
  TransferPlanner(const std::vector<int32_t>& resident_rank, const std::vector<int32_t>& resident_expert, int n_logical,
                  int n_ranks, int slots, int domain, int64_t shared_bytes, int sms);

  const std::vector<std::byte>& image() const { return image_.bytes; }
  size_t scratch_bytes() const { return scratch_.bytes; }
  int n_rows() const { return image_.offsets.n_rows; }
  int width() const { return image_.offsets.most_residents + image_.offsets.n_slots; }
  // n: tokens of route.
  std::vector<Launch> launches(int64_t n, int n_sms) const;

  // Device memory: image() copied, 16-byte aligned; scratch_bytes() of zeros; faults [4] on the host.
  void bind(const void* image, void* scratch, int64_t* faults);
  // held [n_ranks, slots], or null.
  void joint(const CountTable& counts, const JointRules& rules, const int32_t* held, const TransferArrays& out,
             cudaStream_t stream) const;
  void llep(const CountTable& counts, const LlepRules& rules, const TransferArrays& out, cudaStream_t stream) const;
  void route(const ServingPlan& plan, const CountTable& counts, int source, const void* indices, int index_bytes,
             int64_t n, int n_sms, void* slots, int64_t* send, cudaStream_t stream) const;

 private:
  struct Scratch {
    size_t arrived, halt, outside, prefix, warp_prefix, row, range_n, range_end, range_slot, space, bytes;
  };
  // What is in the block's shared memory, as far as that goes: tables, and the plan's own space.
  struct Space {
    size_t shared;  // of the block
    bool staged, on_device;
  };
  Space space_for(size_t bytes, int64_t shared_bytes) const;
  TransferArguments arguments(const CountTable& counts, const int32_t* held, const TransferArrays& out,
                              const Space& space) const;
  Blocks blocks(int64_t n, int n_sms) const;
  template <class T>
  T* scratch(size_t at) const {
    return reinterpret_cast<T*>(scratch_begin_ + at);
  }
  void need_memory() const;

  int n_ranks_, sms_, warps_;
  TransferImage image_;
  Space joint_, joint_held_;  // without and with guests from before
  Scratch scratch_{};
  const std::byte* image_begin_ = nullptr;
  std::byte* scratch_begin_ = nullptr;
  int64_t* faults_ = nullptr;
};

}  // namespace lplb::cuda
