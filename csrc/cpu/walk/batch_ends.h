// The two ends of a backward pass in BN mode `batch`: the gradient that it starts from, and its results.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "gradient_finisher.h"

namespace pathnet::cpu {
namespace PATHNET_ISA_NAMESPACE {
namespace {

// The results [first, last), which have one gradient.
struct SharedResult {
  int64_t first, last;
  SharedGradient gradient;
};

template <class Convolver>
class BatchEnds {
 public:
  BatchEnds(BackwardContext<Convolver>& context, GradientFinisher<Convolver>& finisher)
      : context_(context), finisher_(finisher) {}

  SharedGradient start() {
    const BackwardBatchWalk& walk = context_.walk;
    const Image end = without_border(context_.network.ends.back());
    const SharedGradient start = std::make_shared<BatchGradient>();
    start->values = context_.pool.get();
    start->exponent = walk.exponent;
    start->block = walk.plan.block_count;
    start->largest.resize(walk.batch);
    context_.for_each(1, [&](int, int64_t s, int64_t) {
      float* values = start->values.get() + s * end.dense();
      std::fill_n(values, end.dense(), 0.0f);
      from_planes(end, walk.grad + s * end.channels * end.height * end.width, values);
      start->largest[s] = largest_in(values, end.dense());
    });
    finisher_.conclude(*start);
    return start;
  }

  // Writes norms and gradients; place(position) is the row of a result.
  template <class Place>
  void write(const std::vector<SharedResult>& results, const Place& place) {
    const BackwardBatchWalk& walk = context_.walk;
    const Image image = without_border(context_.network.ends[0]);
    const int64_t size = image.channels * image.height * image.width;
    std::vector<SharedGradient> gradients;
    for (const SharedResult& result : results) gradients.push_back(result.gradient);
    finisher_.finish_all(gradients);
    context_.for_each(int64_t(results.size()), [&](int, int64_t s, int64_t r) {
      const BatchGradient& gradient = *results[r].gradient;
      const float* values = gradient.values.get() + s * image.dense();
      const double norm = std::ldexp(std::sqrt(sum_of_squares(image, values)), gradient.exponent);
      for (int64_t p = results[r].first; p < results[r].last; ++p) {
        const int64_t row = place(p) * walk.batch + s;
        walk.norms[row] = norm;
        if (walk.grad_input) to_planes(image, values, walk.grad_input + row * size);
      }
    });
    if (walk.exponent_input == nullptr) return;
    for (const SharedResult& result : results) {
      for (int64_t p = result.first; p < result.last; ++p) {
        walk.exponent_input[place(p)] = result.gradient->exponent;
      }
    }
  }

 private:
  BackwardContext<Convolver>& context_;
  GradientFinisher<Convolver>& finisher_;
};

}  // namespace
}  // namespace PATHNET_ISA_NAMESPACE
}  // namespace pathnet::cpu
