#pragma once

#include <cstdint>

#include "../plan.h"

namespace pathnet {

// The gradient that every walk starts from, the routings, and where the results go.
struct RoutedBackward {
  Plan plan;
  const float* packed_weights;  // as pack_weights lays them out
  const float* grad;            // [batch, size of the last block's output]
  const int32_t* exponent;      // [batch]
  const float* routing;         // [routings, blocks, 2]
  int64_t batch, routings;
  float* grad_input;        // [routings, batch, size of the first block's input]
  int32_t* exponent_input;  // [routings, batch]
};

// One instruction set's form of the kernel.
struct RoutedBackwardKernel {
  // Elements that pack_weights writes for the whole plan.
  int64_t (*packed_size)(const Plan&);
  void (*pack_weights)(const Plan&, float*);
  // Items [begin, end) of the batch * routings walks, sample by sample, so that a thread's even share of the items
  // is one of the work: paths of one call differ in length. Each item is independent of all others.
  void (*walk)(const RoutedBackward&, int64_t begin, int64_t end);
};

namespace base {
RoutedBackwardKernel routed_backward_kernel();
}
namespace avx2 {
RoutedBackwardKernel routed_backward_kernel();
}
namespace avx512 {
RoutedBackwardKernel routed_backward_kernel();
}

}  // namespace pathnet
