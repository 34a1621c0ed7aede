// The expected results of the training kernels, by plain loops in double that share no code with them: everything is
// [batch][height][width][channels], and each convolution is its definition.
//
// Next to its value each number has a variance: that of its rounding error, to first order, if every product is
// rounded by itself with a deviation of 1. So results that cancel are known by what they are made of.
#pragma once

#include <vector>

#include "training_block.h"

namespace trial {

struct Uncertain {
  double value = 0, variance = 0;

  Uncertain& operator+=(const Uncertain& other) {
    value += other.value;
    variance += other.variance;
    return *this;
  }
  Uncertain operator*(const Uncertain& other) const {
    const double product = value * other.value;
    return {product, variance * other.value * other.value + other.variance * value * value + product * product};
  }
};
using Uncertains = std::vector<Uncertain>;

using Images = std::vector<std::vector<float>>;

// What unit u of the module makes, before it is stored: the input of the next unit, or the block's output. inputs: of
// the units, as they are stored; statistics: of their BNs, [two][channels].
Uncertains unit_forward(const TrainingBlock& block, int64_t u, const Images& inputs, const Images& statistics);

// Mean and biased variance of each channel, [two][channels].
Uncertains statistics_of(const std::vector<float>& input, int64_t channels);

struct TrainingGradients {
  Uncertains x;
  std::vector<Uncertains> weights, gains, biases;
};

// From the block's inputs and statistics for the backward pass.
TrainingGradients backward(const TrainingBlock& block);

}  // namespace trial
