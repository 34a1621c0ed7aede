#include "training.h"

#include <cmath>
#include <cstring>

#include "report.h"
#include "teams.h"

namespace trial {

using namespace pathnet;
using namespace pathnet::cpu;

namespace {

// Deviations of the rounding of one product: of Winograd's filtering in float32, whose transforms magnify it, and of
// bf16 numbers.
constexpr double kFloat32 = 1e-6, kBfloat16 = 0x1p-8;
// Statistics are summed in double.
constexpr double kStatistics = 1e-6;
// A tensor's error may be so many deviations; that of a few numbers is more a matter of luck, and what they sum over
// shares the rounding of weights.
constexpr double kAllowed = 1.5, kAllowedOfFew = 8;
constexpr size_t kFew = 64;

std::vector<float> joined(const Images& images, size_t first) {
  std::vector<float> all;
  for (size_t i = first; i < images.size(); ++i) all.insert(all.end(), images[i].begin(), images[i].end());
  return all;
}

std::vector<float> as_vector(const Exact<float>& values) {
  return std::vector<float>(values.data(), values.data() + values.size());
}

}  // namespace

Stored::Stored(const std::vector<float>& values, bool bf16, bool shifted) : Stored(values.size(), bf16, shifted) {
  for (size_t i = 0; i < values.size(); ++i) {
    if (bf16) {
      uint32_t bits;
      std::memcpy(&bits, &values[i], sizeof(bits));
      halves_.data()[i] = uint16_t(bits >> 16);
    } else {
      floats_.data()[i] = values[i];
    }
  }
}

// NaNs.
Stored::Stored(size_t size, bool bf16, bool shifted)
    : bf16_(bf16), floats_(bf16 ? 0 : size, shifted, kNan), halves_(bf16 ? size : 0, shifted, uint16_t(0xffff)) {}

std::vector<float> Stored::values() const {
  if (!bf16_) return as_vector(floats_);
  std::vector<float> values(halves_.size());
  for (size_t i = 0; i < values.size(); ++i) {
    const uint32_t bits = uint32_t(halves_[i]) << 16;
    std::memcpy(&values[i], &bits, sizeof(bits));
  }
  return values;
}

Training::Training(uint64_t seed, bool bf16, AllPassCounts& counts)
    : seed_(seed),
      bf16_(bf16),
      shifted_(seed % 2),
      counts_(counts),
      trial_(make_training_block(seed, bf16)),
      row_({trial_.row}, false),
      units_(trial_.units, false),
      x_(trial_.x, bf16, shifted_),
      grad_(trial_.grad, bf16, shifted_),
      inner_(joined(trial_.inputs, 1), bf16, shifted_),
      statistics_(rows_of(trial_.statistics)) {
  // Moving a block of memory leaves its address.
  const auto keep = [&](const std::vector<float>& values) {
    parameters_.emplace_back(values, shifted_);
    return static_cast<const float*>(parameters_.back().data());
  };
  block_.plan = {row_.data(), 1, units_.data(), int64_t(trial_.units.size()), nullptr, nullptr, nullptr, 0};
  for (const std::vector<float>& weights : trial_.weights) block_.weights.push_back(keep(weights));
  for (int64_t u = 0; u < trial_.count(); ++u) {
    block_.norms.push_back({keep(trial_.gains[u]), keep(trial_.biases[u]),
                            trial_.running ? keep(trial_.means[u]) : nullptr,
                            trial_.running ? keep(trial_.variances[u]) : nullptr, trial_.epsilons[u]});
  }
  block_.a = trial_.a;
  block_.c = trial_.c;
  block_.batch = trial_.batch;
  block_.widest = trial_.widest;
  block_.bf16 = bf16;
}

void Training::try_kernels(Isa isa) {
  kernels_ = kernels_of(isa, bf16_);
  rounding_ = bf16_ ? kBfloat16 : kFloat32;
  const std::string name = text("training seed %llu, %s %s ", static_cast<unsigned long long>(seed_), isa_name(isa),
                                bf16_ ? "bf16" : "float32");
  forward(name + "train_forward");
  backward(name + "train_backward");
}

// [units][two][widest], zeros beyond a unit's channels.
Exact<float> Training::rows_of(const Images& statistics) const {
  Exact<float> rows(statistics.size() * 2 * trial_.widest, shifted_, 0.0f);
  for (size_t u = 0; u < statistics.size(); ++u) {
    const size_t channels = statistics[u].size() / 2;
    for (size_t i = 0; i < statistics[u].size(); ++i) {
      rows.data()[(u * 2 + i / channels) * trial_.widest + i % channels] = statistics[u][i];
    }
  }
  return rows;
}

template <class Result>
Result Training::on_threads(PassCounts& counts, const std::string& name,
                            const std::function<Result(const Team&)>& pass) {
  const auto run = [&](int threads) {
    doing = name + text(", %d threads", threads);
    ++counts.passes;
    return pass(team_of(threads));
  };
  Result result = run(1);
  for (int64_t last_check : {int64_t(1), int64_t(2 + seed_ % 20)}) {
    doing = name + text(", %d threads that end at check %d", several(), int(last_check));
    try {
      pass(team_of(several(), last_check));
      if (last_check == 1) fail("the pass went on");
    } catch (const Ended&) {
    }
  }
  if (!(run(several()) == result)) fail("the result differs from that of one thread");
  doing = name;
  return result;
}

void Training::compare(PassCounts& counts, const std::string& which, const std::vector<float>& values,
                       const Uncertains& truth, double rounding) const {
  if (values.size() != truth.size()) fail(which + ": another size");
  double error = 0, norm = 0, variance = 0;
  for (size_t i = 0; i < truth.size(); ++i) {
    error += std::pow(double(values[i]) - truth[i].value, 2);
    norm += std::pow(truth[i].value, 2);
    variance += truth[i].variance;
  }
  const double deviation = rounding * (std::sqrt(norm) + std::sqrt(variance));
  // A NaN is not allowed either.
  const double allowed = deviation * (truth.size() < kFew ? kAllowedOfFew : kAllowed);
  if (!(std::sqrt(error) <= allowed)) {
    fail(text("%s: error %.2e, %.2e allowed, norm %.2e", which.c_str(), std::sqrt(error), allowed, std::sqrt(norm)));
  }
  if (allowed > 0) counts.worst = std::max(counts.worst, std::sqrt(error) / allowed);
}

void Training::forward(const std::string& name) {
  PassCounts& counts = counts_[bf16_ ? kTrainForwardBf16 : kTrainForward];
  const size_t inner = joined(trial_.inputs, 1).size();
  const Forward result = on_threads<Forward>(counts, name, [&](const Team& team) {
    Forward fresh = {{trial_.grad.size(), bf16_, shifted_},
                     {inner, bf16_, shifted_},
                     {trial_.statistics.size() * 2 * trial_.widest, shifted_, 0.0f}};
    const TrainingForward job = {block_, x_.data(), fresh.output.data(), fresh.inner.data(), fresh.statistics.data()};
    kernels_.train_forward(job, team);
    return fresh;
  });
  // Each unit is judged by what the kernels stored before it.
  Images inputs = {trial_.x}, statistics;
  const std::vector<float> all = result.inner.values();
  auto next = all.begin();
  for (int64_t u = 0; u < trial_.count(); ++u) {
    const int64_t channels = trial_.units[u].in_channels;
    if (u > 0) {
      const auto end = next + int64_t(trial_.inputs[u].size());
      inputs.emplace_back(next, end);
      next = end;
      compare(counts, text("input of unit %d", int(u)), inputs[u], unit_forward(trial_, u - 1, inputs, statistics),
              rounding_);
    }
    const float* row = result.statistics.data() + u * 2 * trial_.widest;
    statistics.emplace_back(row, row + channels);
    statistics[u].insert(statistics[u].end(), row + trial_.widest, row + trial_.widest + channels);
    for (int64_t i = 0; i < 2 * trial_.widest; ++i) {
      if (i % trial_.widest >= channels && row[i] != 0.0f) fail("statistics beyond the channels");
    }
    if (trial_.running) {
      if (statistics[u] != trial_.statistics[u]) fail("statistics that are not the running ones");
    } else {
      compare(counts, text("statistics of unit %d", int(u)), statistics[u], statistics_of(inputs[u], channels),
              kStatistics);
    }
  }
  compare(counts, "output", result.output.values(), unit_forward(trial_, trial_.count() - 1, inputs, statistics),
          rounding_);
}

void Training::backward(const std::string& name) {
  PassCounts& counts = counts_[bf16_ ? kTrainBackwardBf16 : kTrainBackward];
  const Backward result = on_threads<Backward>(counts, name, [&](const Team& team) {
    Backward fresh = {{trial_.x.size(), bf16_, shifted_}, {}, {}, {}};
    for (const std::vector<float>& weights : trial_.weights)
      fresh.weights.emplace_back(weights.size(), shifted_, kNan);
    for (const std::vector<float>& gains : trial_.gains) {
      fresh.gains.emplace_back(gains.size(), shifted_, kNan);
      fresh.biases.emplace_back(gains.size(), shifted_, kNan);
    }
    TrainingBackward job = {block_, grad_.data(), x_.data(), inner_.data(), statistics_.data(), fresh.x.data(),
                            {},     {},           {}};
    for (Exact<float>& weights : fresh.weights) job.weight_grads.push_back(weights.data());
    for (Exact<float>& gains : fresh.gains) job.gain_grads.push_back(gains.data());
    for (Exact<float>& biases : fresh.biases) job.bias_grads.push_back(biases.data());
    kernels_.train_backward(job, team);
    return fresh;
  });
  if (!gradients_) gradients_ = std::make_unique<TrainingGradients>(trial::backward(trial_));
  const auto judge = [&](const char* kind, const std::vector<Exact<float>>& values,
                         const std::vector<Uncertains>& truths) {
    for (size_t i = 0; i < truths.size(); ++i) {
      compare(counts, text("gradient of %s %d", kind, int(i)), as_vector(values[i]), truths[i], rounding_);
    }
  };
  compare(counts, "gradient of x", result.x.values(), gradients_->x, rounding_);
  judge("weights", result.weights, gradients_->weights);
  judge("gains", result.gains, gradients_->gains);
  judge("biases", result.biases, gradients_->biases);
}

}  // namespace trial
