// Shared by the passes of BN mode `batch`. There a batch is one object: every convolution runs over the whole batch,
// sample by sample in parallel, and ends in sums over it, so a pass is a chain of parallel steps. Images of the
// whole batch are stored without borders, one sample after the other; a thread adds the border when it convolves a
// sample.
//
// Sums over the batch add up each sample's sums, in the samples' order: they are equal for any number of threads.
#pragma once

#include <algorithm>
#include <vector>

#include "walker.h"

namespace pathnet::cpu {
namespace PATHNET_ISA_NAMESPACE {
namespace {

inline Image without_border(Image image) {
  image.halo = 0;
  return image;
}

// Adds one row's sums to totals per channel, which are double.
inline void add_row(double* totals, Vector row) {
  float lanes[kLanes];
  store(lanes, row);
  for (int lane = 0; lane < kLanes; ++lane) totals[lane] += lanes[lane];
}

// The images of each thread, for one sample at a time.
template <class Convolver>
class Benches {
 public:
  Benches(const Network& network, int threads) {
    for (int t = 0; t < threads; ++t) benches_.emplace_back(network, 1);
  }

  Buffers<Convolver>& operator[](int worker) { return benches_[worker]; }

 private:
  std::vector<Buffers<Convolver>> benches_;
};

// Calls work(worker, sample, walk) for every sample and each of `width` passes that go together. Samples are
// outermost, since all passes read the same normalised activations.
template <class Work>
void for_each_sample(const Team& team, int64_t batch, int64_t width, const Work& work) {
  take_in_turn(team, batch * width, [&](int worker, const auto& next, int64_t count) {
    for (int64_t i; (i = next()) < count;) work(worker, i / width, i % width);
  });
}

}  // namespace
}  // namespace PATHNET_ISA_NAMESPACE
}  // namespace pathnet::cpu
