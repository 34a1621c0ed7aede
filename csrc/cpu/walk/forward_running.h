// The forward pass from the first block's input to the last block's output, BN mode `running`: the network
// itself, whose ReLU bits are recorded, or routings of it (lesions).
//
// As in the backward pass, a thread processes a few samples along some routings, with one image that goes from block
// to block and two inside the modules. BN and ReLU are applied to a convolution's sums while they are in cache, so
// memory keeps no activations, only each sample's ReLU bits, 129 KB for ResNet-110.
#pragma once

#include <algorithm>
#include <vector>

#include "walker.h"

namespace pathnet::cpu {
namespace PATHNET_ISA_NAMESPACE {
namespace {

// BN's factors and shifts of each unit's channels, and the convolutions' biases, zero-padded.
class Affines {
 public:
  // `biases` are stored unit after unit; null for none.
  Affines(const Network& network, const float* scales, const float* shifts, const float* biases) {
    for (size_t u = 0; u < network.inputs.size(); ++u) {
      const Image& image = network.inputs[u];
      const int64_t offset = network.unit(u).scale_offset, out = network.unit(u).out_channels;
      starts_.push_back(values_.size());
      if (offset >= 0) {
        append(scales + offset, image.channels);
        append(shifts + offset, image.channels);
      }
      bias_starts_.push_back(values_.size());
      if (biases == nullptr) continue;
      append(biases, out);
      biases += out;
    }
    biased_ = biases != nullptr;
  }

  const float* scales(int64_t unit) const { return values_.data() + starts_[unit]; }
  const float* shifts(int64_t unit, const Image& image) const { return scales(unit) + image.padded(); }
  const float* bias(int64_t unit) const { return biased_ ? values_.data() + bias_starts_[unit] : nullptr; }

 private:
  void append(const float* values, int64_t channels) {
    values_.insert(values_.end(), values, values + channels);
    values_.resize((values_.size() + kGroup - 1) / kGroup * kGroup);
  }

  std::vector<float> values_;
  std::vector<size_t> starts_, bias_starts_;
  bool biased_ = false;
};

template <class Convolver>
class ForwardRunning {
 public:
  using Element = typename Convolver::Element;

  ForwardRunning(const ForwardRunningWalk& job, const Network& network, const Packed<Convolver>& packed,
                 const Affines& affines)
      : job_(job), network_(network), packed_(packed), affines_(affines), buffers_(network, kMostSamples) {}

  void begin(const Item& item) {
    first_ = item.first_sample;
    samples_ = item.samples;
    at_ = 0;
    std::fill_n(which_, kMostSamples, 0);
    const Image& image = network_.ends[0];
    for (int64_t s = 0; s < samples_; ++s) {
      from_planes(image, job_.y0 + (first_ + s) * image.channels * image.height * image.width, main(0, s));
    }
  }

  int64_t samples() const { return samples_; }
  int64_t together(int64_t depth) const { return samples_together<Convolver>(network_, depth); }

  void step(int64_t b, const float* coefficients, int64_t begin, int64_t end) {
    const Block& block = network_.block(b);
    const float a = coefficients[0], c = coefficients[1];
    at_ = b + 1;
    if (c == 0.0f && block.skip == kIdentity) {
      if (a == 1.0f) return;
      for (int64_t s = begin; s < end; ++s) scale_inside(network_.ends[b + 1], main(b + 1, s), a, 1.0f);
      return;
    }
    const bool identity = block.skips_by_identity(), padded = block.skips_by_padding();
    Join<Convolver, false> join = {network_.ends[b + 1], block.behind_relu(), nullptr, {}, {}, {}, {}, {}, {}, {}};
    const Element* sources[kMostSamples];
    const int64_t count = end - begin;
    const bool same = network_.end_shape[b] == network_.end_shape[b + 1];
    if (c != 0.0f || (block.skip == kProjection && a != 0.0f)) activate(block.first_unit, b, begin, count, sources);
    for (int64_t i = 0; i < count; ++i) {
      const float* source = main(b, begin + i);
      // The first convolution reads the result of `activate`, so the source may be overwritten.
      if (!identity) which_[begin + i] = same ? 1 - which_[begin + i] : 0;
      join.targets[i] = main(b + 1, begin + i);
      join.olds[i] = identity && a != 0.0f ? source : nullptr;
      join.coefficients[i] = c;
      join.old_coefficients[i] = a;
      join.largest[i] = splat(0.0f);
      if (padded || (block.skip == kProjection && a == 0.0f && c == 0.0f)) {
        pad(network_.ends[b], network_.ends[b + 1], network_.padding(block), false, padded ? a : 0.0f, source,
            join.targets[i], block.behind_relu());
        join.olds[i] = join.targets[i];
      }
    }
    if (block.skip == kProjection && a != 0.0f) {
      std::fill_n(join.coefficients, count, a);
      join.bias = affines_.bias(block.projection_unit);
      convolve(block.projection_unit, sources, count, join);
      std::fill_n(join.coefficients, count, c);
      for (int64_t i = 0; i < count; ++i) join.olds[i] = join.targets[i];
    }
    if (!identity) {
      // The skip has written its results, coefficient and ReLU included.
      std::fill_n(join.old_coefficients, count, 1.0f);
      join.behind_relu = false;
    }
    if (c != 0.0f) {
      join.bias = affines_.bias(block.first_unit + block.unit_count - 1);
      residual(block, begin, count, sources, join);
    } else if (block.skip == kActivated) {
      for (int64_t i = 0; i < count; ++i) {
        scaled_copy(network_.ends[b + 1], main(b + 1, begin + i), a, main(b + 1, begin + i),
                    [](Vector value, int64_t, int64_t) { return maximum(splat(0.0f), value); });
      }
    }
  }

