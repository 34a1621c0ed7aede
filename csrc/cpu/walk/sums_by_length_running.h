// The backward pass along all paths at once, BN mode `running`: the sums by length of the gradients of all 2^n paths.
//
// Coefficient k of the product of a * skip^T + x * c * module^T, block after block from the last to the first, is the
// sum over the paths of length k: G_k <- a * skip^T(G_k) + c * module^T(G_{k-1}), n (n + 1) / 2 modules in all. A
// thread carries one sample with all its coefficients, a few of which go through a block together, so that weights
// are read once for them. From the highest on they are updated in place: G_{k-1} is read before it is written.
//
// A thread holds n + 1 images: 55 of 74 KB in stage 1 of ResNet-110, 4 MB, which stay in the third level of cache. A
// module there computes 9.4 million multiply-adds and reads and writes 192 KB: 5 GB/s at 0.5 TFLOP/s a thread.
//
// Each coefficient has its own power of two; a sum of two has the larger one.
#pragma once

#include <cmath>

#include "block_backward_running.h"

namespace pathnet::cpu {
namespace PATHNET_ISA_NAMESPACE {
namespace {

template <class Convolver>
class SumsByLengthRunning {
 public:
  using Element = typename Convolver::Element;

  SumsByLengthRunning(const BackwardRunningWalk& job, const Team& team, const Network& network,
                      const Packed<Convolver>& packed)
      : job_(job),
        team_(team),
        network_(network),
        block_(network, packed),
        sums_(network, job.plan.block_count + 1),
        operands_(network, 2 * kMostSamples),
        states_(job.plan.block_count + 1) {}

  void walk(int64_t sample) {
    const int64_t n = network_.plan.block_count;
    const Image& image = network_.ends[n];
    which_ = 0;
    std::fill(states_.begin(), states_.end(), State{0, 0.0f});
    from_planes(image, job_.grad + sample * image.channels * image.height * image.width, sum(n, 0));
    states_[0].exponent = job_.exponent[sample];
    settle(n, 0, largest_in(sum(n, 0), image.pixels() * image.padded()));
    const uint8_t* bits = network_.plan.relu_bits + sample * network_.plan.bits_stride;
    for (int64_t b = n - 1; b >= 0; --b) step(b, n - 1 - b, bits);
    finish(sample);
  }

 private:
  struct State {
    int32_t exponent;
    float largest;
    bool zero() const { return largest == 0.0f; }
  };

  // Coefficient k at a block's end, in the live set of the two.
  float* sum(int64_t end, int64_t k) { return set(end, k, which_); }
  float* set(int64_t end, int64_t k, int which) {
    return sums_.main(network_.end_shape[end], k, which, network_.ends[end]);
  }

  // Replaces the coefficients 0 to `top` at the block's output by those from 0 to `top` + 1 at its input.
  void step(int64_t b, int64_t top, const uint8_t* bits) {
    const Block& block = network_.block(b);
    const float a = job_.routing[2 * b], c = job_.routing[2 * b + 1];
    const int from = which_;
    const bool same = network_.end_shape[b] == network_.end_shape[b + 1];
    if (!block.skips_by_identity()) which_ = same ? 1 - which_ : 0;
    const int64_t together = samples_together<Convolver>(network_, b);
    for (int64_t last = top + 1; last >= 0; last -= together) {
      team_.check();
      const int64_t first = std::max<int64_t>(last - together + 1, 0), count = last - first + 1;
      BlockTask<Convolver> tasks[kMostSamples];
      State states[kMostSamples];
      for (int64_t k = first; k <= last; ++k)
        tasks[k - first] = task(block, b, from, k, top, a, c, &states[k - first]);
      for (int64_t i = 0; i < count; ++i) tasks[i].bits = bits;
      // Coefficient 0 passes the identity alone, unchanged.
      const bool stays = first == 0 && block.skip == kIdentity && a == 1.0f;
      block_.apply(b, tasks + stays, count - stays);
      for (int64_t i = stays; i < count; ++i) {
        states_[first + i] = states[i];
        settle(b, first + i, tasks[i].largest);
      }
    }
  }

  // The task of coefficient k at the block's input, where its output has those up to `top`.
  BlockTask<Convolver> task(const Block& block, int64_t b, int from, int64_t k, int64_t top, float a, float c,
                            State* state) {
    const bool skips = a != 0.0f && k <= top && !states_[k].zero();
    const bool resides = c != 0.0f && k > 0 && !states_[k - 1].zero();
    const int32_t skip = skips ? states_[k].exponent : 0, residual = resides ? states_[k - 1].exponent : 0;
    state->exponent = skips || resides ? larger_exponent(skips ? a : 0.0f, skip, resides ? c : 0.0f, residual) : 0;
    BlockTask<Convolver> task = {};
    task.target = sum(b, k);
    const int64_t slot = 2 * (k % kMostSamples);
    if (skips) {
      task.a = times_power(a, int64_t(skip) - state->exponent);
      task.skip = set(b + 1, k, from);
      if (block.skip == kProjection) task.skip_operand = operand(b + 1, task.skip, slot, false);
    }
    if (resides) {
      task.c = times_power(c, int64_t(residual) - state->exponent);
      // A module of one convolution must not read what another task has overwritten.
      task.residual = operand(b + 1, set(b + 1, k - 1, from), slot + 1, block.unit_count == 1);
    }
    return task;
  }

  const Element* operand(int64_t end, const float* values, int64_t slot, bool copied) {
    const Image& image = network_.ends[end];
    if constexpr (Convolver::kFloats) {
      if (!copied) return values;
    }
    Element* operand = operands_.inner(network_.end_shape[end], slot, 0, image);
    encode<Convolver>(image, values, image, operand);
    return operand;
  }

  void settle(int64_t end, int64_t k, float largest) {
    int power;
    const Image& image = network_.ends[end];
    states_[k].largest = largest;
    if (largest == 0.0f && !all_zero(sum(end, k), image.pixels() * image.padded())) states_[k].largest = NAN;
    if (!out_of_range(largest, &power)) return;
    times_power(image, sum(end, k), -power);
    states_[k].exponent += power;
    states_[k].largest = std::ldexp(largest, -power);
  }

  void finish(int64_t sample) {
    const Image& image = network_.ends[0];
    const int64_t size = image.channels * image.height * image.width;
    for (int64_t k = 0; k <= network_.plan.block_count; ++k) {
      const int64_t place = k * job_.batch + sample;
      job_.norms[place] = std::ldexp(std::sqrt(sum_of_squares(image, sum(0, k))), states_[k].exponent);
      if (job_.grad_input == nullptr) continue;
      to_planes(image, sum(0, k), job_.grad_input + place * size);
      job_.exponent_input[place] = states_[k].exponent;
    }
  }

  const BackwardRunningWalk& job_;
  const Team& team_;
  const Network& network_;
  BlockBackwardRunning<Convolver> block_;
  Buffers<Convolver> sums_, operands_;
  std::vector<State> states_;
  int which_ = 0;
};

template <class Convolver>
void walk_sums_by_length_running(const BackwardRunningWalk& job, const Team& team) {
  const Network network = make_network(job.plan, true, false);
  const Packed<Convolver> packed(network, job.packed);
  take_in_turn(team, job.batch, [&](int, const auto& next, int64_t count) {
    const FlushDenormals flush;
    SumsByLengthRunning<Convolver> walker(job, team, network, packed);
    for (int64_t sample; (sample = next()) < count;) walker.walk(sample);
  });
}

}  // namespace
}  // namespace PATHNET_ISA_NAMESPACE
}  // namespace pathnet::cpu
