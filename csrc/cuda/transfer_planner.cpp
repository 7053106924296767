#include "transfer_planner.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "check.h"

namespace lplb::cuda {

namespace {

TransferImage image_of(const std::vector<int32_t>& resident_rank, const std::vector<int32_t>& resident_expert,
                       int n_logical, int n_ranks, int slots, int domain) {
  const TransferTables tables(resident_rank, resident_expert, n_logical, n_ranks, slots, domain);
  const cpu::RangeMap map(resident_rank, resident_expert, n_logical, n_ranks, slots);
  return make_transfer_image(tables.problem(), map.tables());
}

size_t joint_bytes(const TransferOffsets& offsets, bool with_held) {
  JointSpace x{};
  return carve_joint(offsets.problem(nullptr), with_held, nullptr, x);
}

}  // namespace

TransferPlanner::TransferPlanner(const std::vector<int32_t>& resident_rank, const std::vector<int32_t>& resident_expert,
                                 int n_logical, int n_ranks, int slots, int domain, int64_t shared_bytes, int sms)
    : n_ranks_(n_ranks),
      sms_(sms),
      warps_(kTokenWarps),
      image_(image_of(resident_rank, resident_expert, n_logical, n_ranks, slots, domain)),
      joint_(space_for(joint_bytes(image_.offsets, false), shared_bytes)),
      joint_held_(space_for(joint_bytes(image_.offsets, true), shared_bytes)) {
  const auto token_bytes = [&](int warps) {
    return kStaticShared + std::max(count_shared(n_logical, warps), route_shared(n_logical, warps));
  };
  while (warps_ > 1 && static_cast<int64_t>(token_bytes(warps_)) > shared_bytes) warps_ /= 2;
  check_fits("mapping tokens of " + std::to_string(n_logical) + " logical experts", token_bytes(warps_), shared_bytes);

  size_t used = 0;
  const auto take = [&](size_t bytes) {
    const size_t at = used;
    used += (bytes + 255) / 256 * 256;
    return at;
  };
  const auto per_block = sizeof(int32_t) * sms * n_logical;
  const auto pairs = sizeof(int32_t) * n_logical * n_ranks;
  scratch_.arrived = take(sizeof(int32_t));
  scratch_.halt = take(sizeof(int32_t));
  scratch_.outside = take(sizeof(int64_t));
  scratch_.prefix = take(per_block);
  scratch_.warp_prefix = take(per_block * warps_);
  scratch_.row = take(sizeof(int32_t) * n_logical);
  scratch_.range_n = take(sizeof(int32_t) * n_logical);
  scratch_.range_end = take(pairs);
  scratch_.range_slot = take(pairs);
  const bool on_device = joint_.on_device || joint_held_.on_device;
  scratch_.space = take(on_device ? joint_bytes(image_.offsets, true) : 0);
  scratch_.bytes = used;
}

TransferPlanner::Space TransferPlanner::space_for(size_t bytes, int64_t shared_bytes) const {
  const TransferOffsets& o = image_.offsets;
  const Space best_first[] = {{transfer_shared(o, true, bytes), true, false},
                              {transfer_shared(o, true, 0), true, true},
                              {transfer_shared(o, false, bytes), false, false},
                              {transfer_shared(o, false, 0), false, true}};
  for (const Space& space : best_first)
    if (static_cast<int64_t>(kStaticShared + space.shared) <= shared_bytes) return space;
  check_fits("planning transfers of " + std::to_string(o.n_experts) + " logical experts on " +
                 std::to_string(o.n_ranks) + " ranks",
             kStaticShared + best_first[3].shared, shared_bytes);
  return best_first[3];
}

Blocks TransferPlanner::blocks(int64_t n, int n_sms) const { return token_blocks(n, std::min(n_sms, sms_), warps_); }

std::vector<Launch> TransferPlanner::launches(int64_t n, int n_sms) const {
  const int threads = warps_ * kWarpSize, blocks = this->blocks(n, n_sms).count, n_logical = image_.offsets.n_experts;
  const auto bytes = [](size_t x) { return static_cast<int64_t>(x); };
  return {{"joint or llep", 1, kTransferThreads, bytes(joint_.shared)},
          {"joint, held", 1, kTransferThreads, bytes(joint_held_.shared)},
          {"count", blocks, threads, bytes(count_shared(n_logical, warps_))},
          {"ranges", range_blocks(n_logical), kExpertsPerBlock, 0},
          {"route", blocks, threads, bytes(route_shared(n_logical, warps_))}};
}

void TransferPlanner::bind(const void* image, void* scratch, int64_t* faults) {
  const int n_logical = image_.offsets.n_experts;
  allow_count_shared(count_shared(n_logical, warps_));
  allow_route_shared(route_shared(n_logical, warps_));
  allow_transfer_shared(n_ranks_, std::max(joint_.shared, joint_held_.shared));
  image_begin_ = static_cast<const std::byte*>(image);
  scratch_begin_ = static_cast<std::byte*>(scratch);
  faults_ = faults;
}

void TransferPlanner::need_memory() const {
  if (image_begin_ == nullptr) throw std::logic_error("bind() comes before a launch");
}

TransferArguments TransferPlanner::arguments(const CountTable& counts, const int32_t* held, const TransferArrays& out,
                                             const Space& space) const {
  need_memory();
  std::byte* device = space.on_device ? scratch<std::byte>(scratch_.space) : nullptr;
  return {image_begin_, image_.offsets, counts, held, out, device, space.staged, faults_};
}

void TransferPlanner::joint(const CountTable& counts, const JointRules& rules, const int32_t* held,
                            const TransferArrays& out, cudaStream_t stream) const {
  const Space& space = held != nullptr ? joint_held_ : joint_;
  const JointArguments a{arguments(counts, held, out, space), rules};
  launch_joint(a, space.shared, stream);
}

void TransferPlanner::llep(const CountTable& counts, const LlepRules& rules, const TransferArrays& out,
                           cudaStream_t stream) const {
  const LlepArguments a{arguments(counts, nullptr, out, joint_), rules};
  launch_llep(a, joint_.shared, stream);
}

void TransferPlanner::route(const ServingPlan& plan, const CountTable& counts, int source, const void* indices,
                            int index_bytes, int64_t n, int n_sms, void* slots, int64_t* send,
                            cudaStream_t stream) const {
  need_memory();
  const int n_logical = image_.offsets.n_experts;
  const Blocks cut = blocks(n, n_sms);
  auto* prefix = scratch<int32_t>(scratch_.prefix);
  auto* warp_prefix = scratch<int32_t>(scratch_.warp_prefix);
  auto* row = scratch<int32_t>(scratch_.row);
  const RangeTables tables = image_.offsets.ranges(image_begin_);
  const Ranges ranges{scratch<int32_t>(scratch_.range_n), scratch<int32_t>(scratch_.range_end),
                      scratch<int32_t>(scratch_.range_slot)};
  LPLB_CUDA_CHECK(cudaMemsetAsync(send, 0, sizeof(int64_t) * n_ranks_ * width(), stream));
  launch_count({indices,
                {n, cut.length},
                n_logical,
                prefix,
                row,
                warp_prefix,
                scratch<unsigned int>(scratch_.arrived),
                scratch<int32_t>(scratch_.halt),
                scratch<unsigned long long>(scratch_.outside),
                faults_},
               index_bytes, cut.count, warps_, stream);
  launch_find_ranges(
      {tables, plan, counts, source, row, ranges, send, faults_, scratch<unsigned int>(scratch_.arrived)}, stream);
  launch_route({indices, slots, {n, cut.length}, tables, ranges, prefix, warp_prefix}, index_bytes, cut.count, warps_,
               stream);
}

}  // namespace lplb::cuda
