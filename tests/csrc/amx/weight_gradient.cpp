// Judges the weight gradient on AMX tiles by plain loops in double, on random convolutions.
//
//   weight_gradient [convolutions] [first seed]
//
// Exit status 1, and one line that says where, at the first wrong number.

#include "cpu/conv/amx_weight_gradient.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <initializer_list>
#include <limits>
#include <random>
#include <vector>

#include "cpu/isa/isa.h"

using namespace pathnet;
using namespace pathnet::cpu;
using namespace pathnet::cpu::PATHNET_ISA_NAMESPACE;

namespace {

struct Case {
  uint64_t seed;
  Block block;
  Unit unit;
  int64_t samples, border;                // pixels that other convolutions of a network add to its border
  std::vector<float> activations, grads;  // [samples][height][width][channels]
};

Case random_case(uint64_t seed) {
  std::mt19937_64 engine(seed * 0x9e3779b97f4a7c15u + 1);
  const auto between = [&](int64_t first, int64_t last) {
    return first + int64_t(engine() % uint64_t(last - first + 1));
  };
  Case random = {};
  Unit& unit = random.unit;
  do {
    const int64_t kernel = std::initializer_list<int64_t>{1, 2, 3, 3, 5}.begin()[between(0, 4)];
    unit = {between(1, 70),
            between(1, 33),
            between(1, 33),
            between(1, 70),
            0,
            0,
            kernel,
            between(1, 3),
            between(0, 3) ? kernel / 2 : between(0, kernel - 1),
            0,
            -1,
            -1};
    unit.out_height = (unit.in_height + 2 * unit.padding - kernel) / unit.stride + 1;
    unit.out_width = (unit.in_width + 2 * unit.padding - kernel) / unit.stride + 1;
    random.samples = between(1, 6);
    random.border = between(0, 2);
  } while (unit.in_height + 2 * unit.padding < unit.kernel || unit.in_width + 2 * unit.padding < unit.kernel ||
           double(unit.weight_size() * unit.out_height * unit.out_width * random.samples) > 3e7);
  random.seed = seed;
  random.block = {0,
                  1,
                  kIdentity,
                  -1,
                  unit.in_channels,
                  unit.in_height,
                  unit.in_width,
                  unit.out_channels,
                  unit.out_height,
                  unit.out_width,
                  0};
  const auto fill = [&](std::vector<float>& numbers, int64_t size) {
    for (int64_t i = 0; i < size; ++i) numbers.push_back(float(int64_t(engine() >> 11)) * 0x1p-52f - 1.0f);
  };
  fill(random.activations, random.samples * unit.in_height * unit.in_width * unit.in_channels);
  fill(random.grads, random.samples * unit.out_height * unit.out_width * unit.out_channels);
  return random;
}

// The sum of the products, and that of their absolute values.
struct Sum {
  double exact = 0, absolute = 0;
};

std::vector<Sum> plain_loops(const Case& random, const std::vector<float>& activations,
                             const std::vector<float>& grads) {
  const Unit& unit = random.unit;
  std::vector<Sum> sums(unit.weight_size());
  for (int64_t s = 0; s < random.samples; ++s) {
    for (int64_t y = 0; y < unit.out_height; ++y) {
      for (int64_t x = 0; x < unit.out_width; ++x) {
        const float* grad = grads.data() + ((s * unit.out_height + y) * unit.out_width + x) * unit.out_channels;
        for (int64_t k = 0; k < unit.kernel * unit.kernel; ++k) {
          const int64_t row = y * unit.stride + k / unit.kernel - unit.padding;
          const int64_t column = x * unit.stride + k % unit.kernel - unit.padding;
          if (row < 0 || row >= unit.in_height || column < 0 || column >= unit.in_width) continue;
          const float* activation =
              activations.data() + ((s * unit.in_height + row) * unit.in_width + column) * unit.in_channels;
          for (int64_t out = 0; out < unit.out_channels; ++out) {
            for (int64_t in = 0; in < unit.in_channels; ++in) {
              const double product = double(activation[in]) * double(grad[out]);
              Sum& sum = sums[(out * unit.in_channels + in) * unit.kernel * unit.kernel + k];
              sum.exact += product;
              sum.absolute += std::fabs(product);
            }
          }
        }
      }
    }
  }
  return sums;
}

std::vector<float> on_tiles(const Case& random, const Convolution& convolution, const std::vector<float>& activations,
                            const std::vector<float>& grads) {
  using Convolver = TrainingTileConvolver;
  const Image &source = convolution.source, &target = convolution.target;
  const int64_t channels = Convolver::operand_channels(source), plane = source.pixels() * channels;
  std::vector<std::vector<uint16_t>> operands;
  std::vector<std::vector<float>> images;
  std::vector<const uint16_t*> gradient_of;
  std::vector<const float*> activation_of;
  for (int64_t s = 0; s < random.samples; ++s) {
    operands.emplace_back(plane);
    for (int64_t y = 0; y < source.height; ++y) {
      for (int64_t x = 0; x < source.width; ++x) {
        const int64_t pixel = (s * source.height + y) * source.width + x;
        for (int64_t c = 0; c < source.padded(); c += kGroup) {
          float group[kGroup] = {};
          for (int64_t i = c; i < std::min(c + kGroup, source.channels); ++i) {
            group[i - c] = grads[pixel * source.channels + i];
          }
          Convolver::put(operands.back().data() + source.pixel(y, x) * channels + c, plane, load(group));
        }
      }
    }
    images.emplace_back(target.dense());
    for (int64_t i = 0; i < target.height * target.width * target.channels; ++i) {
      images.back()[i / target.channels * target.padded() + i % target.channels] =
          activations[s * target.height * target.width * target.channels + i];
    }
  }
  for (int64_t s = 0; s < random.samples; ++s) {
    gradient_of.push_back(operands[s].data());
    activation_of.push_back(images[s].data());
  }
  std::vector<float> sums(TileWeightGradient::size(convolution));
  // In two calls, which must add up.
  const int64_t first = random.seed % 3 == 0 ? random.samples / 2 : random.samples;
  TileWeightGradient::add(convolution, gradient_of.data(), activation_of.data(), first, sums.data());
  if (first < random.samples) {
    TileWeightGradient::add(convolution, gradient_of.data() + first, activation_of.data() + first,
                            random.samples - first, sums.data());
  }
  const int64_t matrix = source.padded() * target.padded();
  std::vector<float> grads_by_position(convolution.positions * matrix, std::numeric_limits<float>::quiet_NaN());
  TileWeightGradient::finish(convolution, sums.data(), grads_by_position.data());
  std::vector<float> weights;
  for (int64_t out = 0; out < source.channels; ++out) {
    for (int64_t in = 0; in < target.channels; ++in) {
      for (int64_t k = 0; k < convolution.positions; ++k) {
        weights.push_back(grads_by_position[k * matrix + out * target.padded() + in]);
      }
    }
  }
  return weights;
}

// The largest error, relative to the sum of absolute values.
double judge(const Case& random, const Convolution& convolution) {
  // Numbers of an earlier convolution that stay in a thread's memory must have no effect.
  const std::vector<float> nothing(random.activations.size(), std::numeric_limits<float>::quiet_NaN());
  const std::vector<float> endless(random.grads.size(), std::numeric_limits<float>::infinity());
  on_tiles(random, convolution, nothing, endless);
  std::vector<float> activations = random.activations, grads = random.grads;
  for (std::vector<float>* numbers : {&activations, &grads}) {
    for (float& number : *numbers) number = from_bf16(to_bf16(number));
  }
  const std::vector<float> weights = on_tiles(random, convolution, activations, grads);
  const std::vector<Sum> sums = plain_loops(random, activations, grads);
  // Products of bf16 numbers are exact, and their sums are float32.
  constexpr double kAllowed = 4e-6;
  double worst = 0;
  for (size_t i = 0; i < sums.size(); ++i) {
    const double error = std::fabs(double(weights[i]) - sums[i].exact);
    if (sums[i].absolute > 0) worst = std::max(worst, error / sums[i].absolute);
    if (error <= kAllowed * sums[i].absolute) continue;
    const Unit& unit = random.unit;
    std::printf(
        "weight_gradient: seed %d, %d samples [%d, %d, %d] to [%d, %d, %d], kernel %d, stride %d, padding "
        "%d: weight %d is %.9g, expected %.9g\n",
        int(random.seed), int(random.samples), int(unit.in_channels), int(unit.in_height), int(unit.in_width),
        int(unit.out_channels), int(unit.out_height), int(unit.out_width), int(unit.kernel), int(unit.stride),
        int(unit.padding), int(i), weights[i], sums[i].exact);
    std::exit(1);
  }
  return worst;
}

}  // namespace

int main(int count, char** arguments) {
  const int convolutions = count > 1 ? std::atoi(arguments[1]) : 100;
  const int first = count > 2 ? std::atoi(arguments[2]) : 0;
  if (!has_amx()) {
    std::printf("weight_gradient: this processor has no AMX\n");
    return 1;
  }
  double worst = 0;
  for (int seed = first; seed < first + convolutions; ++seed) {
    const Case random = random_case(seed);
    const Plan plan = {&random.block, 1, &random.unit, 1, nullptr, nullptr, nullptr, 0};
    Network network = make_network(plan, true, false);
    Convolution& convolution = network.convolutions[0];
    convolution.source.halo += random.border;
    convolution.target.halo += random.border;
    worst = std::max(worst, judge(random, convolution));
  }
  std::printf("weight_gradient: %d convolutions, largest error %.1e\n", convolutions, worst);
  return 0;
}
