// The forward pass under routings, BN mode `batch`: each BN uses mean and variance over the batch and all pixels. A
// routing (a lesion) changes the statistics of everything after it, so routings run one after the other.
//
// In a closed block a BN comes between the last convolution and the addition: the convolution's sums wait in a
// separate batch until their statistics are known.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "../large.h"
#include "batch.h"
#include "moments.h"

namespace pathnet::cpu {
namespace PATHNET_ISA_NAMESPACE {
namespace {

// One BN with its statistics, channels zero-padded.
struct Normalization {
  std::vector<float> means, inverse_deviations, weights, biases;

  Vector normalized(Vector value, int64_t channel) const {
    return (value - load(means.data() + channel)) * load(inverse_deviations.data() + channel);
  }
  Vector scaled(Vector unit, int64_t channel) const {
    return multiply_add(unit, load(weights.data() + channel), load(biases.data() + channel));
  }
};

// max(least, weight * normalised + bias), as the next convolution reads it; and the normalised values and the ReLU
// bits, unless those are null.
template <class Convolver>
struct Normalized {
  const Image& image;  // bordered, the operand's
  const Normalization& bn;
  float least;
  typename Convolver::Element* operand;
  float* normalized;
  uint8_t* bits;

  void operator()(int64_t, int64_t y, int64_t x, int64_t step, int64_t count, int64_t channel, int vectors,
                  const float* values) const {
    const int64_t channels = Convolver::operand_channels(image), plane = operand_plane<Convolver>(image);
    Pixels at(image, y, x, step);
    for (int64_t i = 0; i < count; ++i, at.next()) {
      for (int v = 0; v < vectors; ++v, values += kLanes) {
        const int64_t first = channel + v * kLanes;
        const Vector unit = bn.normalized(load(values), first), value = bn.scaled(unit, first);
        if (normalized) store(normalized + at.dense * image.padded() + first, unit);
        if (bits) write_bits(bits + at.dense * image.groups() * 2, first, positive(value));
        // In this order of arguments a NaN stays NaN.
        Convolver::put(operand + at.bordered * channels + first, plane, maximum(splat(least), value));
      }
    }
  }
};

template <class Convolver>
class ForwardBatch {
 public:
  ForwardBatch(const ForwardBatchWalk& job, const Team& team)
      : job_(job),
        team_(team),
        network_(make_network(job.plan, false, false)),
        packed_(network_, job.packed),
        starts_(normalized_starts(network_, job.batch)),
        benches_(network_, team.threads) {
    int64_t most = 0, channels = 0;
    for (const auto* images : {&network_.ends, &network_.inputs}) {
      for (const Image& image : *images) {
        most = std::max(most, image.dense());
        channels = std::max(channels, image.padded());
      }
    }
    for (Large* batch : {&main_, &next_, &raw_, &raw_next_}) *batch = make_large(job.batch * most);
    statistics_ = SampleMoments(job.batch, channels);
  }

  void walk(int64_t routing) {
    const Image first = without_border(network_.ends.front()), last = without_border(network_.ends.back());
    for_each_sample(team_, job_.batch, 1, [&](int, int64_t s, int64_t) {
      float* values = main_.get() + s * first.dense();
      std::fill_n(values, first.dense(), 0.0f);
      from_planes(first, job_.y0 + s * first.channels * first.height * first.width, values);
      measure(first, values, s);
    });
    for (int64_t b = 0; b < network_.plan.block_count; ++b) {
      const float* coefficients = job_.routing + (routing * network_.plan.block_count + b) * 2;
      step(b, coefficients[0], coefficients[1]);
    }
    const int64_t size = last.channels * last.height * last.width;
    for_each_sample(team_, job_.batch, 1, [&](int, int64_t s, int64_t) {
      to_planes(last, main_.get() + s * last.dense(), job_.output + (routing * job_.batch + s) * size);
    });
  }

 private:
  using Element = typename Convolver::Element;

  void step(int64_t b, float a, float c) {
    const Block& block = network_.block(b);
    if (network_.plan.closed(block)) return step_closed(b, a, c);
    if (c == 0.0f && (block.skip != kProjection || a == 0.0f)) return skip_alone(b, a);
    const int64_t last = block.first_unit + (c == 0.0f ? 1 : block.unit_count) - 1;
    for (int64_t u = block.first_unit; u <= last; ++u) {
      const Image in = without_border(network_.inputs[u]);
      const Normalization bn = normalization(u);
      const float* source = u == block.first_unit ? main_.get() : raw_.get();
      const bool ends = u == block.first_unit + block.unit_count - 1;
      float* target = ends ? next_.get() : raw_next_.get();
      for_each_sample(team_, job_.batch, 1, [&](int worker, int64_t s, int64_t) {
        const Element* operand = activate(worker, u, bn, source + s * in.dense(), s);
        if (u == block.first_unit) skip(b, a, s, operand);
        if (c == 0.0f) return measure_end(b, s);
        const Image image = ends ? without_border(network_.ends[b + 1]) : without_border(network_.inputs[u + 1]);
        float* values = target + s * image.dense();
        const float* old = nullptr;
        if (ends && a != 0.0f) old = block.skip == kIdentity ? main_.get() + s * image.dense() : values;
        const float scale = ends ? c : 1.0f, old_scale = block.skip == kIdentity ? a : 1.0f;
        Join<Convolver, false> join = {image, false, nullptr, {scale}, {old_scale}, {values}, {old}, {}, {}, {}};
        Convolver::run(network_.convolutions[u], packed_[u], &operand, 1, join);
        measure(image, values, s);
      });
      if (!ends) std::swap(raw_, raw_next_);
    }
    std::swap(main_, next_);
  }

