// One residual block in training: its forward pass, and the gradients of its input and parameters. Knows pointers and
// sizes, and nothing of torch.
#pragma once

#include <cstdint>
#include <vector>

#include "../plan.h"

namespace pathnet::cpu {

// A BN as a pass takes it: [channels] each. Without mean and variance it uses the batch's statistics.
struct NormParameters {
  const float *gain, *bias;
  const float *mean, *variance;  // null for the batch's
  double epsilon;
};

// a * skip(x) + c * residual(x) of one block of BN-ReLU-convolution units, of a batch of images [height, width,
// channels] whose numbers are float32 or, with bf16, bf16. c is not 0.
struct TrainingBlock {
  Plan plan;                          // one block; without weights and scales
  std::vector<const float*> weights;  // of the units' convolutions, then the projection's
  std::vector<NormParameters> norms;  // of the units
  float a, c;
  int64_t batch;
  int64_t widest;  // channels in a row of statistics
  bool bf16;

  bool by_batch() const { return norms[0].mean == nullptr; }
  int64_t units() const { return int64_t(norms.size()); }
  bool projects() const { return weights.size() > norms.size(); }
  int64_t input_size(int64_t unit) const {
    const Unit& row = plan.units[unit];
    return batch * row.in_height * row.in_width * row.in_channels;
  }
  // Elements before unit u's among the inner inputs, which are those of units 1 on, back to back.
  int64_t inner_start(int64_t unit) const {
    int64_t start = 0;
    for (int64_t u = 1; u < unit; ++u) start += input_size(u);
    return start;
  }
};

struct TrainingForward {
  TrainingBlock block;
  const void* x;
  void* output;
  void* inner;        // the inputs of units 1 on, before BN
  float* statistics;  // [units, 2, widest]: mean and biased variance that each BN used; set to zero beforehand
};

struct TrainingBackward {
  TrainingBlock block;
  const void *grad, *x, *inner;
  const float* statistics;
  void* x_grad;
  std::vector<float*> weight_grads;            // in the order of the weights
  std::vector<float*> gain_grads, bias_grads;  // of the units
};

}  // namespace pathnet::cpu
