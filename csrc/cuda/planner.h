// The CUDA backend: which kernels, with which memory, for one placement. All memory is the caller's; a call launches
// and returns. The constructor makes no CUDA call, so sizes are known, and checked, on a machine without a GPU.
#pragma once

#include <string>
#include <vector>

#include "assign.h"
#include "count.h"
#include "solve.h"
#include "tables.h"

namespace lplb::cuda {

// A launch as it would be.
struct Launch {
  std::string kernel;
  int64_t blocks;
  int threads;
  int64_t shared;
};

struct Blocks {
  int count;
  int64_t length;  // tokens per block
};

// How tokens are cut for count and for what maps them.
Blocks token_blocks(int64_t n, int most, int warps);

inline constexpr size_t kStaticShared = 64;  // bytes that a kernel may have beside its dynamic shared memory

// Throws std::invalid_argument where `what` needs more shared memory than is allowed.
void check_fits(const std::string& what, size_t needed, int64_t allowed);

class Planner {
 public:
  // shared_bytes: what one block may have. sms: most blocks of count and assign. Throws std::invalid_argument for what
  // does not fit, naming both.
  Planner(const std::vector<int32_t>& phy2log, int n_logical, int n_ranks, int group_size,
          const std::vector<double>& speed, const std::string& algebra, int64_t shared_bytes, int sms);

  const std::vector<std::byte>& image() const { return tables_.image; }
  size_t scratch_bytes() const { return scratch_.bytes; }
  const char* algebra() const { return kernel_.algebra; }
  Blocks blocks(int64_t n, int n_sms) const;
  std::vector<Launch> launches(int64_t n, int n_sms, int64_t batch) const;

  // Device memory: image() copied, 16-byte aligned; scratch_bytes() of zeros; faults [4] on the host.
  void bind(const void* image, void* scratch, int64_t* faults);
  void count(const void* indices, int index_bytes, Cut cut, int blocks, int32_t* prefix, int32_t* row,
             cudaStream_t stream) const;
  // table.from.first null: loads [batch, n_logical] are given, and fewest is 0.
  void solve(int64_t* loads, int64_t batch, ExchangedTable table, int64_t fewest, Solver solver, const PlanArrays& out,
             IterationRow* log, cudaStream_t stream) const;
  void assign(const void* indices, int index_bytes, Cut cut, int blocks, const int32_t* prefix, ShareRule rule,
              void* physical, cudaStream_t stream) const;
  int32_t* prefix() const { return scratch<int32_t>(scratch_.prefix); }

 private:
  // Where things are in the scratch memory.
  struct Scratch {
    size_t arrived, halt, outside, prefix, warp_prefix, bytes;
  };
  template <class T>
  T* scratch(size_t offset) const {
    return reinterpret_cast<T*>(scratch_begin_ + offset);
  }
  void need_memory() const;

  int n_logical_, n_physical_, n_ranks_, group_size_, sms_, warps_;
  SolveKernel kernel_;
  Tables tables_;
  size_t solve_shared_;
  Scratch scratch_{};
  const std::byte* image_ = nullptr;
  std::byte* scratch_begin_ = nullptr;
  int64_t* faults_ = nullptr;
};

}  // namespace lplb::cuda
