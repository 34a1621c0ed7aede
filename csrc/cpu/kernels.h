// The kernels of one instruction set. They know pointers and sizes, and nothing of torch.
#pragma once

#include <cstdint>
#include <functional>

#include "../plan.h"
#include "isa/isa.h"
#include "training.h"

namespace pathnet::cpu {

// The threads of a pass.
struct Team {
  int threads;
  // Calls a function once on each thread, with the thread's number, and returns when all have returned. Rethrows what
  // one of them throws.
  std::function<void(const std::function<void(int)>&)> run;
  // Each thread calls it before every step of a pass, milliseconds apart at ordinary sizes. It throws to end the
  // pass, whose results are then incomplete.
  std::function<void()> check;
};

enum class Direction { kBackward, kForward };

// The passes of BN mode `running`, where samples are independent. Routings that agree on the first blocks of a pass
// share that part of it.
struct BackwardRunningWalk {
  Plan plan;
  const uint8_t* packed;    // the weights as `pack` writes them, BN's factors folded in
  const float* grad;        // [batch, y_n]
  const int32_t* exponent;  // [batch]
  const float* routing;     // [routings, blocks, 2]
  int64_t batch, routings;
  double* norms;            // [routings, batch]
  float* grad_input;        // [routings, batch, y_0]; null for norms alone
  int32_t* exponent_input;  // [routings, batch]; null with grad_input
};

struct ForwardRunningWalk {
  Plan plan;
  const uint8_t* packed;
  const float* shifts;  // of BN, whose factors are plan.scales
  const float* biases;  // of the convolutions, unit after unit: those of a module's last one and of projections are
                        // added to their sums; the others are part of shifts; null for none
  const float* y0;      // [batch, y_0]
  const float* routing;
  int64_t batch, routings;
  float* output;       // [routings, batch, y_n]
  uint8_t* relu_bits;  // [batch, plan.bits_stride]; null for none
};

// The passes of BN mode `batch`: each BN uses the statistics of the whole batch, through which gradients flow too.
struct BackwardBatchWalk {
  Plan plan;                // scales: those of this batch, weight / deviation
  const uint8_t* packed;    // BN's factors left out
  const float* normalized;  // the normalised inputs before weight and bias, as ForwardBatchWalk records them
  const float* grad;
  int32_t exponent;
  const float* routing;
  int64_t batch, routings;
  double* norms;
  float* grad_input;
  int32_t* exponent_input;  // [routings]
};

struct ForwardBatchWalk {
  Plan plan;  // scales: BN's weights
  const uint8_t* packed;
  const float* shifts;    // BN's biases
  const float* epsilons;  // [units], added to the variance
  const float* y0;
  const float* routing;
  int64_t batch, routings;
  float* output;
  // The record, with one routing; null without a record.
  uint8_t* relu_bits;
  float* normalized;  // unit after unit [batch, height, width, padded channels]
  float* scales;      // weight / deviation, in the order of plan.scales
};

// Elements of ForwardBatchWalk::normalized.
int64_t normalized_size(const Plan& plan, int64_t batch);

// One instruction set's kernels for one precision.
struct Kernels {
  // Bytes that `pack` writes for the whole plan. Its check is a team's.
  int64_t (*packed_size)(const Plan&, Direction);
  void (*pack)(const Plan&, Direction, bool fold_scales, uint8_t*, const std::function<void()>& check);
  void (*backward_running)(const BackwardRunningWalk&, const Team&);
  // Takes one routing. The kernels `sums_by_length_*` compute the coefficients by powers of x of the product of
  // a * skip^T + x * c * module^T over the blocks: blocks + 1 results, where other passes have one per routing.
  void (*sums_by_length_running)(const BackwardRunningWalk&, const Team&);
  void (*forward_running)(const ForwardRunningWalk&, const Team&);
  void (*backward_batch)(const BackwardBatchWalk&, const Team&);
  void (*sums_by_length_batch)(const BackwardBatchWalk&, const Team&);
  void (*forward_batch)(const ForwardBatchWalk&, const Team&);
  // Those for bf16 take batches of bf16 numbers, the others float32.
  void (*train_forward)(const TrainingForward&, const Team&);
  void (*train_backward)(const TrainingBackward&, const Team&);
};

// bf16: whether backward passes may round to it; forward passes along paths always have float32 precision.
#define PATHNET_DECLARE_KERNELS(isa) \
  namespace isa {                    \
  Kernels kernels(bool bf16);        \
  }
PATHNET_DECLARE_KERNELS(base)
PATHNET_DECLARE_KERNELS(avx2)
PATHNET_DECLARE_KERNELS(avx512)
PATHNET_DECLARE_KERNELS(avx512bf16)
PATHNET_DECLARE_KERNELS(amx)
#undef PATHNET_DECLARE_KERNELS

Kernels kernels_of(Isa isa, bool bf16);

}  // namespace pathnet::cpu
