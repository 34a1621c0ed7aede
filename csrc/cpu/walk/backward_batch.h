// The backward pass along routings, BN mode `batch`; block_backward_batch.h holds the convolutions,
// batch_norm_backward.h the BN step.
//
// Routings that agree from the beginning of the pass share that part of it: the gradients of a step are those at one
// depth of the routings' prefix tree. As many routings as fit into memory go together, as a tile.
#pragma once

#include <algorithm>
#include <vector>

#include "batch_ends.h"
#include "block_backward_batch.h"

namespace pathnet::cpu {
namespace PATHNET_ISA_NAMESPACE {
namespace {

template <class Convolver>
class BackwardBatch {
 public:
  BackwardBatch(const BackwardBatchWalk& walk, const Team& team)
      : context_(walk, team),
        routings_(walk.routing, walk.routings, walk.plan.block_count, Direction::kBackward, team) {}

  void run() {
    // Four batch gradients per routing: one on each side of a block, and two inside it.
    const int64_t tile = context_.tile(4);
    for (int64_t first = 0; first < routings_.count(); first += tile) {
      run_tile(first, std::min(first + tile, routings_.count()));
    }
  }

 private:
  const Network& network() const { return context_.network; }

  void run_tile(int64_t first, int64_t last) {
    std::vector<SharedResult> nodes = {{first, last, ends_.start()}};
    for (int64_t depth = 0; depth < network().plan.block_count; ++depth) nodes = step(nodes, depth);
    ends_.write(nodes, [&](int64_t position) { return routings_.routing(position); });
  }

  // Splits each node's routings by their coefficients at the next block, and runs the block.
  std::vector<SharedResult> step(const std::vector<SharedResult>& nodes, int64_t depth) {
    const int64_t b = network().plan.block_count - 1 - depth;
    const Block& block = network().block(b);
    std::vector<SharedResult> next;
    std::vector<SharedGradient> targets;
    bool needs_finished = false;
    for (const SharedResult& node : nodes) {
      for (int64_t begin = node.first, end; begin < node.last; begin = end) {
        for (end = begin + 1; end < node.last && routings_.agree(begin, end, depth);) ++end;
        const float* coefficients = routings_.coefficients(begin, depth);
        if (block.skip == kIdentity && coefficients[0] == 1.0f && coefficients[1] == 0.0f) {
          next.push_back({begin, end, node.gradient});
          continue;
        }
        targets.push_back(std::make_shared<BatchGradient>());
        next.push_back({begin, end, targets.back()});
        BatchGradient& target = *targets.back();
        target.from = target.skip_from = node.gradient;
        target.block = b;
        target.a = coefficients[0];
        target.c = coefficients[1];
        needs_finished =
            needs_finished || block.skip != kIdentity || target.c == 0.0f || network().plan.closed(block);
      }
    }
    if (targets.empty()) return next;
    // With an identity skip the last convolution finishes its source; any other reader needs it finished.
    if (needs_finished) {
      std::vector<SharedGradient> sources;
      for (const SharedGradient& target : targets) sources.push_back(target->from);
      finisher_.finish_all(sources);
    }
    block_.walk(b, targets);
    return next;
  }

  BackwardContext<Convolver> context_;
  BatchNormBackward<Convolver> norms_{context_};
  GradientFinisher<Convolver> finisher_{context_, norms_};
  BlockBackwardBatch<Convolver> block_{context_, norms_, finisher_};
  BatchEnds<Convolver> ends_{context_, finisher_};
  const Routings routings_;
};

template <class Convolver>
void walk_backward_batch(const BackwardBatchWalk& walk, const Team& team) {
  BackwardBatch<Convolver>(walk, team).run();
}

}  // namespace
}  // namespace PATHNET_ISA_NAMESPACE
}  // namespace pathnet::cpu
