#include "judge.h"

#include <algorithm>
#include <cmath>

#include "report.h"

namespace trial {
namespace {

// Rounding of a walk of float32 precision, some dozen times over.
constexpr double kFloat32 = 1e-4;
// bf16 has 8 bits: each number is off by up to 2^-9, a gradient as a vector by some of that for each convolution.
constexpr double kBfloat16 = 5e-2;
// Where terms cancel, the result is as far off as the plain loop is in the same precision; by luck that may be less.
constexpr double kCancelled = 16;

double norm_of(const double* values, size_t size) {
  double sum = 0;
  for (size_t i = 0; i < size; ++i) sum += values[i] * values[i];
  return std::sqrt(sum);
}

}  // namespace

void Judge::admit(int bits) {
  tolerance_ = bits == kBf16Bits ? kBfloat16 : kFloat32;
  // A plain loop of shorter numbers is as much farther off.
  cancelled_ = std::ldexp(kCancelled, kFloat32Bits - bits);
}

void Judge::compare(Counts& counts, const std::string& which, const Truth& truth, size_t begin, size_t size,
                    const std::function<double(size_t)>& value) const {
  double error = 0, rounding = 0;
  for (size_t i = 0; i < size; ++i) {
    error += std::pow(value(i) - truth.values[begin + i], 2);
    rounding += std::pow(double(truth.rounded[begin + i]) - truth.values[begin + i], 2);
  }
  error = std::sqrt(error);
  const double norm = norm_of(truth.values.data() + begin, size);
  const double allowed = tolerance_ * norm + cancelled_ * std::sqrt(rounding);
  // A NaN is not allowed either.
  if (!(error <= allowed)) {
    fail(text("%s: error %.2e, %.2e allowed, norm %.2e", which.c_str(), error, allowed, norm));
  }
  if (norm > 0) counts.worst = std::max(counts.worst, error / norm);
}

void Judge::gradients(Counts& counts, const Gradients& gradients, const std::vector<Truth>& truths,
                      bool together) const {
  const size_t size = trial_.y0.size() / trial_.batch;
  for (int64_t r = 0; r < int64_t(truths.size()); ++r) {
    // Relative to that of the gradient that the walk starts from.
    const auto exponent_at = [&](int64_t s) {
      return gradients.exponents[together ? r : r * trial_.batch + s] - trial_.exponent[together ? 0 : s];
    };
    const auto judge = [&](int64_t first, int64_t last) {
      const std::string which = text("result %d, samples %d to %d", int(r), int(first), int(last - 1));
      compare(counts, which, truths[r], first * size, (last - first) * size, [&](size_t i) {
        return std::ldexp(double(gradients.values[(r * trial_.batch + first) * size + i]),
                          exponent_at(first + int64_t(i / size)));
      });
    };
    if (together) judge(0, trial_.batch);
    for (int64_t s = 0; s < trial_.batch; ++s) {
      if (!together) judge(s, s + 1);
      norms(gradients, r, s, exponent_at(s) + trial_.exponent[together ? 0 : s]);
    }
  }
}

void Judge::norms(const Gradients& gradients, int64_t result, int64_t sample, int32_t exponent) const {
  const size_t size = trial_.y0.size() / trial_.batch;
  const int64_t row = result * trial_.batch + sample;
  std::vector<double> values(size);
  for (size_t i = 0; i < size; ++i) values[i] = gradients.values[row * size + i];
  const double norm = std::ldexp(gradients.norms[row], -exponent), expected = norm_of(values.data(), size);
  if (!(std::fabs(norm - expected) <= 1e-9 * norm)) {
    fail(
        text("result %d, sample %d: norm %.9e of a gradient of norm %.9e", int(result), int(sample), norm, expected));
  }
}

void Judge::outputs(Counts& counts, const Exact<float>& output, const std::vector<Truth>& truths,
                    bool together) const {
  const size_t size = trial_.grad.size() / trial_.batch;
  const int64_t samples = together ? trial_.batch : 1;
  for (size_t r = 0; r < truths.size(); ++r) {
    for (int64_t s = 0; s < trial_.batch; s += samples) {
      compare(counts, text("routing %d, sample %d", int(r), int(s)), truths[r], s * size, samples * size,
              [&](size_t i) { return double(output[(r * trial_.batch + s) * size + i]); });
    }
  }
}

void Judge::bits(const Exact<uint8_t>& relu_bits, const StraightTruth& truth) const {
  std::vector<double> sizes;
  for (const std::vector<double>& values : truth.exact.before_relu) {
    sizes.push_back(norm_of(values.data(), values.size()) / std::sqrt(double(values.size())));
  }
  std::vector<uint8_t> left(relu_bits.data(), relu_bits.data() + relu_bits.size());
  each_bit(trial_, [&](size_t u, size_t i, size_t byte, int bit) {
    const double value = truth.exact.before_relu[u][i];
    const double rounding = std::fabs(double(truth.rounded.before_relu[u][i]) - value);
    left[byte] &= uint8_t(~bit);
    if (((relu_bits[byte] & bit) != 0) == (value > 0)) return;
    if (!(std::fabs(value) <= kFloat32 * sizes[u] + kCancelled * rounding)) {
      fail(text("ReLU bit %d of unit %d: %d for %.3e", int(i), int(u), value <= 0, value));
    }
  });
  for (uint8_t byte : left) {
    if (byte != 0) fail("ReLU bits beyond the channels");
  }
}

void Judge::record(Counts& counts, const Record& record, const Planes& normalized, const StraightTruth& truth) const {
  bits(record.relu_bits, truth);
  for (size_t u = 0; u < normalized.size(); ++u) {
    compare(counts, text("normalized inputs of unit %d", int(u)),
            {truth.exact.normalized[u], truth.rounded.normalized[u]}, 0, normalized[u].size(),
            [&](size_t i) { return double(normalized[u][i]); });
  }
  compare(counts, "scales", {truth.exact.scales, truth.rounded.scales}, 0, record.scales.size(),
          [&](size_t i) { return double(record.scales[i]); });
}

}  // namespace trial
