// A random residual block with a batch: the input of both the training kernels and the plain loops. Images are
// [batch][height][width][channels].
#pragma once

#include <cstdint>
#include <vector>

#include "plan.h"

namespace trial {

struct TrainingBlock {
  pathnet::Block row;
  std::vector<pathnet::Unit> units;  // of the module, then the projection
  std::vector<std::vector<float>> weights;
  // Of each unit of the module. `means` and `variances` are the running ones, unused with batch statistics.
  std::vector<std::vector<float>> gains, biases, means, variances;
  std::vector<double> epsilons;
  bool running;
  float a, c;
  int64_t batch, widest;
  std::vector<float> x, grad;
  // The input of the backward pass, as if a forward pass had left it: the inputs of the units, with the first one's
  // x, and the statistics of each, [two][channels]. No ReLU has an input near zero, so each has one right bit.
  std::vector<std::vector<float>> inputs, statistics;

  int64_t count() const { return int64_t(epsilons.size()); }
  bool projects() const { return units.size() > epsilons.size(); }
};

// The block of a seed, on every machine; with bf16, all images are made of such numbers.
TrainingBlock make_training_block(uint64_t seed, bool bf16);

// Rounded to the nearest bf16 number, to even.
float rounded_to_bf16(float value);

}  // namespace trial
