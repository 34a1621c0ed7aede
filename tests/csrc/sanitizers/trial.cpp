#include "trial.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "dice.h"

namespace trial {
namespace {

using pathnet::Block;
using pathnet::Unit;

// Multiply-adds of one walk of all samples and routings, which bound a trial's time.
constexpr double kMostOperations = 1.5e6;
constexpr int64_t kMostSide = 19, kMostWidth = 70;

int64_t side_behind(int64_t side, int64_t kernel, int64_t stride, int64_t padding) {
  const int64_t room = side + 2 * padding - kernel;
  return room < 0 ? 0 : room / stride + 1;
}

// A convolution between given shapes, weights and bits not yet placed; with kernel 0 where there is none.
Unit projection_between(const Block& block, Dice& dice) {
  std::vector<Unit> found;
  for (int64_t kernel : {1, 2, 3, 5}) {
    for (int64_t stride : {1, 2, 4, 8}) {
      for (int64_t padding = 0; padding < kernel; ++padding) {
        if (side_behind(block.in_height, kernel, stride, padding) != block.out_height) continue;
        if (side_behind(block.in_width, kernel, stride, padding) != block.out_width) continue;
        found.push_back({block.in_channels, block.in_height, block.in_width, block.out_channels, block.out_height,
                         block.out_width, kernel, stride, padding, 0, -1, -1});
      }
    }
  }
  if (found.empty()) return {};
  return found[dice.below(int64_t(found.size()))];
}

// The units of a residual module that begins at a shape; none where an image shrinks to nothing.
std::vector<Unit> module_from(int64_t channels, int64_t height, int64_t width, int64_t widest, Dice& dice) {
  std::vector<Unit> units;
  const int64_t count = dice.one_of<int64_t>({1, 1, 2, 2, 2, 3}), entry = channels;
  const bool plain = dice.chance(0.5);
  for (int64_t u = 0; u < count; ++u) {
    const bool last = u + 1 == count;
    Unit unit = {};
    unit.in_channels = channels;
    unit.in_height = height;
    unit.in_width = width;
    unit.out_channels = last && dice.chance(0.6) ? entry : dice.between(1, widest);
    unit.kernel = plain ? dice.one_of<int64_t>({1, 3, 3, 5}) : dice.one_of<int64_t>({1, 2, 3, 3, 5});
    unit.stride = !plain && dice.chance(0.3) ? 2 : 1;
    unit.padding = plain || dice.chance(0.5) ? (unit.kernel - 1) / 2 : dice.below(unit.kernel);
    unit.out_height = side_behind(height, unit.kernel, unit.stride, unit.padding);
    unit.out_width = side_behind(width, unit.kernel, unit.stride, unit.padding);
    if (unit.out_height < 1 || unit.out_width < 1) return {};
    units.push_back(unit);
    channels = unit.out_channels;
    height = unit.out_height;
    width = unit.out_width;
  }
  return units;
}

// Chooses among the skips that the shapes admit; false where none does.
bool choose_skip(Block& block, const std::vector<Unit>& units, bool behind_relu, Unit& projection, Dice& dice) {
  int64_t stride = 1;
  for (const Unit& unit : units) stride *= unit.stride;
  const bool same_sides = block.in_height == block.out_height && block.in_width == block.out_width;
  const bool pads = (block.in_height + stride - 1) / stride == block.out_height &&
                    (block.in_width + stride - 1) / stride == block.out_width &&
                    block.in_channels <= block.out_channels;
  std::vector<pathnet::Skip> skips;
  const pathnet::Skip identity = behind_relu ? pathnet::kActivated : pathnet::kIdentity;
  if (same_sides && block.in_channels == block.out_channels) skips = {identity, identity};
  if (pads) skips.push_back(behind_relu ? pathnet::kActivatedPad : pathnet::kPad);
  projection = projection_between(block, dice);
  if (projection.kernel > 0) skips.push_back(pathnet::kProjection);
  if (skips.empty()) return false;
  block.skip = skips[dice.below(int64_t(skips.size()))];
  if (block.skips_by_padding()) block.pad_before = dice.below(block.out_channels - block.in_channels + 1);
  return true;
}

void add_blocks(Trial& trial, int64_t count, int64_t height, int64_t width, int64_t widest, Dice& dice) {
  int64_t channels = dice.between(1, widest);
  while (int64_t(trial.blocks.size()) < count) {
    const std::vector<Unit> units = module_from(channels, height, width, widest, dice);
    if (units.empty()) continue;
    const Unit &first = units.front(), &last = units.back();
    Block block = {int64_t(trial.units.size()),
                   int64_t(units.size()),
                   0,
                   -1,
                   first.in_channels,
                   first.in_height,
                   first.in_width,
                   last.out_channels,
                   last.out_height,
                   last.out_width,
                   0};
    Unit projection;
    if (std::max(block.out_height, block.out_width) > kMostSide ||
        !choose_skip(block, units, trial.behind_relu, projection, dice)) {
      continue;
    }
    trial.units.insert(trial.units.end(), units.begin(), units.end());
    const Unit end = {block.out_channels,
                      block.out_height,
                      block.out_width,
                      block.out_channels,
                      block.out_height,
                      block.out_width,
                      0,
                      1,
                      0,
                      0,
                      -1,
                      -1};
    if (trial.closed) trial.units.push_back(end);
    if (block.skip == pathnet::kProjection) {
      block.projection_unit = int64_t(trial.units.size());
      trial.units.push_back(projection);
      if (trial.closed) trial.units.push_back(end);
    }
    trial.blocks.push_back(block);
    channels = block.out_channels;
    height = block.out_height;
    width = block.out_width;
  }
}

double operations(const std::vector<Unit>& units) {
  double sum = 0;
  for (const Unit& unit : units) sum += double(unit.weight_size()) * double(unit.out_height * unit.out_width);
  return sum;
}

int64_t fewest_pixels(const std::vector<Unit>& units) {
  int64_t fewest = INT64_MAX;
  for (const Unit& unit : units) fewest = std::min(fewest, unit.in_height * unit.in_width);
  return fewest;
}

void place(Trial& trial, Dice& dice) {
  int64_t weights = 0;
  for (Unit& unit : trial.units) {
    unit.weight_offset = weights;
    weights += unit.weight_size();
    const double deviation =
        std::sqrt(2.0 / double(unit.in_channels * std::max<int64_t>(1, unit.kernel * unit.kernel)));
    for (int64_t i = 0; i < unit.weight_size(); ++i) trial.weights.push_back(dice.around_zero(deviation));
    trial.epsilons.push_back(dice.one_of({1e-4f, 1e-2f}));
  }
  for (const Unit& unit : trial.units) {
    for (int64_t c = 0; trial.behind_relu && !trial.closed && c < unit.out_channels; ++c)
      trial.biases.push_back(dice.around_zero(0.3));
  }
  // Without a ReLU in the first unit its block's skip follows none.
  const bool opens = trial.behind_relu && dice.chance(0.4);
  if (opens) {
    int64_t& skip = trial.blocks.front().skip;
    skip = skip == pathnet::kActivated ? pathnet::kIdentity : skip == pathnet::kActivatedPad ? pathnet::kPad : skip;
  }
  for (const Block& block : trial.blocks) {
    std::vector<int64_t> units;
    for (int64_t u = block.first_unit; u < block.module_end() + trial.closed; ++u) units.push_back(u);
    if (trial.closed && block.skip == pathnet::kProjection) units.push_back(block.projection_end());
    for (int64_t u : units) {
      Unit& unit = trial.units[u];
      if (unit.kernel > 0 && !(opens && u == 0)) {
        unit.bits_offset = trial.bits_stride;
        trial.bits_stride += unit.bits_size();
      } else {
        unit.bits_offset = -1;
      }
      unit.scale_offset = -1;
      if (trial.closed && u == block.first_unit) continue;
      unit.scale_offset = int64_t(trial.scales.size());
      for (int64_t c = 0; c < unit.in_channels; ++c) {
        const float scale = float(dice.chance(0.3) ? -0.5 - dice.unit() : 0.5 + dice.unit());
        const float shift = dice.around_zero(0.3);
        // A skip that starts after a block's first ReLU follows only that.
        const bool bare = block.behind_relu() && u == block.first_unit;
        trial.scales.push_back(bare ? 1.0f : scale);
        trial.shifts.push_back(bare ? 0.0f : shift);
      }
    }
  }
}

// Some of the first ones and of the last ones agree, so passes share parts.
void route(Trial& trial, Dice& dice) {
  const int64_t blocks = int64_t(trial.blocks.size());
  for (int64_t r = 0; r < trial.routings; ++r) {
    for (int64_t b = 0; b < blocks; ++b) {
      const float some = dice.around_zero(1.0);
      const auto pair = dice.one_of<std::pair<float, float>>(
          {{1.0f, 1.0f}, {1.0f, 0.0f}, {0.0f, 1.0f}, {1.0f, 1.0f}, {some, 1.0f}, {1.0f, some}, {some, 0.0f}});
      const bool nothing = dice.chance(0.01);
      trial.routing.push_back(nothing ? 0.0f : pair.first);
      trial.routing.push_back(nothing ? 0.0f : pair.second);
    }
    if (r == 0) continue;
    const int64_t shared = dice.below(blocks + 1) * 2;
    float* own = trial.routing.data() + r * blocks * 2;
    if (dice.chance(0.5)) {
      std::copy_n(own - blocks * 2, shared, own);
    } else {
      std::copy_n(own - shared, shared, own + blocks * 2 - shared);
    }
  }
}

void fill(Trial& trial, Dice& dice) {
  const Block &first = trial.blocks.front(), &last = trial.blocks.back();
  trial.y0.resize(trial.batch * first.in_channels * first.in_height * first.in_width);
  trial.grad.resize(trial.batch * last.out_channels * last.out_height * last.out_width);
  for (float& value : trial.y0) value = dice.around_zero(1.0);
  // Beyond 2^20 and below 2^-20 the backward passes change the exponent.
  const double magnitude = dice.one_of({1.0, 1.0, 1e-25, 1e25});
  for (float& value : trial.grad) value = dice.around_zero(magnitude);
  for (int64_t s = 0; s < trial.batch; ++s) trial.exponent.push_back(int32_t(dice.between(-200, 200)));
  for (const Unit& unit : trial.units) {
    std::vector<uint8_t> mask;
    if (unit.bits_offset >= 0) mask.resize(trial.batch * unit.in_channels * unit.in_height * unit.in_width);
    for (uint8_t& bit : mask) bit = dice.chance(0.6);
    trial.relu_mask.push_back(std::move(mask));
  }
}

}  // namespace

Trial make_trial(uint64_t seed) {
  Dice dice(seed * 0x9e3779b97f4a7c15u + 1);
  Trial trial;
  do {
    trial = {};
    trial.behind_relu = seed % 3 == 2;
    trial.closed = seed % 6 == 5;
    const int64_t height = dice.between(1, kMostSide), width = dice.between(1, kMostSide);
    trial.batch = dice.one_of<int64_t>({1, 2, 3, 5, 9});
    trial.routings = dice.one_of<int64_t>({1, 2, 3, 5});
    const int64_t blocks = dice.between(1, 5);
    // Three units a block of nine taps, with channels of half the greatest width.
    const double pixels = double(height * width * blocks * trial.batch * trial.routings);
    const double widest = 2 * std::sqrt(kMostOperations / (pixels * 27));
    add_blocks(trial, blocks, height, width, std::clamp(int64_t(widest), int64_t(1), kMostWidth), dice);
    // Statistics of fewer values are rounding errors magnified: two values always become 1 and -1.
  } while (operations(trial.units) * double(trial.batch * trial.routings) > kMostOperations ||
           fewest_pixels(trial.units) * trial.batch < 6);
  place(trial, dice);
  route(trial, dice);
  fill(trial, dice);
  return trial;
}

}  // namespace trial
