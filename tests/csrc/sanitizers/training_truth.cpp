#include "training_truth.h"

#include <cmath>

namespace trial {
namespace {

using pathnet::Unit;

Uncertain exact(double value) { return {value, 0}; }

// Calls then(input, weight, output) for every product of a convolution: their places.
template <class Then>
void products(const Unit& unit, int64_t batch, const Then& then) {
  for (int64_t s = 0; s < batch; ++s) {
    for (int64_t y = 0; y < unit.out_height; ++y) {
      for (int64_t x = 0; x < unit.out_width; ++x) {
        for (int64_t i = 0; i < unit.kernel; ++i) {
          for (int64_t j = 0; j < unit.kernel; ++j) {
            const int64_t row = y * unit.stride + i - unit.padding, column = x * unit.stride + j - unit.padding;
            if (row < 0 || row >= unit.in_height || column < 0 || column >= unit.in_width) continue;
            for (int64_t out = 0; out < unit.out_channels; ++out) {
              for (int64_t in = 0; in < unit.in_channels; ++in) {
                then(((s * unit.in_height + row) * unit.in_width + column) * unit.in_channels + in,
                     ((out * unit.in_channels + in) * unit.kernel + i) * unit.kernel + j,
                     ((s * unit.out_height + y) * unit.out_width + x) * unit.out_channels + out);
              }
            }
          }
        }
      }
    }
  }
}

// Calls then(place in the block's input, place in its output) for every number that the padding skip takes.
template <class Then>
void padded(const TrainingBlock& block, const Then& then) {
  const pathnet::Block& row = block.row;
  int64_t stride = 1;
  for (int64_t u = 0; u < block.count(); ++u) stride *= block.units[u].stride;
  for (int64_t s = 0; s < block.batch; ++s) {
    for (int64_t y = 0; y < row.out_height; ++y) {
      for (int64_t x = 0; x < row.out_width; ++x) {
        for (int64_t c = 0; c < row.in_channels; ++c) {
          then(((s * row.in_height + y * stride) * row.in_width + x * stride) * row.in_channels + c,
               ((s * row.out_height + y) * row.out_width + x) * row.out_channels + row.pad_before + c);
        }
      }
    }
  }
}

Uncertain deviation_of(const TrainingBlock& block, int64_t u, const std::vector<float>& statistics, int64_t channel) {
  const double variance = statistics[block.units[u].in_channels + channel];
  return exact(1 / std::sqrt(variance + block.epsilons[u]));
}

Uncertains normalized(const TrainingBlock& block, int64_t u, const std::vector<float>& input,
                      const std::vector<float>& statistics) {
  Uncertains values(input.size());
  for (size_t i = 0; i < input.size(); ++i) {
    const int64_t c = int64_t(i) % block.units[u].in_channels;
    values[i] = exact(double(input[i]) - statistics[c]) * deviation_of(block, u, statistics, c);
  }
  return values;
}

// The input of the unit's ReLU.
Uncertains before_relu(const TrainingBlock& block, int64_t u, const Uncertains& normalized) {
  Uncertains values(normalized.size());
  for (size_t i = 0; i < values.size(); ++i) {
    const int64_t c = int64_t(i) % block.units[u].in_channels;
    values[i] = normalized[i] * exact(block.gains[u][c]);
    values[i] += exact(block.biases[u][c]);
  }
  return values;
}

Uncertains relu(Uncertains values) {
  for (Uncertain& value : values) {
    if (value.value <= 0) value = {};
  }
  return values;
}

// Adds to the gradients of unit `i`'s weights and input.
void convolution_back(const TrainingBlock& block, int64_t i, const Uncertains& activations, const Uncertains& output,
                      Uncertains& weights, Uncertains& input) {
  weights.resize(block.weights[i].size());
  products(block.units[i], block.batch, [&](int64_t in, int64_t weight, int64_t out) {
    weights[weight] += activations[in] * output[out];
    input[in] += exact(block.weights[i][weight]) * output[out];
  });
}

// The gradient at the input of unit u's BN from that at its output, and those of its parameters.
Uncertains norm_back(const TrainingBlock& block, int64_t u, const Uncertains& output, const Uncertains& normalized,
                     Uncertains& gains, Uncertains& biases) {
  const int64_t channels = block.units[u].in_channels;
  const Uncertain part = exact(double(channels) / double(output.size()));
  gains.resize(channels);
  biases.resize(channels);
  for (size_t i = 0; i < output.size(); ++i) {
    gains[i % channels] += output[i] * normalized[i];
    biases[i % channels] += output[i];
  }
  Uncertains input(output.size());
  for (size_t i = 0; i < output.size(); ++i) {
    const int64_t c = int64_t(i) % channels;
    input[i] = output[i];
    if (!block.running) {
      input[i] += exact(-1) * part * biases[c];
      input[i] += exact(-1) * part * gains[c] * normalized[i];
    }
    input[i] = input[i] * exact(block.gains[u][c]) * deviation_of(block, u, block.statistics[u], c);
  }
  return input;
}

}  // namespace

Uncertains unit_forward(const TrainingBlock& block, int64_t u, const Images& inputs, const Images& statistics) {
  const pathnet::Block& row = block.row;
  const auto convolved = [&](int64_t i, int64_t from, float factor) {
    const Uncertains activations =
        relu(before_relu(block, from, normalized(block, from, inputs[from], statistics[from])));
    const Unit& unit = block.units[i];
    Uncertains output(block.batch * unit.out_height * unit.out_width * unit.out_channels);
    products(unit, block.batch, [&](int64_t in, int64_t weight, int64_t out) {
      output[out] += exact(factor) * exact(block.weights[i][weight]) * activations[in];
    });
    return output;
  };
  if (u + 1 < block.count()) return convolved(u, u, 1.0f);
  Uncertains output = convolved(u, u, block.c), skip(output.size());
  if (block.projects()) {
    skip = convolved(block.count(), 0, block.a);
  } else if (row.skip == pathnet::kPad) {
    padded(block, [&](int64_t in, int64_t out) { skip[out] += exact(block.a) * exact(block.x[in]); });
  } else if (block.a != 0.0f) {
    for (size_t i = 0; i < skip.size(); ++i) skip[i] = exact(block.a) * exact(block.x[i]);
  }
  for (size_t i = 0; i < skip.size(); ++i) output[i] += skip[i];
  return output;
}

Uncertains statistics_of(const std::vector<float>& input, int64_t channels) {
  const Uncertain part = exact(double(channels) / double(input.size()));
  Uncertains statistics(2 * channels);
  for (size_t i = 0; i < input.size(); ++i) statistics[i % channels] += part * exact(input[i]);
  for (size_t i = 0; i < input.size(); ++i) {
    const Uncertain distance = exact(input[i] - statistics[i % channels].value);
    statistics[channels + i % channels] += part * (distance * distance);
  }
  return statistics;
}

TrainingGradients backward(const TrainingBlock& block) {
  TrainingGradients grads;
  grads.weights.resize(block.weights.size());
  grads.gains.resize(block.count());
  grads.biases.resize(block.count());
  Uncertains output(block.grad.size());
  for (size_t i = 0; i < output.size(); ++i) output[i] = exact(block.c) * exact(block.grad[i]);
  for (int64_t u = block.count() - 1; u >= 0; --u) {
    const Uncertains unit_inputs = normalized(block, u, block.inputs[u], block.statistics[u]);
    const Uncertains activations = relu(before_relu(block, u, unit_inputs));
    Uncertains input(activations.size());
    convolution_back(block, u, activations, output, grads.weights[u], input);
    if (u == 0 && block.projects()) {
      Uncertains aside(block.grad.size());
      for (size_t i = 0; i < aside.size(); ++i) aside[i] = exact(block.a) * exact(block.grad[i]);
      convolution_back(block, block.count(), activations, aside, grads.weights[block.count()], input);
    }
    for (size_t i = 0; i < input.size(); ++i) {
      if (activations[i].value <= 0) input[i] = {};
    }
    output = norm_back(block, u, input, unit_inputs, grads.gains[u], grads.biases[u]);
  }
  grads.x = output;
  if (block.row.skip == pathnet::kPad) {
    padded(block, [&](int64_t in, int64_t out) { grads.x[in] += exact(block.a) * exact(block.grad[out]); });
  } else if (!block.projects() && block.a != 0.0f) {
    for (size_t i = 0; i < grads.x.size(); ++i) grads.x[i] += exact(block.a) * exact(block.grad[i]);
  }
  return grads;
}

}  // namespace trial
