#include "transfers.h"

namespace lplb::cpu {

namespace {

// Adds up the rows. Whether none of the counts is negative and the total is small enough; total is then right.
template <class Count>
bool add_rows(const TransferCounts& counts, std::vector<int64_t>& tokens, int64_t& total) {
  const int n = static_cast<int>(tokens.size());
  const auto* first = static_cast<const Count*>(counts.first);
  Count signs = 0;
  bool small = true;
  std::fill(tokens.begin(), tokens.end(), 0);
  for (int r = 0; r < counts.n_rows; ++r) {
    const Count* row = first + r * counts.stride;
    Count any = 0;
    for (int e = 0; e < n; ++e) {
      any |= row[e];
      tokens[e] += static_cast<int64_t>(row[e]);
    }
    signs |= any;
    if (static_cast<int64_t>(any) >= kMostTransferTokens) small = false;  // no sum of fewer than 2^11 rows overflows
  }
  total = 0;
  for (int e = 0; e < n && small; ++e) {
    total += tokens[e];
    small = tokens[e] < kMostTransferTokens && total < kMostTransferTokens;
  }
  return signs >= 0 && small;
}

// 1 + the place of the first negative count; 0 where there is none.
template <class Count>
int64_t first_negative(const TransferCounts& counts, int n) {
  const auto* first = static_cast<const Count*>(counts.first);
  for (int r = 0; r < counts.n_rows; ++r)
    for (int e = 0; e < n; ++e)
      if (first[r * counts.stride + e] < 0) return int64_t{r} * n + e + 1;
  return 0;
}

// f with a set of ranks as wide as the problem's.
template <class F>
auto with_width(const TransferProblem& p, F f) {
  return set_words(p.n_ranks) == 1 ? f(std::integral_constant<int, 1>{}) : f(std::integral_constant<int, 2>{});
}

}  // namespace

Transfers::Transfers(const std::vector<int32_t>& rank, const std::vector<int32_t>& expert, int n_experts, int n_ranks,
                     int n_slots, int domain)
    : tables_(rank, expert, n_experts, n_ranks, n_slots, domain), tokens_(n_experts) {}

int64_t Transfers::sum(const TransferCounts& counts) {
  const bool good =
      counts.bytes == 8 ? add_rows<int64_t>(counts, tokens_, total_) : add_rows<int32_t>(counts, tokens_, total_);
  if (good) return kPlanned;
  const int n = static_cast<int>(tokens_.size());
  const int64_t at = counts.bytes == 8 ? first_negative<int64_t>(counts, n) : first_negative<int32_t>(counts, n);
  return at > 0 ? at : kTooManyTokens;
}

const JointSpace& Transfers::space(bool with_held) {
  std::unique_ptr<std::byte[]>& memory = with_held ? memory_with_held_ : memory_;
  JointSpace& x = with_held ? space_with_held_ : space_;
  if (memory == nullptr) {
    memory.reset(new std::byte[carve_joint(problem(), with_held, nullptr, x) + 16]);
    carve_joint(problem(), with_held, memory.get() + (16 - reinterpret_cast<uintptr_t>(memory.get()) % 16) % 16, x);
  }
  return x;
}

int64_t Transfers::joint(const TransferCounts& counts, const JointRules& rules, const int32_t* held,
                         const TransferArrays& out) {
  const int64_t refused = sum(counts);
  if (refused != kPlanned) return refused;
  with_width(problem(), [&](auto words) {
    Solo warp;
    const TransferBatch batch{tokens_.data(), held};
    Joint<words(), Solo> joint(warp, problem(), rules, batch, space(held != nullptr));
    joint.plan();
    joint.write(total_, out);
  });
  return kPlanned;
}

int64_t Transfers::llep(const TransferCounts& counts, const LlepRules& rules, const TransferArrays& out) {
  const int64_t refused = sum(counts);
  if (refused != kPlanned) return refused;
  with_width(problem(), [&](auto words) {
    Solo warp;
    llep_plan<words()>(warp, problem(), rules, tokens_.data(), space(false), out);
  });
  return kPlanned;
}

int64_t Transfers::front(const TransferCounts& counts, const JointRules& rules, const int32_t* held, int64_t* max_load,
                         int32_t* transfers, int capacity, int* n_points) {
  const int64_t refused = sum(counts);
  if (refused != kPlanned) return refused;
  *n_points = with_width(problem(), [&](auto words) {
    Solo warp;
    const TransferBatch batch{tokens_.data(), held};
    Joint<words(), Solo> joint(warp, problem(), rules, batch, space(held != nullptr));
    return joint.front(capacity, [&](int k, int64_t load, int n) {
      max_load[k] = load;
      transfers[k] = n;
    });
  });
  return kPlanned;
}

}  // namespace lplb::cpu
