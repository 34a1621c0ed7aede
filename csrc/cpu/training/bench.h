// What both passes of training share: the block's convolutions with their packed weights, groups of samples, and the
// images that a thread works on.
#pragma once

#include <algorithm>
#include <memory>
#include <vector>

#include "../walk/large.h"
#include "../walk/walker.h"
#include "normalization.h"

namespace pathnet::cpu {
namespace PATHNET_ISA_NAMESPACE {
namespace {

// A block's convolutions, in one direction, packed.
template <class Convolver>
class TrainingConvolutions {
 public:
  using Element = typename Convolver::Element;

  TrainingConvolutions(const TrainingBlock& block, bool transposed, const Team& team)
      : network_(make_network(block.plan, transposed, false)) {
    std::vector<int64_t> starts = {0};
    for (size_t i = 0; i < block.weights.size(); ++i) {
      network_.convolutions[i].weights = block.weights[i];
      // Starts on a line of the cache.
      starts.push_back(starts.back() + (Convolver::packed_size(network_.convolutions[i]) + 63) / 64 * 64);
    }
    memory_ = make_large((starts.back() * sizeof(Element) + sizeof(float) - 1) / sizeof(float));
    auto* packed = reinterpret_cast<Element*>(memory_.get());
    for (int64_t start : starts) packed_.push_back(packed + start);
    take_in_turn(team, int64_t(block.weights.size()), [&](int, const auto& next, int64_t count) {
      for (int64_t i; (i = next()) < count;) Convolver::pack(network_.convolutions[i], packed_[i]);
    });
  }

  const Network& network() const { return network_; }
  const Convolution& operator[](int64_t i) const { return network_.convolutions[i]; }
  const Element* packed(int64_t i) const { return packed_[i]; }

 private:
  Network network_;
  Large memory_;
  std::vector<Element*> packed_;
};

// The samples that a thread convolves together: as many as fill some tiles where images are small.
inline int64_t samples_in_group(const Image& image) {
  constexpr int64_t kPixels = 256;
  return std::clamp<int64_t>(kPixels / (image.height * image.width), 1, kMostSamples);
}

// Images of one thread, one for each sample of a group: zeros at first, and their borders stay zero.
template <class Element>
class GroupImages {
 public:
  Element* get(int64_t sample, int64_t size) { return buffers_[sample].get(size); }

 private:
  Buffer<Element> buffers_[kMostSamples];
};

}  // namespace
}  // namespace PATHNET_ISA_NAMESPACE
}  // namespace pathnet::cpu
