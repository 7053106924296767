// Arrays one after the other in one image of bytes, made on the host and copied to the device.
#pragma once

#include <cstddef>
#include <cstring>
#include <vector>

namespace lplb::cuda {

inline constexpr size_t kImageAlign = 16;

// Appends arrays to an image, each on a boundary of 16 bytes.
class Image {
 public:
  explicit Image(std::vector<std::byte>& bytes) : bytes_(bytes) {}

  size_t size() const { return bytes_.size(); }
  size_t room(size_t bytes) {
    const size_t at = bytes_.size();
    bytes_.resize(at + (bytes + kImageAlign - 1) / kImageAlign * kImageAlign);
    return at;
  }
  template <class To, class From>
  size_t add(const From* values, size_t n) {
    const size_t at = room(n * sizeof(To));
    for (size_t i = 0; i < n; ++i) {
      const To value = static_cast<To>(values[i]);
      std::memcpy(&bytes_[at + i * sizeof(To)], &value, sizeof value);
    }
    return at;
  }

 private:
  std::vector<std::byte>& bytes_;
};

}  // namespace lplb::cuda
