// The backward pass along all paths at once, BN mode `batch`: the sums by length of the gradients of all 2^n paths.
//
// The pass is that along routings, with coefficients of powers of x in place of routings: the gradients through a
// block's skip and through its module are those of G_k and of G_{k-1}. From the highest power on, one tile of them at
// a time passes through the block and is finished, so memory holds n + 1 gradients and those of a tile.
#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "batch_ends.h"
#include "block_backward_batch.h"

namespace pathnet::cpu {
namespace PATHNET_ISA_NAMESPACE {
namespace {

template <class Convolver>
class SumsByLengthBatch {
 public:
  SumsByLengthBatch(const BackwardBatchWalk& walk, const Team& team) : context_(walk, team) {}

  void run() {
    // Three batch gradients per coefficient: two inside a block, and a third while one unit follows another.
    const int64_t tile = context_.tile(3);
    std::vector<SharedGradient> sums = {ends_.start()};
    for (int64_t b = context_.network.plan.block_count - 1; b >= 0; --b) sums = step(std::move(sums), b, tile);
    std::vector<SharedResult> results;
    for (int64_t k = 0; k < int64_t(sums.size()); ++k) results.push_back({k, k + 1, sums[k]});
    ends_.write(results, [](int64_t k) { return k; });
  }

 private:
  // Returns the coefficients at a block's input, one more than those at its output.
  std::vector<SharedGradient> step(std::vector<SharedGradient> sums, int64_t b, int64_t tile) {
    const float a = context_.walk.routing[2 * b], c = context_.walk.routing[2 * b + 1];
    const int64_t top = int64_t(sums.size());
    std::vector<SharedGradient> next(top + 1);
    for (int64_t last = top; last >= 0; last -= tile) {
      std::vector<SharedGradient> targets;
      for (int64_t k = last; k > last - tile && k >= 0; --k) {
        next[k] = std::make_shared<BatchGradient>();
        BatchGradient& target = *next[k];
        target.block = b;
        target.a = k < top && !sums[k]->zero ? a : 0.0f;
        target.c = k > 0 && !sums[k - 1]->zero ? c : 0.0f;
        target.from = sums[std::max<int64_t>(k - 1, 0)];
        target.skip_from = k < top ? std::move(sums[k]) : target.from;
        targets.push_back(next[k]);
      }
      block_.walk(b, targets);
      finisher_.finish_all(targets);
    }
    return next;
  }

  BackwardContext<Convolver> context_;
  BatchNormBackward<Convolver> norms_{context_};
  GradientFinisher<Convolver> finisher_{context_, norms_};
  BlockBackwardBatch<Convolver> block_{context_, norms_, finisher_};
  BatchEnds<Convolver> ends_{context_, finisher_};
};

template <class Convolver>
void walk_sums_by_length_batch(const BackwardBatchWalk& walk, const Team& team) {
  SumsByLengthBatch<Convolver>(walk, team).run();
}

}  // namespace
}  // namespace PATHNET_ISA_NAMESPACE
}  // namespace pathnet::cpu