  void save(int slot) {
    if (slot == int(saved_.size())) saved_.emplace_back();
    Saved& saved = saved_[slot];
    saved.end = at_;
    std::copy_n(which_, kMostSamples, saved.which);
    const Image& image = network_.ends[at_];
    for (int64_t s = 0; s < samples_; ++s) {
      const float* values = main(at_, s);
      saved.images[s].assign(values, values + image.pixels() * image.padded());
    }
  }

  void restore(int slot) {
    const Saved& saved = saved_[slot];
    at_ = saved.end;
    std::copy_n(saved.which, kMostSamples, which_);
    for (int64_t s = 0; s < samples_; ++s) {
      std::copy(saved.images[s].begin(), saved.images[s].end(), main(at_, s));
    }
  }

  void finish(int64_t routing) {
    const int64_t end = network_.plan.block_count;
    const Image& image = network_.ends[end];
    const int64_t size = image.channels * image.height * image.width;
    for (int64_t s = 0; s < samples_; ++s) {
      to_planes(image, main(end, s), job_.output + (routing * job_.batch + first_ + s) * size);
    }
  }

 private:
  struct Saved {
    int64_t end;
    int which[kMostSamples];
    std::vector<float> images[kMostSamples];
  };

  float* main(int64_t end, int64_t s) {
    return buffers_.main(network_.end_shape[end], s, which_[s], network_.ends[end]);
  }

  Activated<Convolver> activated(int64_t unit, int64_t begin, int64_t count) {
    const Image& image = network_.inputs[unit];
    Activated<Convolver> epilogue = {
        image, affines_.scales(unit), affines_.shifts(unit, image), least(network_.unit(unit)), {}, {}};
    for (int64_t i = 0; i < count; ++i) {
      epilogue.operands[i] = buffers_.inner(network_.input_shape[unit], begin + i, int(unit % 2), image);
      if (job_.relu_bits == nullptr || network_.unit(unit).bits_offset < 0) continue;
      epilogue.bits[i] =
          job_.relu_bits + (first_ + begin + i) * network_.plan.bits_stride + network_.unit(unit).bits_offset;
    }
    return epilogue;
  }

  // Makes the operands of the block's first convolution, and of its projection.
  void activate(int64_t unit, int64_t end, int64_t begin, int64_t count, const Element** sources) {
    const Activated<Convolver> then = activated(unit, begin, count);
    for (int64_t i = 0; i < count; ++i) {
      rows_of(network_.ends[end], main(end, begin + i), i, then);
      sources[i] = then.operands[i];
    }
  }

  template <class Then>
  void convolve(int64_t unit, const Element* const* sources, int64_t count, Then& then) {
    Convolver::run(network_.convolutions[unit], packed_[unit], sources, count, then);
  }

  void residual(const Block& block, int64_t begin, int64_t count, const Element** sources,
                Join<Convolver, false>& join) {
    const int64_t last = block.first_unit + block.unit_count - 1;
    for (int64_t u = block.first_unit; u < last; ++u) {
      const Activated<Convolver> then = activated(u + 1, begin, count);
      convolve(u, sources, count, then);
      std::copy_n(then.operands, count, sources);
    }
    convolve(last, sources, count, join);
  }

  const ForwardRunningWalk& job_;
  const Network& network_;
  const Packed<Convolver>& packed_;
  const Affines& affines_;
  Buffers<Convolver> buffers_;
  int which_[kMostSamples] = {};
  std::vector<Saved> saved_;
  int64_t first_ = 0, samples_ = 0, at_ = 0;
};

template <class Convolver>
void walk_forward_running(const ForwardRunningWalk& job, const Team& team) {
  const Network network = make_network(job.plan, false, false);
  const Packed<Convolver> packed(network, job.packed);
  const Affines affines(network, job.plan.scales, job.shifts, job.biases);
  walk_items(job, team, network, Direction::kForward,
             [&] { return ForwardRunning<Convolver>(job, network, packed, affines); });
}

}  // namespace
}  // namespace PATHNET_ISA_NAMESPACE
}  // namespace pathnet::cpu
