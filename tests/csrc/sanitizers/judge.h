// Judges the results of one network's walks by plain loops.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "layouts.h"
#include "trial.h"
#include "truth.h"

namespace trial {

// Walks of one kind.
struct Counts {
  int walks = 0;
  double worst = 0;  // largest error relative to the norm, where the norm is the judge
};

// The results of a backward pass.
struct Gradients {
  Exact<float> values;
  Exact<int32_t> exponents;
  Exact<double> norms;

  bool operator==(const Gradients& other) const {
    return values == other.values && exponents == other.exponents && norms == other.norms;
  }
};

// The record of a forward pass in BN mode `batch`.
struct Record {
  Exact<uint8_t> relu_bits;
  Exact<float> normalized, scales;

  bool operator==(const Record& other) const {
    return relu_bits == other.relu_bits && normalized == other.normalized && scales == other.scales;
  }
};

// A result in double, and the loops' result in float32.
struct Truth {
  std::vector<double> values;
  std::vector<float> rounded;
};

// The network itself, all coefficients 1, with the numbers that pass through it.
struct StraightTruth {
  Truth output;
  Passed<double> exact;
  Passed<float> rounded;
};

// The truth under one routing: the loops called with a zero of type double, and again with one of float.
template <class Walk>
Truth truth_of(const Walk& walk, const float* routing) {
  return {walk(double(), routing), walk(float(), routing)};
}

// The truth under each of the trial's routings.
template <class Walk>
std::vector<Truth> truths_of(const Trial& trial, const Walk& walk) {
  std::vector<Truth> truths;
  for (int64_t r = 0; r < trial.routings; ++r) {
    truths.push_back(truth_of(walk, trial.routing.data() + r * int64_t(trial.blocks.size()) * 2));
  }
  return truths;
}

// For each length the sum over its paths, each walked by itself; the factors are those of the first routing.
template <class Walk>
std::vector<Truth> truths_by_length(const Trial& trial, const Walk& walk) {
  const int64_t blocks = int64_t(trial.blocks.size());
  std::vector<Truth> sums(blocks + 1,
                          Truth{std::vector<double>(trial.y0.size()), std::vector<float>(trial.y0.size())});
  for (int64_t code = 0; code < int64_t(1) << blocks; ++code) {
    std::vector<float> path(trial.routing.begin(), trial.routing.begin() + blocks * 2);
    int64_t length = 0;
    for (int64_t b = 0; b < blocks; ++b) {
      const bool through = code >> b & 1;
      path[2 * b + !through] = 0.0f;
      length += through;
    }
    const Truth truth = truth_of(walk, path.data());
    for (size_t i = 0; i < truth.values.size(); ++i) {
      sums[length].values[i] += truth.values[i];
      sums[length].rounded[i] += truth.rounded[i];
    }
  }
  return sums;
}

constexpr int kFloat32Bits = 24, kBf16Bits = 8;

class Judge {
 public:
  explicit Judge(const Trial& trial) : trial_(trial) {}

  // Admits the errors of products of numbers with so many bits: kFloat32Bits, kBf16Bits, or between them.
  void admit(int bits);

  // `together`: whether a batch's samples have one exponent, and are tied together by its statistics.
  void gradients(Counts& counts, const Gradients& gradients, const std::vector<Truth>& truths, bool together) const;
  void outputs(Counts& counts, const Exact<float>& output, const std::vector<Truth>& truths, bool together) const;
  // A bit may differ only where its number is zero but for rounding. Beyond the channels all are zero.
  void bits(const Exact<uint8_t>& relu_bits, const StraightTruth& truth) const;
  void record(Counts& counts, const Record& record, const Planes& normalized, const StraightTruth& truth) const;

 private:
  // Compares values [begin, begin + size) of a truth with value(0), value(1), ...
  void compare(Counts& counts, const std::string& which, const Truth& truth, size_t begin, size_t size,
               const std::function<double(size_t)>& value) const;
  void norms(const Gradients& gradients, int64_t result, int64_t sample, int32_t exponent) const;

  const Trial& trial_;
  double tolerance_ = 0, cancelled_ = 0;
};

}  // namespace trial
