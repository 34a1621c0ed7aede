// What the kernels of one instruction set offer. They know pointers and sizes, no torch.
#pragma once

#include <cstdint>
#include <functional>

#include "../plan.h"
#include "isa/isa.h"

namespace pathnet::cpu {

// The threads of a walk.
struct Team {
  int threads;
  // Calls a function once on each of them, with the thread's number, and returns when all are through. What one
  // throws is thrown again.
  std::function<void(const std::function<void(int)>&)> run;
  // Each thread calls it before every step of a walk, milliseconds apart at ordinary sizes. It throws where the walk
  // is to end, which has then written a part of its results.
  std::function<void()> check;
};

enum class Direction { kBackward, kForward };

// The walks of BN mode `running`, where samples are independent. Routings whose blocks agree from the walk's
// beginning on share that part of it.
struct BackwardRunningWalk {
  Plan plan;
  const uint8_t* packed;    // as pack lays them out, BN's factors folded in
  const float* grad;        // [batch, y_n]
  const int32_t* exponent;  // [batch]
  const float* routing;     // [routings, blocks, 2]
  int64_t batch, routings;
  double* norms;            // [routings, batch]
  float* grad_input;        // [routings, batch, y_0]; null where only the norms are wanted
  int32_t* exponent_input;  // [routings, batch]; null with grad_input
};

// `sums_by_length` takes a walk of one routing and gives its coefficients by powers of x of the product of
// a * skip^T + x * c * module^T: there are blocks + 1 results, where walks of routings have as many as routings.

struct ForwardRunningWalk {
  Plan plan;
  const uint8_t* packed;
  const float* shifts;  // what BN adds, as plan.scales is what it multiplies by
  const float* biases;  // of the convolutions, unit after unit: those of a module's last one and of projections are
                        // added to what they sum up, others belong into shifts; null for none
  const float* y0;      // [batch, y_0]
  const float* routing;
  int64_t batch, routings;
  float* output;       // [routings, batch, y_n]
  uint8_t* relu_bits;  // [batch, plan.bits_stride]; null where they are not wanted
};

// The walks of BN mode `batch`: each BN takes the statistics of the whole batch, and gives its gradient back to them.
struct BackwardBatchWalk {
  Plan plan;                // scales: those of this batch, weight / deviation
  const uint8_t* packed;    // BN's factors left out
  const float* normalized;  // what BN made of its inputs before weight and bias, as ForwardBatchWalk writes it
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
  const float* epsilons;  // [units]; one a BN
  const float* y0;
  const float* routing;
  int64_t batch, routings;
  float* output;
  // Of one routing, where the walk is recorded; null otherwise.
  uint8_t* relu_bits;
  float* normalized;  // unit after unit [batch, height, width, padded channels]
  float* scales;      // weight / deviation, as plan.scales lies
};

// Elements of ForwardBatchWalk::normalized.
int64_t normalized_size(const Plan& plan, int64_t batch);

// One instruction set's kernels for one precision.
struct Kernels {
  // Bytes that `pack` writes for the whole plan. Its check is a team's.
  int64_t (*packed_size)(const Plan&, Direction);
  void (*pack)(const Plan&, Direction, bool fold_scales, uint8_t*, const std::function<void()>& check);
  void (*backward_running)(const BackwardRunningWalk&, const Team&);
  void (*sums_by_length_running)(const BackwardRunningWalk&, const Team&);
  void (*forward_running)(const ForwardRunningWalk&, const Team&);
  void (*backward_batch)(const BackwardBatchWalk&, const Team&);
  void (*sums_by_length_batch)(const BackwardBatchWalk&, const Team&);
  void (*forward_batch)(const ForwardBatchWalk&, const Team&);
};

// bf16 is what the walk back may round to; walks forward are always of float32 precision.
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
