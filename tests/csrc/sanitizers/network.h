// One random network: its arguments in memory that a sanitizer watches, and its walks by one set of kernels.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "cpu/kernels.h"
#include "judge.h"

namespace trial {

// The kinds of walks that are counted, by the names of the kernels.
enum Kind { kBackwardRunning, kSumsRunning, kForwardRunning, kBackwardBatch, kSumsBatch, kForwardBatch, kKinds };
using AllCounts = Counts[kKinds];

class Network {
 public:
  Network(uint64_t seed, AllCounts& counts);

  // Judges every walk whose code differs from that of `tried`, which may be null.
  void try_kernels(pathnet::cpu::Isa isa, bool bf16, const pathnet::cpu::Kernels* tried);

 private:
  int64_t blocks() const { return int64_t(trial_.blocks.size()); }
  int several() const { return 2 + int(seed_ % 3); }
  pathnet::Plan plan(const float* scales, const uint8_t* relu_bits) const;
  Gradients blank(int64_t results, int64_t exponents) const;

  void backward_running(const std::string& name);
  void sums_running(const std::string& name);
  void forward_running(const std::string& name);
  void batch_walks(const std::string& prefix, int bits);
  Record forward_batch(const std::string& name);
  void backward_batch(const std::string& prefix, const Record& record);
  StraightTruth& straight_truth(bool batch_statistics);

  // Runs a walk on one thread and on several, which must agree bit by bit. Returns the result of one.
  template <class Result>
  Result on_threads(Counts& counts, const std::string& name,
                    const std::function<Result(const pathnet::cpu::Team&)>& walk);
  // Runs a backward pass, and again without gradients, whose norms are the same.
  template <class Walk>
  Gradients walked_back(const pathnet::cpu::Team& team, Walk walk,
                        void (*kernel)(const Walk&, const pathnet::cpu::Team&), Gradients gradients);

  const uint64_t seed_;
  AllCounts& counts_;
  const Trial trial_;
  Judge judge_;
  const bool shifted_;
  const Exact<pathnet::Block> blocks_;
  const Exact<pathnet::Unit> units_;
  const Exact<float> weights_, scales_, shifts_, epsilons_, biases_, routing_, straight_, y0_, grad_;
  const Exact<int32_t> exponent_;
  const Exact<uint8_t> relu_bits_;
  pathnet::cpu::Kernels kernels_;
  // Truths that every set of kernels shares, computed by the first.
  std::vector<Truth> backward_, sums_, forward_, batch_forward_;
  std::unique_ptr<StraightTruth> straight_truths_[2];
};

}  // namespace trial
