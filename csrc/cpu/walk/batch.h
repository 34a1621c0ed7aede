// What the walks of BN mode `batch` share. There a batch is one object: every convolution runs over the whole batch,
// sample by sample in parallel, and ends in sums over it, so that a walk is a chain of parallel steps. Images of the
// whole batch lie without borders, one sample after the other; a thread makes a sample's bordered image when it
// convolves it.
//
// Sums over the batch are of each sample's own sums, in the samples' order: equal for any number of threads.
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

// Per channel, in double: what a row of sums adds up to goes there once a row.
inline void add_row(double* totals, Vector row) {
  float lanes[kLanes];
  store(lanes, row);
  for (int lane = 0; lane < kLanes; ++lane) totals[lane] += lanes[lane];
}

// A thread's own images, one sample at a time.
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

// For every sample and every one of `width` walks that go together, the samples outermost, since all walks read the
// same normalized activations: work(worker, sample, walk).
template <class Work>
void for_each_sample(const Team& team, int64_t batch, int64_t width, const Work& work) {
  take_in_turn(team, batch * width, [&](int worker, const auto& next, int64_t count) {
    for (int64_t i; (i = next()) < count;) work(worker, i / width, i % width);
  });
}

}  // namespace
}  // namespace PATHNET_ISA_NAMESPACE
}  // namespace pathnet::cpu