  void step_closed(int64_t b, float a, float c) {
    const Block& block = network_.block(b);
    const Image from = without_border(network_.ends[b]), to = without_border(network_.ends[b + 1]);
    const bool projects = block.skip == kProjection && a != 0.0f;
    if (projects) sum_up(block.first_unit, block.projection_unit, main_, next_);
    const Normalization skip_bn = projects ? normalization(block.projection_end()) : Normalization();
    for (int64_t u = block.first_unit; c != 0.0f && u < block.module_end(); ++u) {
      sum_up(u, u, u == block.first_unit ? main_ : raw_, raw_next_);
      std::swap(raw_, raw_next_);
    }
    const Normalization bn = c != 0.0f ? normalization(block.module_end()) : Normalization();
    for_each_sample(team_, job_.batch, 1, [&](int, int64_t s, int64_t) {
      const float* source = main_.get() + s * from.dense();
      float* values = next_.get() + s * to.dense();
      if (projects) {
        end(block.projection_end(), skip_bn, a, values, nullptr, values, s);
      } else if (block.skips_by_identity() && a != 0.0f) {
        const Vector floor = splat(block.behind_relu() ? 0.0f : -INFINITY);
        for (int64_t j = 0; j < to.dense(); j += kLanes) {
          store(values + j, splat(a) * maximum(floor, load(source + j)));
        }
      } else {
        pad(from, to, network_.padding(block), false, block.skips_by_padding() ? a : 0.0f, source, values,
            block.behind_relu());
      }
      if (c != 0.0f) end(block.module_end(), bn, c, raw_.get() + s * to.dense(), values, values, s);
    });
    std::swap(main_, next_);
  }

  // Runs a convolution after unit u's BN and ReLU, and measures its sums.
  void sum_up(int64_t u, int64_t convolution, const Large& source, const Large& target) {
    const Image in = without_border(network_.inputs[u]),
                out = without_border(network_.convolutions[convolution].target);
    const Normalization bn = normalization(u);
    for_each_sample(team_, job_.batch, 1, [&](int worker, int64_t s, int64_t) {
      const Element* operand = activate(worker, u, bn, source.get() + s * in.dense(), s);
      float* values = target.get() + s * out.dense();
      Join<Convolver, false> join = {out, false, nullptr, {1.0f}, {0.0f}, {values}, {}, {}, {}, {}};
      Convolver::run(network_.convolutions[convolution], packed_[convolution], &operand, 1, join);
      measure(out, values, s);
    });
  }

  // target = factor * (the BN of row u, of raw) + old; a null old counts as zero.
  void end(int64_t u, const Normalization& bn, float factor, const float* raw, const float* old, float* target,
           int64_t s) {
    const Image& image = network_.inputs[u];
    float* normalized = job_.normalized ? job_.normalized + starts_[u] + s * image.dense() : nullptr;
    for (int64_t j = 0; j < image.dense(); j += image.padded()) {
      for (int64_t c = 0; c < image.padded(); c += kLanes) {
        const Vector unit = bn.normalized(load(raw + j + c), c);
        if (normalized) store(normalized + j + c, unit);
        const Vector before = old ? load(old + j + c) : splat(0.0f);
        store(target + j + c, multiply_add(splat(factor), bn.scaled(unit, c), before));
      }
    }
  }

  // next = a * skip(main), unless the skip is an identity; `operand` is that of the block's first convolution.
  void skip(int64_t b, float a, int64_t s, const Element* operand) {
    const Block& block = network_.block(b);
    if (block.skip == kIdentity || a == 0.0f) return;
    const Image from = without_border(network_.ends[b]), to = without_border(network_.ends[b + 1]);
    float* values = next_.get() + s * to.dense();
    if (block.skip == kPad) {
      pad(from, to, network_.padding(block), false, a, main_.get() + s * from.dense(), values);
    } else {
      Join<Convolver, false> join = {to, false, nullptr, {a}, {0.0f}, {values}, {}, {}, {}, {}};
      Convolver::run(network_.convolutions[block.projection_unit], packed_[block.projection_unit], &operand, 1, join);
    }
  }

