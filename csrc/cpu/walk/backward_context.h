// Shared by all steps of a backward pass in BN mode `batch`: the network, the record, and each thread's images.
#pragma once

#include <algorithm>
#include <vector>

#include "batch.h"
#include "batch_gradient.h"

namespace pathnet::cpu {
namespace PATHNET_ISA_NAMESPACE {
namespace {

template <class Convolver>
class BackwardContext {
 public:
  BackwardContext(const BackwardBatchWalk& backward_walk, const Team& threads)
      : walk(backward_walk),
        team(threads),
        network(make_network(walk.plan, true, false)),
        packed(network, walk.packed),
        starts(normalized_starts(network, walk.batch)),
        largest(largest_of(network, [](const Image& image) { return image.dense(); })),
        channels(largest_of(network, [](const Image& image) { return image.padded(); })),
        pool(walk.batch * largest),
        benches(network, team.threads) {}

  // work(worker, sample, w) for every sample and every w below `width`. Every other call goes through the samples
  // backwards, and finds the last ones of the call before in cache.
  template <class Work>
  void for_each(int64_t width, const Work& work) {
    backwards_ = !backwards_;
    for_each_sample(team, walk.batch, width, [&](int worker, int64_t s, int64_t w) {
      const FlushDenormals flush;
      work(worker, backwards_ ? walk.batch - 1 - s : s, w);
    });
  }

  // The sample that follows in the call at hand; beyond the batch after the last.
  int64_t next(int64_t s) const { return backwards_ ? s - 1 : s + 1; }

  const uint8_t* bits(int64_t u, int64_t s) const {
    return network.bits(u, walk.plan.relu_bits + s * network.plan.bits_stride);
  }

  // The normalised inputs of unit u.
  const float* normalized(int64_t u, int64_t s) const {
    return walk.normalized + starts[u] + s * network.inputs[u].dense();
  }

  // Returns how many routings, or coefficients of sums by length, fit into kTileOfWalksBytes, if each holds `batches`
  // batch gradients.
  int64_t tile(int64_t batches) const {
    const int64_t bytes = batches * walk.batch * largest * int64_t(sizeof(float));
    return std::max<int64_t>(1, kTileOfWalksBytes / bytes);
  }

  const BackwardBatchWalk& walk;
  const Team& team;
  const Network network;
  const Packed<Convolver> packed;
  const std::vector<int64_t> starts;
  const int64_t largest, channels;  // elements of the largest image, and padded channels of the widest
  BatchPool pool;
  Benches<Convolver> benches;

 private:
  // Bytes of the gradients of a tile of routings; memory does not grow with the number of routings.
  static constexpr int64_t kTileOfWalksBytes = int64_t(256) << 20;

  template <class Size>
  static int64_t largest_of(const Network& network, const Size& size) {
    int64_t most = 0;
    for (const auto* images : {&network.ends, &network.inputs}) {
      for (const Image& image : *images) most = std::max(most, size(image));
    }
    return most;
  }

  bool backwards_ = false;
};

}  // namespace
}  // namespace PATHNET_ISA_NAMESPACE
}  // namespace pathnet::cpu
