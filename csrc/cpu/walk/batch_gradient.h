// The gradient of a whole batch at one block, BN mode `batch`, and its memory.
#pragma once

#include <memory>
#include <vector>

#include "../isa/vector.h"
#include "../large.h"

namespace pathnet::cpu {
namespace PATHNET_ISA_NAMESPACE {
namespace {

using Batch = std::shared_ptr<float>;

// Memory for whole batches, each of `size` floats. It is recycled, since fresh memory costs as much as a convolution;
// so the pool must outlive its batches.
class BatchPool {
 public:
  explicit BatchPool(int64_t size) : size_(size) {}
  BatchPool(const BatchPool&) = delete;

  Batch get() {
    if (free_.empty()) {
      stock_.push_back(make_large(size_));
      free_.push_back(stock_.back().get());
    }
    float* batch = free_.back();
    free_.pop_back();
    return Batch(batch, [this](float* values) { free_.push_back(values); });
  }

 private:
  const int64_t size_;
  std::vector<Large> stock_;
  std::vector<float*> free_;
};

// The batch's gradient at a block's input. Completed lazily: the first reader of a sample computes it from its parts,
// which are known with the block's last sums, while the sample is in cache anyway.
struct BatchGradient {
  Batch values;
  int32_t exponent;
  std::vector<float> largest;  // of each sample
  bool zero = false;           // known once it is finished
  // Before it is finished: values = a * skip(skip_from) + c * (the gradient through BN, of h and its sums), h of
  // `from`.
  bool finished = false;
  int64_t block = 0;  // whose input it is at
  std::shared_ptr<BatchGradient> from, skip_from;
  float a = 0.0f, c = 0.0f;
  Batch h, h_next;
  std::vector<float> sums;        // [sample][two][channels]
  std::vector<float> means;       // [two][channels]: sum(h) / N and sum(h x) / N
  std::vector<float> skip_means;  // likewise of the BN after a projection, whose h is the gradient itself
};
using SharedGradient = std::shared_ptr<BatchGradient>;

}  // namespace
}  // namespace PATHNET_ISA_NAMESPACE
}  // namespace pathnet::cpu
