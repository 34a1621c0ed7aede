// What both passes of training share: the block's convolutions with their packed weights, its images, groups of
// samples, and the images that a thread works on.
#pragma once

#include <algorithm>
#include <memory>
#include <vector>

#include "../large.h"
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

// Neighbouring samples that one thread runs one after the other, group after group. Their number depends on shapes
// alone, so sums over a slot do not depend on the number of threads.
struct Slots {
  int64_t batch, group, samples, count;

  Slots(int64_t batch, int64_t group, int64_t most)
      : batch(batch),
        group(group),
        samples((batch + most * group - 1) / (most * group) * group),
        count((batch + samples - 1) / samples) {}

  // Calls work(first sample, samples, samples of the group after it) for each group of a slot.
  template <class Work>
  void for_each_group(int64_t slot, const Team& team, const Work& work) const {
    const int64_t end = std::min(batch, (slot + 1) * samples);
    for (int64_t first = slot * samples; first < end; first += group) {
      team.check();
      const int64_t here = std::min(group, end - first);
      work(first, here, std::min(group, end - first - here));
    }
  }
};

// Memory that the next group reads, fetched line by line while this one computes.
class Ahead {
 public:
  void add(const void* begin, int64_t bytes) {
    if (count_ < kMost)
      ranges_[count_++] = {static_cast<const char*>(begin), static_cast<const char*>(begin) + bytes};
  }

  // Called for each vector of results.
  void fetch() {
    for (int i = 0; i < count_; ++i) {
      if (ranges_[i].at >= ranges_[i].end) continue;
      __builtin_prefetch(ranges_[i].at, 0, 2);
      ranges_[i].at += kStep;
    }
  }

 private:
  struct Range {
    const char *at, *end;
  };
  static constexpr int kMost = 3;
  static constexpr int64_t kStep = 64;

  Range ranges_[kMost];
  int count_ = 0;
};

// Images of one thread, one for each sample of a group: zeros at first, and their borders stay zero.
template <class Element>
class GroupImages {
 public:
  Element* get(int64_t sample, int64_t size) { return buffers_[sample].get(size); }

 private:
  Buffer<Element> buffers_[kMostSamples];
};

// A pass over a block of a batch of images, dense in memory.
template <class Convolver, class Stored>
class TrainingPass {
 protected:
  using Element = typename Convolver::Element;

  TrainingPass(const TrainingBlock& block, const void* x, const void* inner, bool transposed, const Team& team)
      : block_(block),
        team_(team),
        convolutions_(block, transposed, team),
        x_(static_cast<const Stored*>(x)),
        inner_(static_cast<const Stored*>(inner)) {}

  bool last(int64_t u) const { return u == block_.units() - 1; }
  Skip skip() const { return Skip(block_.plan.blocks[0].skip); }
  Image input(int64_t u) const { return without_border(convolutions_.network().inputs[u]); }
  Image output() const { return without_border(convolutions_.network().ends[1]); }
  Image behind(int64_t u) const { return last(u) ? output() : input(u + 1); }
  static int64_t size(const Image& image) { return image.height * image.width * image.channels; }

  // Unit u's inputs, before its BN.
  const Stored* inputs(int64_t u) const { return u == 0 ? x_ : inner_ + block_.inner_start(u); }

  int64_t samples_together(int64_t u) const {
    return std::min(samples_in_group(input(u)), samples_in_group(behind(u)));
  }

  const TrainingBlock& block_;
  const Team& team_;
  const TrainingConvolutions<Convolver> convolutions_;

 private:
  const Stored *x_, *inner_;
};

}  // namespace
}  // namespace PATHNET_ISA_NAMESPACE
}  // namespace pathnet::cpu
