// Finishes gradients of a batch: adds up the gradients through a block's skip and through its module, and brings the
// sum back into the range of float32.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "batch_norm_backward.h"

namespace pathnet::cpu {
namespace PATHNET_ISA_NAMESPACE {
namespace {

template <class Convolver>
class GradientFinisher {
 public:
  GradientFinisher(BackwardContext<Convolver>& context, const BatchNormBackward<Convolver>& norms)
      : context_(context), norms_(norms) {}

  // Finishes those of the gradients that are unfinished, each once.
  void finish_all(const std::vector<SharedGradient>& gradients) {
    std::vector<SharedGradient> unfinished;
    for (const SharedGradient& gradient : gradients) {
      const bool seen = std::find(unfinished.begin(), unfinished.end(), gradient) != unfinished.end();
      if (!gradient->finished && !seen) unfinished.push_back(gradient);
    }
    for (const SharedGradient& gradient : unfinished) make_room(*gradient);
    context_.for_each(int64_t(unfinished.size()),
                      [&](int, int64_t s, int64_t g) { finish_sample(*unfinished[g], s); });
    for (const SharedGradient& gradient : unfinished) conclude(*gradient);
  }

  // Gives the values memory, before the first sample is finished: that of the gradient before the block, where
  // nothing else reads it.
  void make_room(BatchGradient& gradient) {
    if (gradient.values) return;
    const bool alone = gradient.skip_from.use_count() == 1 && network().block(gradient.block).skips_by_identity();
    gradient.values = alone ? gradient.skip_from->values : context_.pool.get();
    gradient.largest.resize(context_.walk.batch);
  }

  void finish_sample(BatchGradient& gradient, int64_t s) {
    const int64_t b = gradient.block;
    const Block& block = network().block(b);
    const Image from = without_border(network().ends[b + 1]), to = without_border(network().ends[b]);
    float* values = gradient.values.get() + s * to.dense();
    const float* source = gradient.skip_from->values.get() + s * from.dense();
    // With a projection, h holds the sum of both branches, factors included.
    const Vector a = splat(gradient.a), c = splat(block.skip == kProjection ? 1.0f : gradient.c);
    Vector most = splat(0.0f);
    const auto put = [&](int64_t j, Vector value) {
      most = maximum(most, magnitude(value));
      store(values + j, value);
    };
    // `old` is the gradient through the skip; with an identity it is the source itself.
    const float* old = source;
    Vector old_factor = a;
    if (!block.skips_by_identity()) {
      pad(from, to, network().padding(block), true, block.skips_by_padding() ? gradient.a : 0.0f, source, values);
      old = values;
      old_factor = splat(1.0f);
    } else if (gradient.a == 0.0f) {
      std::fill_n(values, to.dense(), 0.0f);
      old = values;
    }
    if (network().plan.closed(block)) {
      const float* h = gradient.h ? gradient.h.get() + s * to.dense() : nullptr;
      const uint8_t* mask = context_.bits(block.first_unit, s);
      for (int64_t j = 0; j < to.dense(); j += to.padded(), mask += to.groups() * 2) {
        for (int64_t channel = 0; channel < to.padded(); channel += kLanes) {
          Vector value = old_factor * load(old + j + channel);
          if (h) value = multiply_add(c, load(h + j + channel), value);
          put(j + channel, keep(value, read_bits(mask, channel)));
        }
      }
    } else if (gradient.h) {
      norms_.for_each_vector(block.first_unit, gradient.h.get(), gradient.means, s,
                             [&](int64_t j, int64_t, int64_t, Vector value) {
                               put(j, multiply_add(old_factor, load(old + j), c * value));
                             });
    } else {
      for (int64_t j = 0; j < to.dense(); j += kLanes) put(j, old_factor * load(old + j));
    }
    gradient.largest[s] = largest_lane(most);
  }

  // Ends a gradient after its last sample. Returns whether it had left the range and was rescaled by a power of two.
  bool conclude(BatchGradient& gradient) {
    constexpr float kLeast = 0x1p-30f, kMost = 0x1p30f;
    gradient.finished = true;
    gradient.skip_from.reset();
    gradient.h.reset();
    float most = 0.0f;
    for (float largest : gradient.largest) most = std::max(most, largest);
    const int64_t size = without_border(network().ends[gradient.block]).dense();
    gradient.zero = most == 0.0f && all_zero(gradient.values.get(), context_.walk.batch * size);
    if (!(most > 0.0f) || !std::isfinite(most) || (most >= kLeast && most <= kMost)) return false;
    int power;
    std::frexp(most, &power);
    gradient.exponent += power;
    // In two factors, since 2^-power can leave the range of float32 where the result does not.
    const Vector half = splat(std::ldexp(1.0f, -power / 2));
    const Vector other_half = splat(std::ldexp(1.0f, -power - (-power / 2)));
    context_.for_each(1, [&](int, int64_t s, int64_t) {
      float* values = gradient.values.get() + s * size;
      for (int64_t j = 0; j < size; j += kLanes) store(values + j, load(values + j) * half * other_half);
    });
    return true;
  }

 private:
  const Network& network() const { return context_.network; }

  BackwardContext<Convolver>& context_;
  const BatchNormBackward<Convolver>& norms_;
};

}  // namespace
}  // namespace PATHNET_ISA_NAMESPACE
}  // namespace pathnet::cpu