  void skip_alone(int64_t b, float a) {
    const Block& block = network_.block(b);
    if (block.skip == kIdentity && a == 1.0f) return;
    const Image from = without_border(network_.ends[b]), to = without_border(network_.ends[b + 1]);
    for_each_sample(team_, job_.batch, 1, [&](int, int64_t s, int64_t) {
      const float* source = main_.get() + s * from.dense();
      float* values = next_.get() + s * to.dense();
      if (block.skip == kIdentity) {
        for (int64_t j = 0; j < to.dense(); j += kLanes) store(values + j, splat(a) * load(source + j));
      } else {
        pad(from, to, network_.padding(block), false, block.skip == kPad ? a : 0.0f, source, values);
      }
      measure(to, values, s);
    });
    std::swap(main_, next_);
  }

  void measure_end(int64_t b, int64_t s) {
    const Image to = without_border(network_.ends[b + 1]);
    measure(to, next_.get() + s * to.dense(), s);
  }

  // Measures a sample while it is in cache: each channel's mean, and the sum of squared distances from it.
  void measure(const Image& image, const float* values, int64_t s) {
    const auto [means, squares] = statistics_.at(s);
    const int64_t padded = image.padded(), pixels = image.height * image.width;
    std::fill_n(means, padded, 0.0);
    std::fill_n(squares, padded, 0.0);
    for (int64_t channel = 0; channel < padded; channel += kLanes) {
      for (int64_t y = 0; y < image.height; ++y) {
        const float* row = values + y * image.width * padded + channel;
        Vector sum = splat(0.0f);
        for (int64_t x = 0; x < image.width; ++x) sum = sum + load(row + x * padded);
        add_row(means + channel, sum);
      }
      float centre[kLanes];
      for (int lane = 0; lane < kLanes; ++lane) {
        means[channel + lane] /= double(pixels);
        // A mean rounded to float: sums and squares are then of the same distances.
        centre[lane] = float(means[channel + lane]);
        means[channel + lane] = centre[lane];
      }
      const Vector mean = load(centre);
      double sums[kLanes] = {};
      for (int64_t y = 0; y < image.height; ++y) {
        const float* row = values + y * image.width * padded + channel;
        Vector sum = splat(0.0f), square = splat(0.0f);
        for (int64_t x = 0; x < image.width; ++x) {
          const Vector distance = load(row + x * padded) - mean;
          sum = sum + distance;
          square = multiply_add(distance, distance, square);
        }
        add_row(sums, sum);
        add_row(squares + channel, square);
      }
      for (int lane = 0; lane < kLanes; ++lane) {
        const double shift = sums[lane] / double(pixels);
        means[channel + lane] += shift;
        squares[channel + lane] -= shift * sums[lane];
      }
    }
  }

  // The statistics of the whole batch, from those that `measure` left for its samples.
  Normalization normalization(int64_t u) {
    const Image& image = network_.inputs[u];
    const int64_t offset = network_.unit(u).scale_offset;
    Normalization bn;
    for (std::vector<float>* values : {&bn.means, &bn.inverse_deviations, &bn.weights, &bn.biases}) {
      values->resize(image.padded());
    }
    // Without a BN, the identity.
    if (offset < 0) {
      std::fill(bn.inverse_deviations.begin(), bn.inverse_deviations.end(), 1.0f);
      std::fill(bn.weights.begin(), bn.weights.end(), 1.0f);
      return bn;
    }
    for (int64_t c = 0; c < image.channels; ++c) {
      const Moments moments = statistics_.merged(c, image.height * image.width);
      const double inverse = 1.0 / std::sqrt(moments.variance + double(job_.epsilons[u]));
      bn.means[c] = float(moments.mean);
      bn.inverse_deviations[c] = float(inverse);
      bn.weights[c] = job_.plan.scales[offset + c];
      bn.biases[c] = job_.shifts[offset + c];
      if (job_.scales) job_.scales[offset + c] = float(double(bn.weights[c]) * inverse);
    }
    return bn;
  }

  const Element* activate(int worker, int64_t u, const Normalization& bn, const float* values, int64_t s) {
    const Image& image = network_.inputs[u];
    const Image dense = without_border(image);
    Element* operand = benches_[worker].inner(network_.input_shape[u], 0, 0, image);
    const Unit& unit = network_.unit(u);
    const bool normalizes = job_.normalized && unit.scale_offset >= 0;
    const bool masks = job_.relu_bits && unit.bits_offset >= 0;
    const Normalized<Convolver> then = {
        image,
        bn,
        least(unit),
        operand,
        normalizes ? job_.normalized + starts_[u] + s * image.dense() : nullptr,
        masks ? job_.relu_bits + s * network_.plan.bits_stride + unit.bits_offset : nullptr};
    rows_of(dense, values, s, then);
    return operand;
  }

  const ForwardBatchWalk& job_;
  const Team& team_;
  const Network network_;
  const Packed<Convolver> packed_;
  const std::vector<int64_t> starts_;
  Benches<Convolver> benches_;
  Large main_, next_, raw_, raw_next_;
  SampleMoments statistics_;
};

template <class Convolver>
void walk_forward_batch(const ForwardBatchWalk& job, const Team& team) {
  ForwardBatch<Convolver> walker(job, team);
  for (int64_t routing = 0; routing < job.routings; ++routing) walker.walk(routing);
}

}  // namespace
}  // namespace PATHNET_ISA_NAMESPACE
}  // namespace pathnet::cpu
