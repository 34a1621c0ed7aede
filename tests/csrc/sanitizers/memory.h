// Memory in which a sanitizer sees every read or write beyond the last element.
#pragma once

#include <algorithm>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <vector>

#include "cpu/kernels.h"

namespace trial {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

// A heap block that ends with the last element. Where `shifted`, the first is no better aligned than its type
// needs.
template <class T>
class Exact {
 public:
  Exact(size_t size, bool shifted, T value) : shift_(shifted), size_(size), block_(new T[size + shift_]) {
    std::fill_n(data(), size, value);
  }
  Exact(const std::vector<T>& values, bool shifted) : Exact(values.size(), shifted, T()) {
    std::copy(values.begin(), values.end(), data());
  }

  T* data() { return block_.get() + shift_; }
  const T* data() const { return block_.get() + shift_; }
  size_t size() const { return size_; }
  const T& operator[](size_t i) const { return data()[i]; }

  bool operator==(const Exact& other) const {
    return size_ == other.size_ && (size_ == 0 || std::memcmp(data(), other.data(), size_ * sizeof(T)) == 0);
  }
  bool operator!=(const Exact& other) const { return !(*this == other); }

 private:
  size_t shift_, size_;
  std::unique_ptr<T[]> block_;
};

// Packed weights, which begin at a line of the cache, as torch's memory does.
class PackedWeights {
 public:
  PackedWeights(const pathnet::cpu::Kernels& kernels, const pathnet::Plan& plan, pathnet::cpu::Direction direction,
                bool fold)
      : block_(static_cast<uint8_t*>(::operator new(kernels.packed_size(plan, direction), std::align_val_t(64)))) {
    kernels.pack(plan, direction, fold, block_.get(), [] {});
  }
  const uint8_t* data() const { return block_.get(); }

 private:
  struct Free {
    void operator()(uint8_t* bytes) const { ::operator delete(bytes, std::align_val_t(64)); }
  };
  std::unique_ptr<uint8_t, Free> block_;
};

}  // namespace trial
