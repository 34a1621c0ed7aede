// The images that one thread works on: allocated on first use, and kept for the whole pass.
#pragma once

#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "../isa/vector.h"

namespace pathnet::cpu {
namespace PATHNET_ISA_NAMESPACE {
namespace {

// Zeros, aligned to a line of the cache. Borders stay zero, since only the inside of an image is ever written.
template <class Element>
class Buffer {
 public:
  Element* get(int64_t size) {
    if (!data_) {
      // A product may read one pixel beyond the last, whose weight is zero: it must be finite.
      const size_t bytes = (size + 4 * kGroup) * sizeof(Element);
      data_.reset(static_cast<Element*>(::operator new(bytes, std::align_val_t(64))));
      std::memset(static_cast<void*>(data_.get()), 0, bytes);
    }
    return data_.get();
  }

 private:
  struct Free {
    void operator()(Element* data) const { ::operator delete(data, std::align_val_t(64)); }
  };
  std::unique_ptr<Element, Free> data_;
};

template <class Convolver>
int64_t operand_plane(const Image& image) {
  return image.pixels() * Convolver::operand_channels(image);
}

template <class Convolver>
int64_t operand_size(const Image& image) {
  return operand_plane<Convolver>(image) * Convolver::kParts;
}

template <class Convolver>
class Buffers {
 public:
  using Element = typename Convolver::Element;

  Buffers(const Network& network, int64_t samples)
      : samples_(samples), mains_(network.shapes * samples * 2), operands_(mains_.size()), inners_(mains_.size()) {}

  // The image that runs from block to block, in float32; there are two, for blocks that cannot work in place.
  float* main(int shape, int64_t sample, int which, const Image& image) {
    return mains_[at(shape, sample, which)].get(image.pixels() * image.padded());
  }

  // The main image as convolutions read it: itself, where those read float32.
  Element* operand(int shape, int64_t sample, int which, const Image& image) {
    if constexpr (Convolver::kFloats) {
      return main(shape, sample, which, image);
    } else {
      return operands_[at(shape, sample, which)].get(operand_size<Convolver>(image));
    }
  }

  // The two images that convolutions inside a residual module write in turn.
  Element* inner(int shape, int64_t sample, int turn, const Image& image) {
    return inners_[at(shape, sample, turn)].get(operand_size<Convolver>(image));
  }

 private:
  size_t at(int shape, int64_t sample, int which) const { return (shape * samples_ + sample) * 2 + which; }

  int64_t samples_;
  std::vector<Buffer<float>> mains_;
  std::vector<Buffer<Element>> operands_, inners_;
};

}  // namespace
}  // namespace PATHNET_ISA_NAMESPACE
}  // namespace pathnet::cpu
