// The backward pass along routings, from the last block's output to the first block's input, BN mode `running`.
//
// A thread carries a few samples along some routings. A sample's gradient is one image, updated block by block in
// place, and the gradient inside a residual module is another: in stage 1 of the paper's networks (16 channels, 32 x
// 32) 74 KB each, so they stay in the second level of cache. Stage 3's weights (147 KB per convolution in float32,
// 5 MB in all) do not, and are read once for all samples of the group. A module reads only weights and ReLU bits from
// memory.
//
// Gradients shrink and grow along a path: where a sample's largest element leaves 2^-20 to 2^20, the gradient is
// multiplied by a power of two, which is exact, and its exponent keeps that power.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "block_backward_running.h"

namespace pathnet::cpu {
namespace PATHNET_ISA_NAMESPACE {
namespace {

template <class Convolver>
class BackwardRunning {
 public:
  using Element = typename Convolver::Element;

  BackwardRunning(const BackwardRunningWalk& job, const Network& network, const Packed<Convolver>& packed)
      : job_(job), network_(network), block_(network, packed), buffers_(network, kMostSamples) {}

  void begin(const Item& item) {
    first_ = item.first_sample;
    samples_ = item.samples;
    at_ = network_.plan.block_count;
    const Image& image = network_.ends[at_];
    const int64_t size = image.channels * image.height * image.width;
    for (int64_t s = 0; s < samples_; ++s) {
      states_[s] = {0, job_.exponent[first_ + s], 0.0f};
      from_planes(image, job_.grad + (first_ + s) * size, main(at_, s));
      settle(at_, s, largest_of(at_, s), true);
    }
  }

  int64_t samples() const { return samples_; }
  int64_t together(int64_t depth) const { return samples_together<Convolver>(network_, block_at(depth)); }

  void step(int64_t depth, const float* coefficients, int64_t begin, int64_t end) {
    const int64_t b = block_at(depth);
    const Block& block = network_.block(b);
    const float a = coefficients[0], c = coefficients[1];
    at_ = b;
    if (c == 0.0f && block.skip == kIdentity) {
      if (a == 1.0f) return;
      for (int64_t s = begin; s < end; ++s) {
        scale(b, s, a);
        settle(b, s, states_[s].largest * std::fabs(a), false);
      }
      return;
    }
    BlockTask<Convolver> tasks[kMostSamples];
    const int64_t count = end - begin;
    const bool same = network_.end_shape[b] == network_.end_shape[b + 1];
    // In place, unless the convolution would overwrite its source.
    const bool in_place = block.skips_by_identity() && block.unit_count > 1;
    for (int64_t i = 0; i < count; ++i) {
      State& state = states_[begin + i];
      const Element* source = operand(b + 1, begin + i);
      const float* values = main(b + 1, begin + i);
      state.which = in_place ? state.which : same ? 1 - state.which : 0;
      tasks[i] = {values, source, source, a, c, bits(begin + i), main(b, begin + i), operand(b, begin + i), 0.0f};
    }
    block_.apply(b, tasks, count);
    for (int64_t i = 0; i < count; ++i) settle(b, begin + i, tasks[i].largest, false);
  }

  void save(int slot) {
    if (slot == int(saved_.size())) saved_.emplace_back();
    Saved& saved = saved_[slot];
    saved.end = at_;
    const Image& image = network_.ends[at_];
    for (int64_t s = 0; s < samples_; ++s) {
      saved.states[s] = states_[s];
      const float* values = main(at_, s);
      saved.images[s].assign(values, values + image.pixels() * image.padded());
    }
  }

  void restore(int slot) {
    const Saved& saved = saved_[slot];
    at_ = saved.end;
    for (int64_t s = 0; s < samples_; ++s) {
      states_[s] = saved.states[s];
      std::copy(saved.images[s].begin(), saved.images[s].end(), main(at_, s));
      encode_main(at_, s);
    }
  }

  void finish(int64_t routing) {
    const Image& image = network_.ends[0];
    const int64_t size = image.channels * image.height * image.width;
    for (int64_t s = 0; s < samples_; ++s) {
      const int64_t place = routing * job_.batch + first_ + s;
      job_.norms[place] = std::ldexp(std::sqrt(sum_of_squares(image, main(0, s))), states_[s].exponent);
      if (job_.grad_input == nullptr) continue;
      to_planes(image, main(0, s), job_.grad_input + place * size);
      job_.exponent_input[place] = states_[s].exponent;
    }
  }

 private:
  struct State {
    int which;
    int32_t exponent;
    float largest;
  };

  struct Saved {
    int64_t end;
    State states[kMostSamples];
    std::vector<float> images[kMostSamples];
  };

  int64_t block_at(int64_t depth) const { return network_.plan.block_count - 1 - depth; }

  float* main(int64_t end, int64_t s) {
    return buffers_.main(network_.end_shape[end], s, states_[s].which, network_.ends[end]);
  }
  Element* operand(int64_t end, int64_t s) {
    return buffers_.operand(network_.end_shape[end], s, states_[s].which, network_.ends[end]);
  }
  const uint8_t* bits(int64_t s) const { return network_.plan.relu_bits + (first_ + s) * network_.plan.bits_stride; }

  // Brings a gradient whose largest element has left the range back into it. `encode_anyway`: whether to encode the
  // operand even if nothing was rescaled.
  void settle(int64_t end, int64_t s, float largest, bool encode_anyway) {
    State& state = states_[s];
    state.largest = largest;
    int power;
    if (out_of_range(largest, &power)) {
      times_power(network_.ends[end], main(end, s), -power);
      encode_main(end, s);
      state.exponent += power;
      state.largest = std::ldexp(largest, -power);
    } else if (encode_anyway) {
      encode_main(end, s);
    }
  }

  void scale(int64_t end, int64_t s, float factor) {
    scale_inside(network_.ends[end], main(end, s), factor, 1.0f);
    encode_main(end, s);
  }

  // Makes the operand that the next convolution reads from main.
  void encode_main(int64_t end, int64_t s) {
    const Image& image = network_.ends[end];
    if constexpr (!Convolver::kFloats) encode<Convolver>(image, main(end, s), image, operand(end, s));
  }

  float largest_of(int64_t end, int64_t s) {
    const Image& image = network_.ends[end];
    return largest_in(main(end, s), image.pixels() * image.padded());
  }

  const BackwardRunningWalk& job_;
  const Network& network_;
  BlockBackwardRunning<Convolver> block_;
  Buffers<Convolver> buffers_;
  State states_[kMostSamples];
  std::vector<Saved> saved_;
  int64_t first_ = 0, samples_ = 0, at_ = 0;
};

template <class Convolver>
void walk_backward_running(const BackwardRunningWalk& job, const Team& team) {
  const Network network = make_network(job.plan, true, false);
  const Packed<Convolver> packed(network, job.packed);
  walk_items(job, team, network, Direction::kBackward,
             [&] { return BackwardRunning<Convolver>(job, network, packed); });
}

}  // namespace
}  // namespace PATHNET_ISA_NAMESPACE
}  // namespace pathnet::cpu
