// Teams of CUDA threads; fulfils the contract at the top of csrc/core/team.h.
#pragma once

#include "../core/reduce.h"

namespace lplb::cuda {

// What any team can do to memory that others see.
struct Memory {
  // Several may write; one of the values stays.
  template <class T>
  __device__ void note(T* p, long long value) const {
    *static_cast<volatile T*>(p) = static_cast<T>(value);
  }
  __device__ void add(unsigned int* p, unsigned int x) const { atomicAdd(p, x); }
  __device__ void add(unsigned long long* p, unsigned long long x) const { atomicAdd(p, x); }
  __device__ void add(int64_t* p, int64_t x) const {
    atomicAdd(reinterpret_cast<unsigned long long*>(p), static_cast<unsigned long long>(x));
  }
  // What another block of this launch wrote.
  template <class T>
  __device__ T fresh(const T* p) const {
    return __ldcg(p);
  }
};

// The threads of one warp, all of them.
class Warp : public Memory {
 public:
  static constexpr bool kSolo = false;

  __device__ int rank() const { return static_cast<int>(threadIdx.x) % kWarpSize; }
  static constexpr __host__ __device__ int size() { return kWarpSize; }
  static constexpr __host__ __device__ int n_warps() { return 1; }
  static constexpr __host__ __device__ int warp_index() { return 0; }
  __device__ bool any(bool bit) const {
    __syncwarp();
    return __any_sync(kAll, bit);
  }
  __device__ Warp& warp() { return *this; }
  __device__ void sync() const { __syncwarp(); }
  template <class F>
  __device__ void each(int n, F f) const {
    LPLB_LOOP
    for (int i = rank(); i < n; i += kWarpSize) f(i);
  }
  template <class... F>
  __device__ Values<sizeof...(F)> sums(int n, F... f) {
    return reduce::warp_sums(*this, n, f...);
  }
  template <class... F>
  __device__ Values<sizeof...(F)> maxima(int n, F... f) {
    return reduce::warp_maxima(*this, n, f...);
  }
  template <class... F>
  __device__ Values<sizeof...(F)> few_sums(int n, F... f) {
    return reduce::warp_sums(*this, n, f...);
  }
  template <class... F>
  __device__ Values<sizeof...(F)> few_maxima(int n, F... f) {
    return reduce::warp_maxima(*this, n, f...);
  }
  template <class F>
  __device__ void first_warp(F f) {
    f(*this);
    sync();
  }
  template <class T>
  __device__ T get(T value, int member) const {
    return __shfl_sync(kAll, value, member);
  }
  template <class T>
  __device__ T across(T value, int step) const {
    return __shfl_xor_sync(kAll, value, step);
  }
  __device__ uint32_t ballot(bool bit) const { return __ballot_sync(kAll, bit); }
  __device__ uint32_t match(uint32_t x) const { return __match_any_sync(kAll, x); }
  __device__ uint32_t largest(uint32_t x) const { return __reduce_max_sync(kAll, x); }
  __device__ uint64_t unite(uint64_t x) const {
    const uint64_t high = __reduce_or_sync(kAll, static_cast<uint32_t>(x >> 32));
    return high << 32 | __reduce_or_sync(kAll, static_cast<uint32_t>(x));
  }

 private:
  static constexpr uint32_t kAll = 0xFFFFFFFF;
};

inline constexpr int kAnySize = 0;

// The threads of one block, a multiple of 32: kThreads, or as many as were launched. `buffer` [reduce::kBufferSize] in
// shared memory, where the block takes sums or maxima.
template <int kThreads>
class Block : public Memory {
 public:
  static constexpr bool kSolo = false;

  explicit __device__ Block(double* buffer) : buffer_(buffer) {}
  __device__ int rank() const { return threadIdx.x; }
  __device__ int size() const { return kThreads != kAnySize ? kThreads : static_cast<int>(blockDim.x); }
  __device__ int n_warps() const { return size() / kWarpSize; }
  __device__ int warp_index() const { return static_cast<int>(threadIdx.x) / kWarpSize; }
  __device__ bool any(bool bit) const { return __syncthreads_or(bit) != 0; }
  __device__ Warp& warp() { return warp_; }
  __device__ void sync() const { __syncthreads(); }
  template <class F>
  __device__ void each(int n, F f) const {
    LPLB_LOOP
    for (int i = rank(); i < n; i += size()) f(i);
  }
  template <class... F>
  __device__ Values<sizeof...(F)> sums(int n, F... f) {
    return reduce::block_sums(*this, buffer_, round_, n, f...);
  }
  template <class... F>
  __device__ Values<sizeof...(F)> maxima(int n, F... f) {
    return reduce::block_maxima(*this, buffer_, round_, n, f...);
  }
  template <class... F>
  __device__ Values<sizeof...(F)> few_sums(int n, F... f) {
    return reduce::warp_sums(warp_, n, f...);
  }
  template <class... F>
  __device__ Values<sizeof...(F)> few_maxima(int n, F... f) {
    return reduce::warp_maxima(warp_, n, f...);
  }
  template <class F>
  __device__ void first_warp(F f) {
    if (warp_index() == 0) f(warp_);
    sync();
  }

 private:
  double* buffer_;
  int round_ = 0;
  Warp warp_;
};

}  // namespace lplb::cuda
