// The expected results of the passes, by plain loops that share no code with the kernels: everything is
// [batch][channels] [height][width], and each convolution is its definition. In double it is the truth; in float32 it
// says how much of a walk's error the network itself causes, where terms cancel.
#pragma once

#include <vector>

#include "trial.h"

namespace trial {

// The normalised inputs of each unit before weight and bias (BN mode `batch`), and the input of its ReLU.
template <class Real>
struct Passed {
  std::vector<std::vector<Real>> normalized, before_relu;
  std::vector<Real> scales;  // weight / deviation (BN mode `batch`)
};

// `passed` may be null.
template <class Real>
std::vector<Real> forward(const Trial& trial, const float* routing, bool batch_statistics, Passed<Real>* passed);

// With scales alone BN is an affine map; with normalised inputs gradients flow to its statistics too.
template <class Real>
std::vector<Real> backward(const Trial& trial, const float* routing, const std::vector<std::vector<uint8_t>>& masks,
                           const std::vector<float>& scales, const std::vector<std::vector<float>>* normalized);

}  // namespace trial
