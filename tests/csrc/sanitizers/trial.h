// A random network with a batch and routings: the input of both the kernels and the plain loops.
#pragma once

#include <cstdint>
#include <vector>

#include "plan.h"

namespace trial {

struct Trial {
  std::vector<pathnet::Block> blocks;
  std::vector<pathnet::Unit> units;
  std::vector<float> weights, scales, shifts, epsilons;
  std::vector<float> biases;  // of the units' convolutions; empty for none
  bool behind_relu;           // whether skips start after their blocks' first ReLUs
  bool closed;                // whether blocks are closed, for BN mode `batch` alone
  int64_t batch, routings, bits_stride;
  std::vector<float> routing;                   // [routings][blocks][2]
  std::vector<float> y0, grad;                  // [batch][channels][height][width]
  std::vector<int32_t> exponent;                // [batch]
  std::vector<std::vector<uint8_t>> relu_mask;  // of each unit [batch][channels][height][width], for backward passes
};

// The trial of a seed, on every machine.
Trial make_trial(uint64_t seed);

}  // namespace trial
