// What becomes of the sums of the backward pass: the input gradient of a convolution, masked and reduced for the BN
// before it; the gradient at that BN's input; and weight gradients, over the slots.
#pragma once

#include "pass.h"

namespace pathnet::cpu {
namespace PATHNET_ISA_NAMESPACE {
namespace {

// h = the sums, where the unit's ReLU is open, + old h where `add`; and sums of h and of h * x over each sample, with
// x the normalised input.
template <class Stored>
struct TrainingReduction {
  const Image& image;  // dense, of the unit's input
  const TrainingNorm& norm;
  bool add;
  bool sums_up;
  const Stored* inputs[kMostSamples];
  Stored* targets[kMostSamples];
  float* sums[kMostSamples];  // [two][padded channels]
  Ahead ahead;

  void operator()(int64_t sample, int64_t y, int64_t x, int64_t step, int64_t count, int64_t channel, int vectors,
                  const float* values) {
    const int64_t next = step * image.channels;
    for (int v = 0; v < vectors; ++v, channel += kLanes) {
      if (channel >= image.channels) return;
      const int64_t place = (y * image.width + x) * image.channels + channel;
      const Stored* input = inputs[sample] + place;
      Stored* target = targets[sample] + place;
      const float* vector = values + v * kLanes;
      const TrainingNorm::Lanes map = norm.at(channel);
      Vector sum = splat(0.0f), product = splat(0.0f);
      for_lanes(image.channels - channel, [&](auto lanes) {
        for (int64_t i = 0; i < count; ++i) {
          const Vector unit = map.normalized(load_some(input + i * next, lanes));
          Vector value = keep(load(vector + i * vectors * kLanes), passed(map.scaled(unit)));
          if (add) value = value + load_some(target + i * next, lanes);
          store_some(target + i * next, value, lanes);
          sum = sum + value;
          product = multiply_add(value, unit, product);
          ahead.fetch();
        }
      });
      if (!sums_up) continue;
      float *total = sums[sample] + channel, *products = total + image.padded();
      store(total, load(total) + sum);
      store(products, load(products) + product);
    }
  }
};

// What the backward pass through a BN takes from the batch: with h the gradient at its output and x its normalised
// input, the means of h and of h * x; zero for running statistics, which no gradient reaches.
struct NormMeans {
  std::vector<float> h, hx;
};

// The gradient at a BN's input, of kLanes channels, from h at its output and the input's value.
struct NormBackward {
  TrainingNorm::Lanes map;
  Vector mean, slope;

  Vector operator()(Vector h, Vector value) const { return map.scale * (h - mean - map.normalized(value) * slope); }
};

// weights [out][in][kernel * kernel] = the sum of the slots' gradients, in their order; each of those is as
// `finish_gradient` of a convolver writes it.
inline void add_slots(const Convolution& convolution, const float* slot_grads, int64_t slots, const Team& team,
                      float* weights) {
  const int64_t positions = convolution.positions, to_count = convolution.target.channels;
  const int64_t padded = convolution.target.padded(), plane = convolution.source.padded() * padded;
  take_in_turn(team, convolution.source.channels, [&](int, const auto& next, int64_t from_count) {
    for (int64_t from; (from = next()) < from_count;) {
      float* row = weights + from * to_count * positions;
      for (int64_t position = 0; position < positions; ++position) {
        for (int64_t to = 0; to < to_count; to += kLanes) {
          const float* grads = slot_grads + position * plane + from * padded + to;
          Vector sum = load(grads);
          for (int64_t slot = 1; slot < slots; ++slot) sum = sum + load(grads + slot * positions * plane);
          float lanes[kLanes];
          store(lanes, sum);
          for (int64_t n = 0; n < std::min<int64_t>(kLanes, to_count - to); ++n) {
            row[(to + n) * positions + position] = lanes[n];
          }
        }
      }
    }
  });
}

}  // namespace
}  // namespace PATHNET_ISA_NAMESPACE
}  // namespace pathnet::cpu
