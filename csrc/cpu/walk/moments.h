// The statistics of a batch, from those of its samples.
#pragma once

#include <cstdint>
#include <vector>

#include "../isa/vector.h"

namespace pathnet::cpu {
namespace PATHNET_ISA_NAMESPACE {
namespace {

struct Moments {
  double mean, variance;  // biased
};

// Mean of each channel in each sample, and the sum of squared distances from it.
class SampleMoments {
 public:
  struct Row {
    double *means, *squares;  // [channels]
  };

  SampleMoments() = default;
  SampleMoments(int64_t batch, int64_t channels)
      : batch_(batch), channels_(channels), values_(batch * 2 * channels) {}

  Row at(int64_t sample) {
    double* means = values_.data() + sample * 2 * channels_;
    return {means, means + channels_};
  }

  // Of a channel over the batch, whose samples have so many pixels each; in the samples' order.
  Moments merged(int64_t channel, int64_t pixels) const {
    double mean = 0, squares = 0;
    for (int64_t s = 0; s < batch_; ++s) mean += values_[s * 2 * channels_ + channel];
    mean /= double(batch_);
    for (int64_t s = 0; s < batch_; ++s) {
      const double distance = values_[s * 2 * channels_ + channel] - mean;
      squares += values_[(s * 2 + 1) * channels_ + channel] + double(pixels) * distance * distance;
    }
    // Rounding may leave less than nothing. In this form a NaN stays NaN.
    return {mean, squares < 0 ? 0.0 : squares / double(batch_ * pixels)};
  }

 private:
  int64_t batch_ = 0, channels_ = 0;
  std::vector<double> values_;  // [batch, two, channels]
};

}  // namespace
}  // namespace PATHNET_ISA_NAMESPACE
}  // namespace pathnet::cpu
