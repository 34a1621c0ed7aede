#include "network.h"

#include "report.h"
#include "teams.h"

namespace trial {

using namespace pathnet;
using namespace pathnet::cpu;

Network::Network(uint64_t seed, AllCounts& counts)
    : seed_(seed),
      counts_(counts),
      trial_(make_trial(seed)),
      judge_(trial_),
      shifted_(seed % 2),
      blocks_(trial_.blocks, false),
      units_(trial_.units, false),
      weights_(trial_.weights, shifted_),
      scales_(trial_.scales, shifted_),
      shifts_(trial_.shifts, shifted_),
      epsilons_(trial_.epsilons, shifted_),
      biases_(trial_.biases, shifted_),
      routing_(trial_.routing, shifted_),
      straight_(trial_.blocks.size() * 2, shifted_, 1.0f),
      y0_(trial_.y0, shifted_),
      grad_(trial_.grad, shifted_),
      exponent_(trial_.exponent, shifted_),
      relu_bits_(as_bits(trial_, trial_.relu_mask)) {}

void Network::try_kernels(Isa isa, bool bf16, const Kernels* tried) {
  kernels_ = kernels_of(isa, bf16);
  const std::string name =
      text("seed %llu, %s %s ", static_cast<unsigned long long>(seed_), isa_name(isa), bf16 ? "bf16" : "float32");
  // On tiles, float32 numbers are two bf16 terms.
  const int bits = bf16 ? kBf16Bits : isa == Isa::kAmx ? 2 * kBf16Bits : kFloat32Bits;
  judge_.admit(bits);
  const bool running = !trial_.closed, batch = trial_.closed || !trial_.behind_relu;
  if (running && (!tried || tried->backward_running != kernels_.backward_running)) {
    backward_running(name + "backward_running");
    sums_running(name + "sums_by_length_running");
  }
  if (batch && (!tried || tried->backward_batch != kernels_.backward_batch ||
                tried->forward_batch != kernels_.forward_batch)) {
    batch_walks(name, bits);
  }
  judge_.admit(kFloat32Bits);
  if (running && (!tried || tried->forward_running != kernels_.forward_running)) {
    forward_running(name + "forward_running");
  }
}

Plan Network::plan(const float* scales, const uint8_t* relu_bits) const {
  return {blocks_.data(),  blocks(), units_.data(), int64_t(trial_.units.size()),
          weights_.data(), scales,   relu_bits,     trial_.bits_stride};
}

Gradients Network::blank(int64_t results, int64_t exponents) const {
  return {{size_t(results * int64_t(trial_.y0.size())), shifted_, kNan},
          {size_t(results * exponents), shifted_, INT32_MIN},
          {size_t(results * trial_.batch), shifted_, double(kNan)}};
}

template <class Result>
Result Network::on_threads(Counts& counts, const std::string& name, const std::function<Result(const Team&)>& walk) {
  const auto run = [&](int threads) {
    doing = name + text(", %d threads", threads);
    ++counts.walks;
    return walk(team_of(threads));
  };
  Result result = run(1);
  // A pass that is ended half way gives no result, and leaves nothing behind.
  for (int64_t last_check : {int64_t(1), int64_t(2 + seed_ % 50)}) {
    doing = name + text(", %d threads that end at check %d", several(), int(last_check));
    try {
      walk(team_of(several(), last_check));
      if (last_check == 1) fail("the walk went on");
    } catch (const Ended&) {
    }
  }
  if (!(run(several()) == result)) fail("the result differs from that of one thread");
  doing = name;
  return result;
}

template <class Walk>
Gradients Network::walked_back(const Team& team, Walk walk, void (*kernel)(const Walk&, const Team&),
                               Gradients gradients) {
  // Kernels read packed weights alone.
  walk.plan.weights = nullptr;
  walk.norms = gradients.norms.data();
  walk.grad_input = gradients.values.data();
  walk.exponent_input = gradients.exponents.data();
  kernel(walk, team);
  if (seed_ % 4 != 0) return gradients;
  Exact<double> alone(gradients.norms.size(), shifted_, double(kNan));
  walk.norms = alone.data();
  walk.grad_input = nullptr;
  walk.exponent_input = nullptr;
  kernel(walk, team);
  if (alone != gradients.norms) fail("norms without the gradients differ");
  return gradients;
}

void Network::backward_running(const std::string& name) {
  doing = name;
  const Plan tables = plan(scales_.data(), relu_bits_.data());
  const PackedWeights packed(kernels_, tables, Direction::kBackward, true);
  BackwardRunningWalk walk = {tables,       packed.data(),   grad_.data(), exponent_.data(), routing_.data(),
                              trial_.batch, trial_.routings, nullptr,      nullptr,          nullptr};
  walk.plan.scales = nullptr;
  const auto gradients = on_threads<Gradients>(counts_[kBackwardRunning], name, [&](const Team& team) {
    return walked_back(team, walk, kernels_.backward_running, blank(trial_.routings, trial_.batch));
  });
  if (backward_.empty()) {
    backward_ = truths_of(trial_, [&](auto zero, const float* routing) {
      return backward<decltype(zero)>(trial_, routing, trial_.relu_mask, trial_.scales, nullptr);
    });
  }
  judge_.gradients(counts_[kBackwardRunning], gradients, backward_, false);
}

void Network::sums_running(const std::string& name) {
  doing = name;
  const Plan tables = plan(scales_.data(), relu_bits_.data());
  const PackedWeights packed(kernels_, tables, Direction::kBackward, true);
  BackwardRunningWalk walk = {tables, packed.data(), grad_.data(), exponent_.data(), routing_.data(), trial_.batch,
                              1,      nullptr,       nullptr,      nullptr};
  walk.plan.scales = nullptr;
  const auto gradients = on_threads<Gradients>(counts_[kSumsRunning], name, [&](const Team& team) {
    return walked_back(team, walk, kernels_.sums_by_length_running, blank(blocks() + 1, trial_.batch));
  });
  if (sums_.empty()) {
    sums_ = truths_by_length(trial_, [&](auto zero, const float* routing) {
      return backward<decltype(zero)>(trial_, routing, trial_.relu_mask, trial_.scales, nullptr);
    });
  }
  judge_.gradients(counts_[kSumsRunning], gradients, sums_, false);
}

void Network::forward_running(const std::string& name) {
  doing = name;
  Counts& counts = counts_[kForwardRunning];
  const Plan tables = plan(scales_.data(), nullptr);
  const PackedWeights packed(kernels_, tables, Direction::kForward, false);
  const auto run = [&](const Team& team, const Exact<float>& routing, int64_t routings, uint8_t* relu_bits) {
    Exact<float> output(routings * trial_.grad.size(), shifted_, kNan);
    ForwardRunningWalk walk = {
        tables,        packed.data(),  shifts_.data(), biases_.size() ? biases_.data() : nullptr,
        y0_.data(),    routing.data(), trial_.batch,   routings,
        output.data(), relu_bits};
    walk.plan.weights = nullptr;
    kernels_.forward_running(walk, team);
    return output;
  };
  const auto output = on_threads<Exact<float>>(
      counts, name, [&](const Team& team) { return run(team, routing_, trial_.routings, nullptr); });
  if (forward_.empty()) {
    forward_ = truths_of(trial_, [&](auto zero, const float* routing) {
      return forward<decltype(zero)>(trial_, routing, false, nullptr);
    });
  }
  judge_.outputs(counts, output, forward_, false);
  Exact<float> recorded(0, false, 0);
  const auto relu_bits = on_threads<Exact<uint8_t>>(counts, name + ", recorded", [&](const Team& team) {
    Exact<uint8_t> bits(trial_.batch * trial_.bits_stride, false, 0);
    recorded = run(team, straight_, 1, bits.data());
    return bits;
  });
  const StraightTruth& truth = straight_truth(false);
  judge_.outputs(counts, recorded, {truth.output}, false);
  judge_.bits(relu_bits, truth);
}

void Network::batch_walks(const std::string& prefix, int bits) {
  // A forward pass always has float32 precision.
  judge_.admit(kFloat32Bits);
  const Record record = forward_batch(prefix + "forward_batch");
  judge_.admit(bits);
  backward_batch(prefix, record);
}

Record Network::forward_batch(const std::string& name) {
  doing = name;
  Counts& counts = counts_[kForwardBatch];
  const Plan tables = plan(scales_.data(), nullptr);
  const PackedWeights packed(kernels_, tables, Direction::kForward, false);
  const auto run = [&](const Team& team, const Exact<float>& routing, int64_t routings, Record* record) {
    Exact<float> output(routings * trial_.grad.size(), shifted_, kNan);
    ForwardBatchWalk walk = {tables,
                             packed.data(),
                             shifts_.data(),
                             epsilons_.data(),
                             y0_.data(),
                             routing.data(),
                             trial_.batch,
                             routings,
                             output.data(),
                             record ? record->relu_bits.data() : nullptr,
                             record ? record->normalized.data() : nullptr,
                             record ? record->scales.data() : nullptr};
    walk.plan.weights = nullptr;
    kernels_.forward_batch(walk, team);
    return output;
  };
  const auto output = on_threads<Exact<float>>(
      counts, name, [&](const Team& team) { return run(team, routing_, trial_.routings, nullptr); });
  if (batch_forward_.empty()) {
    batch_forward_ = truths_of(trial_, [&](auto zero, const float* routing) {
      return forward<decltype(zero)>(trial_, routing, true, nullptr);
    });
  }
  judge_.outputs(counts, output, batch_forward_, true);
  Exact<float> recorded(0, false, 0);
  Record record = on_threads<Record>(counts, name + ", recorded", [&](const Team& team) {
    Record fresh = {{size_t(trial_.batch * trial_.bits_stride), false, 0},
                    {size_t(normalized_size(tables, trial_.batch)), shifted_, kNan},
                    {trial_.scales.size(), shifted_, kNan}};
    recorded = run(team, straight_, 1, &fresh);
    return fresh;
  });
  const StraightTruth& truth = straight_truth(true);
  judge_.outputs(counts, recorded, {truth.output}, true);
  judge_.record(counts, record, as_planes(trial_, record.normalized), truth);
  return record;
}

void Network::backward_batch(const std::string& prefix, const Record& record) {
  const Plan tables = plan(record.scales.data(), record.relu_bits.data());
  const PackedWeights packed(kernels_, tables, Direction::kBackward, false);
  const auto run = [&](Kind kind, const std::string& name, int64_t routings, int64_t results,
                       void (*kernel)(const BackwardBatchWalk&, const Team&)) {
    doing = name;
    const BackwardBatchWalk walk = {tables,       packed.data(), record.normalized.data(),
                                    grad_.data(), exponent_[0],  routing_.data(),
                                    trial_.batch, routings,      nullptr,
                                    nullptr,      nullptr};
    return on_threads<Gradients>(
        counts_[kind], name, [&](const Team& team) { return walked_back(team, walk, kernel, blank(results, 1)); });
  };
  // Given a record the pass is linear: the truth uses its bits and normalised inputs, which are judged above.
  const Masks masks = as_masks(trial_, record.relu_bits);
  const Planes normalized = as_planes(trial_, record.normalized);
  const std::vector<float> scales(record.scales.data(), record.scales.data() + record.scales.size());
  const auto truth = [&](auto zero, const float* routing) {
    return backward<decltype(zero)>(trial_, routing, masks, scales, &normalized);
  };
  const Gradients gradients =
      run(kBackwardBatch, prefix + "backward_batch", trial_.routings, trial_.routings, kernels_.backward_batch);
  judge_.gradients(counts_[kBackwardBatch], gradients, truths_of(trial_, truth), true);
  const Gradients sums =
      run(kSumsBatch, prefix + "sums_by_length_batch", 1, blocks() + 1, kernels_.sums_by_length_batch);
  judge_.gradients(counts_[kSumsBatch], sums, truths_by_length(trial_, truth), true);
}

StraightTruth& Network::straight_truth(bool batch_statistics) {
  std::unique_ptr<StraightTruth>& truth = straight_truths_[batch_statistics];
  if (!truth) {
    truth = std::make_unique<StraightTruth>();
    truth->output = {forward<double>(trial_, straight_.data(), batch_statistics, &truth->exact),
                     forward<float>(trial_, straight_.data(), batch_statistics, &truth->rounded)};
  }
  return *truth;
}

}  // namespace trial
