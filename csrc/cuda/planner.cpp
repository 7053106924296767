#include "planner.h"

#include <algorithm>
#include <stdexcept>

#include "check.h"

namespace lplb::cuda {

namespace {

constexpr int64_t kTokensPerBlock = 2048;  // below this, a further block costs more than it saves

SolveKernel kernel_for(const std::string& algebra, int n_ranks) {
#ifdef LPLB_HAVE_CUSOLVERDX
  if (algebra == "cusolverdx") return cusolverdx_kernel(n_ranks);
  constexpr const char* kAllowed = "builtin or cusolverdx";
#else
  constexpr const char* kAllowed = "builtin (this build is without MathDx)";
#endif
  if (algebra != "builtin")
    throw std::invalid_argument("the linear algebra is '" + algebra + "', allowed is " + kAllowed);
  return builtin_kernel(n_ranks);
}

}  // namespace

void check_fits(const std::string& what, size_t needed, int64_t allowed) {
  if (static_cast<int64_t>(needed) > allowed)
    throw std::invalid_argument(what + " needs " + std::to_string(needed) +
                                " bytes of shared memory, allowed on this device are " + std::to_string(allowed) +
                                " per block");
}

Blocks token_blocks(int64_t n, int most, int warps) {
  const int64_t wanted =
      std::clamp((n + kTokensPerBlock - 1) / kTokensPerBlock, int64_t{1}, int64_t{std::max(1, most)});
  const int64_t row = int64_t{kWarpSize} * warps;  // every warp has as many tokens, but for the last block
  const int64_t length = std::max(row, (n + wanted * row - 1) / (wanted * row) * row);
  return {static_cast<int>(std::max(int64_t{1}, (n + length - 1) / length)), length};
}

Planner::Planner(const std::vector<int32_t>& phy2log, int n_logical, int n_ranks, int group_size,
                 const std::vector<double>& speed, const std::string& algebra, int64_t shared_bytes, int sms)
    : n_logical_(n_logical),
      n_physical_(static_cast<int>(phy2log.size())),
      n_ranks_(n_ranks),
      group_size_(group_size),
      sms_(sms),
      warps_(kTokenWarps),
      kernel_(kernel_for(algebra, group_size)),
      tables_(make_tables(GroupTables(phy2log, n_logical, n_ranks, group_size, speed, kernel_.width), phy2log,
                          n_logical, n_ranks)),
      solve_shared_(solve_shared(tables_.groups, kernel_.threads)) {
  check_fits("a group of " + std::to_string(group_size) + " ranks and " +
                 std::to_string(n_physical_ / (n_ranks / group_size)) + " physical experts (" + kernel_.algebra + ")",
             kStaticShared + solve_shared_, shared_bytes);
  const auto token_bytes = [&](int warps) {
    return kStaticShared +
           std::max(count_shared(n_logical, warps), assign_shared(n_logical, tables_.slots.n_copies, warps));
  };
  while (warps_ > 1 && static_cast<int64_t>(token_bytes(warps_)) > shared_bytes) warps_ /= 2;
  check_fits("mapping tokens of " + std::to_string(n_logical) + " logical experts with " +
                 std::to_string(tables_.slots.n_copies) + " copies",
             token_bytes(warps_), shared_bytes);

  size_t used = 0;
  const auto take = [&](size_t words) {
    const size_t at = used;
    used += (words * sizeof(int32_t) + 255) / 256 * 256;
    return at;
  };
  const auto per_block = static_cast<size_t>(sms) * n_logical;
  scratch_.arrived = take(1);
  scratch_.halt = take(1);
  scratch_.outside = take(2);
  scratch_.prefix = take(per_block);
  scratch_.warp_prefix = take(per_block * warps_);
  scratch_.bytes = used;
}

Blocks Planner::blocks(int64_t n, int n_sms) const { return token_blocks(n, std::min(n_sms, sms_), warps_); }

std::vector<Launch> Planner::launches(int64_t n, int n_sms, int64_t batch) const {
  const int threads = warps_ * kWarpSize, blocks = this->blocks(n, n_sms).count;
  const auto bytes = [](size_t x) { return static_cast<int64_t>(x); };
  return {{"count", blocks, threads, bytes(count_shared(n_logical_, warps_))},
          {"solve", batch * static_cast<int64_t>(tables_.groups.size()), kernel_.threads, bytes(solve_shared_)},
          {"assign", blocks, threads, bytes(assign_shared(n_logical_, tables_.slots.n_copies, warps_))}};
}

void Planner::bind(const void* image, void* scratch, int64_t* faults) {
  allow_count_shared(count_shared(n_logical_, warps_));
  allow_assign_shared(assign_shared(n_logical_, tables_.slots.n_copies, warps_));
  allow_solve_shared(kernel_, solve_shared_);
  image_ = static_cast<const std::byte*>(image);
  scratch_begin_ = static_cast<std::byte*>(scratch);
  faults_ = faults;
}

void Planner::need_memory() const {
  if (image_ == nullptr) throw std::logic_error("bind() comes before a launch");
}

void Planner::count(const void* indices, int index_bytes, Cut cut, int blocks, int32_t* prefix, int32_t* row,
                    cudaStream_t stream) const {
  need_memory();
  const CountArguments a{indices,
                         cut,
                         n_logical_,
                         prefix,
                         row,
                         scratch<int32_t>(scratch_.warp_prefix),
                         scratch<unsigned int>(scratch_.arrived),
                         scratch<int32_t>(scratch_.halt),
                         scratch<unsigned long long>(scratch_.outside),
                         faults_};
  launch_count(a, index_bytes, blocks, warps_, stream);
}

void Planner::solve(int64_t* loads, int64_t batch, ExchangedTable table, int64_t fewest, Solver solver,
                    const PlanArrays& out, IterationRow* log, cudaStream_t stream) const {
  need_memory();
  table.halt = scratch<int32_t>(scratch_.halt);
  table.faults = faults_;
  const SolveArguments a{image_,
                         static_cast<int>(tables_.groups.size()),
                         n_logical_,
                         n_physical_,
                         n_ranks_,
                         solver,
                         fewest,
                         loads,
                         table,
                         out.quota,
                         out.rank_load,
                         out.max_load,
                         out.lower_bound,
                         out.gap,
                         out.iterations,
                         out.status,
                         log};
  launch_solve(kernel_, a, batch, solve_shared_, stream);
}

void Planner::assign(const void* indices, int index_bytes, Cut cut, int blocks, const int32_t* prefix, ShareRule rule,
                     void* physical, cudaStream_t stream) const {
  need_memory();
  rule.group_size = group_size_;
  const AssignArguments a{indices,
                          physical,
                          cut,
                          tables_.slots.at(image_, n_logical_),
                          rule,
                          prefix,
                          scratch<int32_t>(scratch_.warp_prefix),
                          scratch<int32_t>(scratch_.halt),
                          scratch<unsigned int>(scratch_.arrived)};
  launch_assign(a, index_bytes, blocks, warps_, stream);
}

}  // namespace lplb::cuda
