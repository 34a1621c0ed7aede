// One random residual block in training: its arguments in memory that a sanitizer watches, and its passes by one set
// of kernels, judged by plain loops.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "cpu/kernels.h"
#include "memory.h"
#include "training_truth.h"

namespace trial {

enum Pass { kTrainForward, kTrainBackward, kTrainForwardBf16, kTrainBackwardBf16, kPasses };

// Passes of one kind.
struct PassCounts {
  int passes = 0;
  double worst = 0;  // largest error, relative to the allowed one
};
using AllPassCounts = PassCounts[kPasses];

// Numbers of a batch as the kernels store them.
class Stored {
 public:
  Stored(const std::vector<float>& values, bool bf16, bool shifted);
  Stored(size_t size, bool bf16, bool shifted);

  void* data() { return bf16_ ? static_cast<void*>(halves_.data()) : floats_.data(); }
  const void* data() const { return bf16_ ? static_cast<const void*>(halves_.data()) : floats_.data(); }
  std::vector<float> values() const;
  bool operator==(const Stored& other) const { return floats_ == other.floats_ && halves_ == other.halves_; }

 private:
  bool bf16_;
  Exact<float> floats_;
  Exact<uint16_t> halves_;
};

class Training {
 public:
  Training(uint64_t seed, bool bf16, AllPassCounts& counts);

  void try_kernels(pathnet::cpu::Isa isa);

 private:
  struct Forward {
    Stored output, inner;
    Exact<float> statistics;
    bool operator==(const Forward& other) const {
      return output == other.output && inner == other.inner && statistics == other.statistics;
    }
  };
  struct Backward {
    Stored x;
    std::vector<Exact<float>> weights, gains, biases;
    bool operator==(const Backward& other) const {
      return x == other.x && weights == other.weights && gains == other.gains && biases == other.biases;
    }
  };

  void forward(const std::string& name);
  void backward(const std::string& name);
  int several() const { return 2 + int(seed_ % 3); }
  Exact<float> rows_of(const Images& statistics) const;
  // Runs a pass on one thread and on several, which must agree bit by bit. Returns the result of one.
  template <class Result>
  Result on_threads(PassCounts& counts, const std::string& name,
                    const std::function<Result(const pathnet::cpu::Team&)>& pass);
  void compare(PassCounts& counts, const std::string& which, const std::vector<float>& values,
               const Uncertains& truth, double rounding) const;

  const uint64_t seed_;
  const bool bf16_, shifted_;
  AllPassCounts& counts_;
  const TrainingBlock trial_;
  const Exact<pathnet::Block> row_;
  const Exact<pathnet::Unit> units_;
  std::vector<Exact<float>> parameters_;  // that block_ points to
  pathnet::cpu::TrainingBlock block_;
  const Stored x_, grad_, inner_;
  const Exact<float> statistics_;
  pathnet::cpu::Kernels kernels_;
  double rounding_ = 0;                           // of theirs
  std::unique_ptr<TrainingGradients> gradients_;  // shared by every set of kernels
};

}  // namespace trial
