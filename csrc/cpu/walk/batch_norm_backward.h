// The backward pass through a BN that took the batch's statistics.
//
// With h the gradient at its output (masked by the ReLU bits), x its normalised input and N the values of a channel,
// the gradient at its input is scale * (h - sum(h) / N - x * sum(h x) / N).
#pragma once

#include <algorithm>
#include <vector>

#include "backward_context.h"

namespace pathnet::cpu {
namespace PATHNET_ISA_NAMESPACE {
namespace {

template <class Convolver>
class BatchNormBackward {
 public:
  using Element = typename Convolver::Element;

  explicit BatchNormBackward(BackwardContext<Convolver>& context) : context_(context) {}

  // Adds a sample's sum(h) and sum(h x) at unit u to sums [two][channels].
  void add_sums(int64_t u, const float* h, int64_t s, float* sums) const {
    const Image& image = context_.network.inputs[u];
    const float* x = context_.normalized(u, s);
    const int64_t channels = context_.channels;
    for (int64_t row = 0; row < image.dense(); row += image.width * image.padded()) {
      for (int64_t c = 0; c < image.padded(); c += kLanes) {
        Vector sum = splat(0.0f), product = splat(0.0f);
        for (int64_t j = row + c; j < row + image.width * image.padded(); j += image.padded()) {
          sum = sum + load(h + j);
          product = multiply_add(load(h + j), load(x + j), product);
        }
        store(sums + c, load(sums + c) + sum);
        store(sums + channels + c, load(sums + channels + c) + product);
      }
    }
  }

  // [two][channels] over the batch, from each sample's sums.
  std::vector<float> means_of(int64_t u, const std::vector<float>& sums) const {
    const Image& image = context_.network.inputs[u];
    const int64_t batch = context_.walk.batch, size = 2 * context_.channels;
    const double count = double(batch * image.height * image.width);
    std::vector<float> means(size);
    for (int64_t i = 0; i < size; ++i) {
      double sum = 0;
      for (int64_t s = 0; s < batch; ++s) sum += sums[s * size + i];
      means[i] = float(sum / count);
    }
    return means;
  }

  // The gradient at the input of unit u's BN, as the convolution before it reads it; h is the whole batch's.
  const Element* operand(int worker, int64_t u, const float* h, const std::vector<float>& means, int64_t s) const {
    const Image& image = context_.network.inputs[u];
    Element* operand = context_.benches[worker].inner(context_.network.input_shape[u], 0, 1, image);
    const int64_t channels = Convolver::operand_channels(image), plane = operand_plane<Convolver>(image);
    for_each_vector(u, h, means, s, [&](int64_t, int64_t pixel, int64_t channel, Vector value) {
      Convolver::put(operand + pixel * channels + channel, plane, value);
    });
    return operand;
  }

  // Calls then(element, bordered pixel, channel, gradient at the input of unit u's BN), from h and its means.
  template <class Then>
  void for_each_vector(int64_t u, const float* h, const std::vector<float>& means, int64_t s,
                       const Then& then) const {
    const Image& image = context_.network.inputs[u];
    const int64_t padded = image.padded();
    h += s * image.dense();
    const float* x = context_.normalized(u, s);
    const float* scales = context_.walk.plan.scales + context_.network.unit(u).scale_offset;
    // The inner loop is over pixels, to keep the channels' factors in registers.
    alignas(64) float factors[kLanes];
    for (int64_t y = 0; y < image.height; ++y) {
      for (int64_t c = 0; c < padded; c += kLanes) {
        std::fill_n(factors, kLanes, 0.0f);
        std::copy_n(scales + c, std::min<int64_t>(kLanes, std::max<int64_t>(0, image.channels - c)), factors);
        const Vector scale = load(factors);
        const Vector mean = load(means.data() + c), slope = load(means.data() + context_.channels + c);
        const int64_t first = image.pixel(y, 0);
        for (int64_t i = 0; i < image.width; ++i) {
          const int64_t j = (y * image.width + i) * padded + c;
          const Vector centred = load(h + j) - mean;
          then(j, first + i, c, scale * (centred - load(x + j) * slope));
        }
      }
    }
  }

 private:
  BackwardContext<Convolver>& context_;
};

}  // namespace
}  // namespace PATHNET_ISA_NAMESPACE
}  // namespace pathnet::cpu
