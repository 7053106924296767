// The fixed tree of sums (team.h) on warps and blocks.
#pragma once

#include "team.h"

namespace lplb {
inline namespace LPLB_ISA {
namespace reduce {

inline constexpr int kPerLane = kSumLanes / kWarpSize;  // lanes of the tree per member of a warp
inline constexpr int kMostValues = 2;                   // functions per call

// Of a block: two rounds, so that one barrier per call is enough.
inline constexpr int kBufferSize = 2 * kMostValues * kSumLanes;

// The lanes l, l + 32, l + 64 and l + 96 of the tree, folded.
template <class F>
LPLB_HD inline double lane_sum(int lane, int n, F f) {
  double part[kPerLane] = {0.0, 0.0, 0.0, 0.0};
  LPLB_LOOP
  for (int first = lane; first < n; first += kSumLanes) {
    LPLB_UNROLL
    for (int k = 0; k < kPerLane; ++k)
      if (first + kWarpSize * k < n) part[k] += f(first + kWarpSize * k);
  }
  return (part[0] + part[2]) + (part[1] + part[3]);
}

template <class F>
LPLB_HD inline double strided_max(int first, int step, int n, F f) {
  double most = 0.0;
  LPLB_LOOP
  for (int i = first; i < n; i += step) {
    const double x = f(i);
    most = x > most ? x : most;
  }
  return most;
}

template <int kCount, class Warp>
LPLB_HD inline Values<kCount> fold_sums(Warp& warp, Values<kCount> x) {
  LPLB_UNROLL
  for (int step = kWarpSize / 2; step > 0; step /= 2) {
    LPLB_UNROLL
    for (int k = 0; k < kCount; ++k) x.v[k] += warp.across(x.v[k], step);
  }
  return x;
}

template <int kCount, class Warp>
LPLB_HD inline Values<kCount> fold_maxima(Warp& warp, Values<kCount> x) {
  LPLB_UNROLL
  for (int step = kWarpSize / 2; step > 0; step /= 2) {
    LPLB_UNROLL
    for (int k = 0; k < kCount; ++k) {
      const double other = warp.across(x.v[k], step);
      x.v[k] = other > x.v[k] ? other : x.v[k];
    }
  }
  return x;
}

template <class Warp, class... F>
LPLB_HD inline Values<sizeof...(F)> warp_sums(Warp& warp, int n, F... f) {
  return fold_sums<sizeof...(F)>(warp, {{lane_sum(warp.rank(), n, f)...}});
}

template <class Warp, class... F>
LPLB_HD inline Values<sizeof...(F)> warp_maxima(Warp& warp, int n, F... f) {
  return fold_maxima<sizeof...(F)>(warp, {{strided_max(warp.rank(), kWarpSize, n, f)...}});
}

// Every member computes its own terms, once. `buffer` [kBufferSize] is the block's; `round` is 0 and 1 in turn.
template <class Block, class... F>
LPLB_HD inline Values<sizeof...(F)> block_sums(Block& block, double* buffer, int& round, int n, F... f) {
  constexpr int kCount = sizeof...(F);
  static_assert(kCount <= kMostValues);
  auto& warp = block.warp();
  double* shared = buffer + round * kMostValues * kSumLanes;
  round = 1 - round;
  LPLB_LOOP
  for (int lane = block.rank(); lane < kSumLanes; lane += block.size()) {
    Values<kCount> own{};
    LPLB_LOOP
    for (int i = lane; i < n; i += kSumLanes) {
      const double term[kCount] = {f(i)...};
      LPLB_UNROLL
      for (int k = 0; k < kCount; ++k) own.v[k] += term[k];
    }
    LPLB_UNROLL
    for (int k = 0; k < kCount; ++k) shared[k * kSumLanes + lane] = own.v[k];
  }
  block.sync();
  Values<kCount> x{};
  LPLB_UNROLL
  for (int k = 0; k < kCount; ++k) {
    const double* lanes = shared + k * kSumLanes + warp.rank();
    x.v[k] = (lanes[0] + lanes[2 * kWarpSize]) + (lanes[kWarpSize] + lanes[3 * kWarpSize]);
  }
  return fold_sums<kCount>(warp, x);
}

template <class Block, class... F>
LPLB_HD inline Values<sizeof...(F)> block_maxima(Block& block, double* buffer, int& round, int n, F... f) {
  constexpr int kCount = sizeof...(F);
  static_assert(kCount <= kMostValues);
  auto& warp = block.warp();
  double* shared = buffer + round * kMostValues * kSumLanes;
  round = 1 - round;
  Values<kCount> x = fold_maxima<kCount>(warp, {{strided_max(block.rank(), block.size(), n, f)...}});
  if (warp.rank() == 0) {
    LPLB_UNROLL
    for (int k = 0; k < kCount; ++k) shared[k * kSumLanes + block.warp_index()] = x.v[k];
  }
  block.sync();
  LPLB_UNROLL
  for (int k = 0; k < kCount; ++k)
    for (int w = 0; w < block.n_warps(); ++w) {
      const double other = shared[k * kSumLanes + w];
      x.v[k] = other > x.v[k] ? other : x.v[k];
    }
  return x;
}

}  // namespace reduce
}  // namespace LPLB_ISA
}  // namespace lplb
