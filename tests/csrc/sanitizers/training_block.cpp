#include "training_block.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "dice.h"

namespace trial {
namespace {

using pathnet::Unit;

// Multiply-adds of a forward pass, which bound a trial's time.
constexpr double kMostOperations = 1.5e6;
constexpr int64_t kMostSide = 33, kMostWidth = 70;
// Between a ReLU's input and zero, far more than float32 rounds.
constexpr double kLeastDistance = 1e-3;

Unit unit_from(const Unit& before, int64_t out, int64_t kernel, int64_t stride) {
  Unit unit = {
      before.out_channels, before.out_height, before.out_width, out, 0, 0, kernel, stride, kernel / 2, 0, 0, 0};
  unit.out_height = (unit.in_height - 1) / stride + 1;
  unit.out_width = (unit.in_width - 1) / stride + 1;
  return unit;
}

void choose_shapes(TrainingBlock& block, int64_t count, int64_t widest, Dice& dice) {
  Unit before = {};
  before.out_channels = dice.between(1, widest);
  before.out_height = dice.between(1, kMostSide);
  before.out_width = dice.between(1, kMostSide);
  int64_t stride = 1;
  for (int64_t u = 0; u < count; ++u) {
    const bool keeps = u + 1 == count && dice.chance(0.5);
    const int64_t out =
        keeps ? block.units.empty() ? before.out_channels : block.units[0].in_channels : dice.between(1, widest);
    block.units.push_back(
        unit_from(before, out, dice.one_of<int64_t>({1, 3, 3, 3, 5}), dice.one_of<int64_t>({1, 1, 1, 1, 2, 3})));
    before = block.units.back();
    stride *= before.stride;
  }
  const Unit first = block.units.front(), last = block.units.back();
  const int64_t added = last.out_channels - first.in_channels;
  const bool same = stride == 1 && added == 0;
  block.a = dice.one_of({0.0f, 1.0f, 1.0f, dice.around_zero(1.0)});
  block.c = dice.one_of({1.0f, 1.0f, 0.25f + float(dice.unit())});
  block.row = {0,
               count,
               pathnet::kIdentity,
               -1,
               first.in_channels,
               first.in_height,
               first.in_width,
               last.out_channels,
               last.out_height,
               last.out_width,
               0};
  if (block.a == 0.0f || (same && dice.chance(0.8))) return;
  if (!same && added >= 0 && dice.chance(0.5)) {
    block.row.skip = pathnet::kPad;
    block.row.pad_before = dice.below(added + 1);
    return;
  }
  block.row.skip = pathnet::kProjection;
  block.row.projection_unit = count;
  Unit entry = first;
  entry.out_channels = first.in_channels;
  entry.out_height = first.in_height;
  entry.out_width = first.in_width;
  block.units.push_back(unit_from(entry, last.out_channels, 1, stride));
  block.units.back().scale_offset = block.units.back().bits_offset = -1;
}

double operations(const TrainingBlock& block) {
  double sum = 0;
  for (const Unit& unit : block.units) sum += double(unit.weight_size() * unit.out_height * unit.out_width);
  return sum * double(block.batch);
}

// Values of a channel, of the smallest input.
int64_t fewest_values(const TrainingBlock& block) {
  int64_t fewest = INT64_MAX;
  for (const Unit& unit : block.units) fewest = std::min(fewest, unit.in_height * unit.in_width * block.batch);
  return fewest;
}

std::vector<float> numbers(int64_t size, double mean, double deviation, Dice& dice) {
  std::vector<float> values(size);
  for (float& value : values) value = float(mean) + dice.around_zero(deviation);
  return values;
}

std::vector<float> image(int64_t values, int64_t channels, bool bf16, Dice& dice) {
  const std::vector<float> offsets = numbers(channels, 0.0, 1.0, dice);
  std::vector<float> image(values);
  for (int64_t i = 0; i < values; ++i) {
    const float value = offsets[i % channels] + dice.around_zero(1.0);
    image[i] = bf16 ? rounded_to_bf16(value) : value;
  }
  return image;
}

// Mean and biased variance of each channel.
std::vector<float> measured(const std::vector<float>& values, int64_t channels) {
  std::vector<float> statistics(2 * channels);
  const double count = double(values.size()) / double(channels);
  for (int64_t c = 0; c < channels; ++c) {
    double mean = 0, squares = 0;
    for (size_t i = c; i < values.size(); i += channels) mean += values[i] / count;
    for (size_t i = c; i < values.size(); i += channels) squares += (values[i] - mean) * (values[i] - mean);
    statistics[c] = float(mean);
    statistics[channels + c] = float(squares / count);
  }
  return statistics;
}

// Moves the inputs of unit u's ReLU away from zero.
void part_from_zero(TrainingBlock& block, int64_t u, bool bf16) {
  const int64_t channels = block.units[u].in_channels;
  for (size_t i = 0; i < block.inputs[u].size(); ++i) {
    const int64_t c = int64_t(i) % channels;
    const double scale =
        double(block.gains[u][c]) / std::sqrt(double(block.statistics[u][channels + c]) + block.epsilons[u]);
    const float start = block.inputs[u][i];
    for (int64_t steps = 0;; ++steps) {
      const float value = start + float(double(steps) * kLeastDistance / std::fabs(scale));
      block.inputs[u][i] = bf16 ? rounded_to_bf16(value) : value;
      const double relu = (double(block.inputs[u][i]) - block.statistics[u][c]) * scale + block.biases[u][c];
      if (std::fabs(relu) >= kLeastDistance) break;
    }
  }
}

void fill(TrainingBlock& block, bool bf16, Dice& dice) {
  for (const Unit& unit : block.units) {
    const double deviation = std::sqrt(2.0 / double(unit.in_channels * unit.kernel * unit.kernel));
    block.weights.push_back(numbers(unit.weight_size(), 0.0, deviation, dice));
  }
  for (int64_t u = 0; u < block.count(); ++u) {
    const Unit& unit = block.units[u];
    const int64_t channels = unit.in_channels;
    block.gains.push_back(numbers(channels, 1.0, 0.3, dice));
    for (float& gain : block.gains.back()) gain *= dice.chance(0.2) ? -1.0f : 1.0f;
    block.biases.push_back(numbers(channels, 0.0, 0.3, dice));
    block.means.push_back(numbers(channels, 0.0, 0.3, dice));
    block.variances.push_back(numbers(channels, 1.0, 0.3, dice));
    block.widest = std::max(block.widest, channels);
    block.inputs.push_back(image(block.batch * unit.in_height * unit.in_width * channels, channels, bf16, dice));
    block.statistics.push_back(measured(block.inputs.back(), channels));
    if (block.running) {
      block.statistics.back() = block.means.back();
      block.statistics.back().insert(block.statistics.back().end(), block.variances.back().begin(),
                                     block.variances.back().end());
    }
    part_from_zero(block, u, bf16);
  }
  block.x = block.inputs[0];
  const int64_t pixels = block.row.out_height * block.row.out_width;
  block.grad = image(block.batch * pixels * block.row.out_channels, block.row.out_channels, bf16, dice);
}

}  // namespace

float rounded_to_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  bits = (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000;
  std::memcpy(&value, &bits, sizeof(bits));
  return value;
}

TrainingBlock make_training_block(uint64_t seed, bool bf16) {
  Dice dice(seed * 0x9e3779b97f4a7c15u + 2);
  TrainingBlock block;
  do {
    block = {};
    block.batch = dice.one_of<int64_t>({1, 2, 3, 5, 9, 17});
    const int64_t count = dice.one_of<int64_t>({1, 2, 2, 2, 3});
    choose_shapes(block, count, dice.one_of<int64_t>({4, 20, 33, kMostWidth}), dice);
    for (int64_t u = 0; u < count; ++u) block.epsilons.push_back(dice.one_of({1e-5, 1e-2}));
    block.running = dice.chance(0.4);
    // Statistics of fewer values are rounding errors magnified.
  } while (operations(block) > kMostOperations || fewest_values(block) < 6);
  fill(block, bf16, dice);
  return block;
}

}  // namespace trial
