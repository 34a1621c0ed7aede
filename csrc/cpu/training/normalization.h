// The BNs of a block in training: the statistics of a batch, and the affine map that they make.
#pragma once

#include <cmath>
#include <vector>

#include "../training.h"
#include "../walk/batch.h"
#include "../walk/moments.h"
#include "stored.h"

namespace pathnet::cpu {
namespace PATHNET_ISA_NAMESPACE {
namespace {

// One BN with its statistics, channels zero-padded. Forward and backward pass make it of the same two rows, so both
// see the same ReLU bits.
class TrainingNorm {
 public:
  TrainingNorm(const NormParameters& parameters, const float* mean, const float* variance, const Image& image) {
    for (std::vector<float>* row : {&means_, &inverses_, &gains_, &biases_, &scales_}) row->resize(image.padded());
    for (int64_t c = 0; c < image.channels; ++c) {
      const double inverse = 1.0 / std::sqrt(double(variance[c]) + parameters.epsilon);
      means_[c] = mean[c];
      inverses_[c] = float(inverse);
      gains_[c] = parameters.gain[c];
      biases_[c] = parameters.bias[c];
      scales_[c] = float(double(parameters.gain[c]) * inverse);
    }
  }

  // The map of kLanes channels, in registers.
  struct Lanes {
    Vector mean, inverse, gain, bias, scale;

    Vector normalized(Vector value) const { return (value - mean) * inverse; }
    Vector scaled(Vector unit) const { return multiply_add(unit, gain, bias); }
  };

  Lanes at(int64_t channel) const {
    return {load(means_.data() + channel), load(inverses_.data() + channel), load(gains_.data() + channel),
            load(biases_.data() + channel), load(scales_.data() + channel)};
  }

 private:
  std::vector<float> means_, inverses_, gains_, biases_, scales_;  // the last are gain / deviation
};

template <class Stored>
Vector row_mean(const Image& image, const Stored* row, int64_t count) {
  const Vector first = load_some(row, count);
  Vector sum = splat(0.0f);
  for_lanes(count, [&](auto lanes) {
    for (int64_t x = 1; x < image.width; ++x) sum = sum + (load_some(row + x * image.channels, lanes) - first);
  });
  // Exact where all pixels are equal.
  return multiply_add(splat(1.0f / float(image.width)), sum, first);
}

// Measures a sample while it is in cache. Distances are taken from the mean of its middle row, so that no digits
// cancel where a channel's mean is far from zero, nor where a pixel at the border, which zeros reach, is far from the
// others.
template <class Stored>
void measure(const Image& image, const Stored* values, const SampleMoments::Row& moments) {
  const int64_t pixels = image.height * image.width;
  for (int64_t channel = 0; channel < image.channels; channel += kLanes) {
    const int64_t count = image.channels - channel;
    const Vector pivot = row_mean(image, values + image.height / 2 * image.width * image.channels + channel, count);
    double sums[kLanes] = {}, products[kLanes] = {};
    for_lanes(count, [&](auto lanes) {
      for (int64_t y = 0; y < image.height; ++y) {
        const Stored* row = values + y * image.width * image.channels + channel;
        Vector sum = splat(0.0f), square = splat(0.0f);
        for (int64_t x = 0; x < image.width; ++x) {
          const Vector distance = load_some(row + x * image.channels, lanes) - pivot;
          sum = sum + distance;
          square = multiply_add(distance, distance, square);
        }
        add_row(sums, sum);
        add_row(products, square);
      }
    });
    float pivots[kLanes];
    store(pivots, pivot);
    for (int64_t lane = 0; lane < std::min<int64_t>(kLanes, count); ++lane) {
      const double shift = sums[lane] / double(pixels);
      moments.means[channel + lane] = double(pivots[lane]) + shift;
      moments.squares[channel + lane] = products[lane] - shift * sums[lane];
    }
  }
}

}  // namespace
}  // namespace PATHNET_ISA_NAMESPACE
}  // namespace pathnet::cpu
