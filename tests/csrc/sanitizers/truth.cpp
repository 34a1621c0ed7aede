#include "truth.h"

#include <cmath>

namespace trial {
namespace {

using pathnet::Block;
using pathnet::Unit;

template <class Real>
using Values = std::vector<Real>;

// Calls then(input, weight, output) for every product of a convolution: their places.
template <class Then>
void products(const Unit& unit, int64_t batch, const Then& then) {
  for (int64_t s = 0; s < batch; ++s) {
    for (int64_t out = 0; out < unit.out_channels; ++out) {
      for (int64_t in = 0; in < unit.in_channels; ++in) {
        for (int64_t i = 0; i < unit.kernel; ++i) {
          for (int64_t j = 0; j < unit.kernel; ++j) {
            for (int64_t y = 0; y < unit.out_height; ++y) {
              for (int64_t x = 0; x < unit.out_width; ++x) {
                const int64_t row = y * unit.stride + i - unit.padding, column = x * unit.stride + j - unit.padding;
                if (row < 0 || row >= unit.in_height || column < 0 || column >= unit.in_width) continue;
                then(((s * unit.in_channels + in) * unit.in_height + row) * unit.in_width + column,
                     ((out * unit.in_channels + in) * unit.kernel + i) * unit.kernel + j,
                     ((s * unit.out_channels + out) * unit.out_height + y) * unit.out_width + x);
              }
            }
          }
        }
      }
    }
  }
}

template <class Real>
Values<Real> convolved(const Trial& trial, const Unit& unit, const Values<Real>& input) {
  const float* weights = trial.weights.data() + unit.weight_offset;
  Values<Real> output(trial.batch * unit.out_channels * unit.out_height * unit.out_width);
  products(unit, trial.batch,
           [&](int64_t in, int64_t weight, int64_t out) { output[out] += Real(weights[weight]) * input[in]; });
  return output;
}

template <class Real>
Values<Real> convolved_back(const Trial& trial, const Unit& unit, const Values<Real>& output) {
  const float* weights = trial.weights.data() + unit.weight_offset;
  Values<Real> input(trial.batch * unit.in_channels * unit.in_height * unit.in_width);
  products(unit, trial.batch,
           [&](int64_t in, int64_t weight, int64_t out) { input[in] += Real(weights[weight]) * output[out]; });
  return input;
}

// Calls then(place in the block's input, place in its output) for every pixel that the padding skip takes.
template <class Then>
void padded(const Trial& trial, const Block& block, const Then& then) {
  int64_t stride = 1;
  for (int64_t u = 0; u < block.unit_count; ++u) stride *= trial.units[block.first_unit + u].stride;
  for (int64_t s = 0; s < trial.batch; ++s) {
    for (int64_t c = 0; c < block.in_channels; ++c) {
      for (int64_t y = 0; y < block.out_height; ++y) {
        for (int64_t x = 0; x < block.out_width; ++x) {
          then(((s * block.in_channels + c) * block.in_height + y * stride) * block.in_width + x * stride,
               ((s * block.out_channels + block.pad_before + c) * block.out_height + y) * block.out_width + x);
        }
      }
    }
  }
}

// Calls then(place) for every value of a channel.
template <class Then>
void each_of(const Unit& unit, int64_t batch, int64_t channel, const Then& then) {
  const int64_t pixels = unit.in_height * unit.in_width;
  for (int64_t s = 0; s < batch; ++s) {
    for (int64_t i = 0; i < pixels; ++i) then((s * unit.in_channels + channel) * pixels + i);
  }
}

// Returns the values after a row's BN and ReLU, where it has them.
template <class Real>
Values<Real> activated(const Trial& trial, int64_t u, Values<Real> values, bool batch_statistics,
                       Passed<Real>* passed) {
  const Unit& unit = trial.units[u];
  const Real count = Real(trial.batch * unit.in_height * unit.in_width);
  Values<Real> units = values;
  const bool normalizes = unit.scale_offset >= 0;
  for (int64_t c = 0; normalizes && c < unit.in_channels; ++c) {
    const Real scale = trial.scales[unit.scale_offset + c], shift = trial.shifts[unit.scale_offset + c];
    if (batch_statistics) {
      Real mean = 0, variance = 0;
      each_of(unit, trial.batch, c, [&](int64_t i) { mean += values[i]; });
      mean /= count;
      each_of(unit, trial.batch, c, [&](int64_t i) { variance += (values[i] - mean) * (values[i] - mean); });
      const Real inverse = 1 / std::sqrt(variance / count + Real(trial.epsilons[u]));
      each_of(unit, trial.batch, c, [&](int64_t i) { units[i] = (values[i] - mean) * inverse; });
      if (passed) passed->scales[unit.scale_offset + c] = scale * inverse;
    }
    each_of(unit, trial.batch, c, [&](int64_t i) { values[i] = units[i] * scale + shift; });
  }
  if (passed && normalizes) passed->normalized[u] = units;
  if (unit.bits_offset < 0) return values;
  if (passed) passed->before_relu[u] = values;
  for (Real& value : values) value = value > 0 ? value : 0;
  return values;
}

template <class Real>
void add_bias(const Trial& trial, int64_t u, Values<Real>& values) {
  if (trial.biases.empty()) return;
  int64_t first = 0;
  for (int64_t before = 0; before < u; ++before) first += trial.units[before].out_channels;
  const Unit& unit = trial.units[u];
  const int64_t pixels = unit.out_height * unit.out_width;
  for (size_t i = 0; i < values.size(); ++i) {
    values[i] += Real(trial.biases[first + int64_t(i) / pixels % unit.out_channels]);
  }
}

// The gradient through an identity or a padding skip.
template <class Real>
void skip_back(const Trial& trial, const Block& block, Real a, const Values<Real>& grad, Values<Real>& input) {
  if (block.skips_by_identity()) {
    for (size_t i = 0; i < input.size(); ++i) input[i] += a * grad[i];
  }
  if (block.skips_by_padding()) {
    padded(trial, block, [&](int64_t in, int64_t out) { input[in] += a * grad[out]; });
  }
}

// The gradient at a BN's input from that at its output.
template <class Real>
void normalized_back(const Trial& trial, int64_t u, const std::vector<float>& scales,
                     const std::vector<std::vector<float>>* normalized, Values<Real>& grad) {
  const Unit& unit = trial.units[u];
  const Real count = Real(trial.batch * unit.in_height * unit.in_width);
  for (int64_t c = 0; c < unit.in_channels; ++c) {
    const Real scale = scales[unit.scale_offset + c];
    Real mean = 0, slope = 0;
    if (normalized) {
      const std::vector<float>& x = (*normalized)[u];
      each_of(unit, trial.batch, c, [&](int64_t i) {
        mean += grad[i] / count;
        slope += grad[i] * Real(x[i]) / count;
      });
      each_of(unit, trial.batch, c, [&](int64_t i) { grad[i] -= mean + slope * Real(x[i]); });
    }
    each_of(unit, trial.batch, c, [&](int64_t i) { grad[i] *= scale; });
  }
}

}  // namespace

template <class Real>
std::vector<Real> forward(const Trial& trial, const float* routing, bool batch_statistics, Passed<Real>* passed) {
  if (passed) {
    passed->normalized.resize(trial.units.size());
    passed->before_relu.resize(trial.units.size());
    passed->scales.resize(trial.scales.size());
  }
  Values<Real> y(trial.y0.begin(), trial.y0.end());
  for (const Block& block : trial.blocks) {
    const Real a = *routing++, c = *routing++;
    const int64_t last = block.first_unit + block.unit_count - 1;
    Values<Real> skip, passed_by = y, inside = y;
    for (int64_t u = block.first_unit; u < block.first_unit + block.unit_count; ++u) {
      inside = activated(trial, u, inside, batch_statistics, passed);
      if (u == block.first_unit && block.skip == pathnet::kProjection) {
        skip = convolved(trial, trial.units[block.projection_unit], inside);
        add_bias(trial, block.projection_unit, skip);
        if (trial.closed) skip = activated(trial, block.projection_end(), skip, batch_statistics, passed);
      }
      if (u == block.first_unit && block.behind_relu()) passed_by = inside;
      inside = convolved(trial, trial.units[u], inside);
    }
    add_bias(trial, last, inside);
    if (trial.closed) inside = activated(trial, block.module_end(), inside, batch_statistics, passed);
    if (block.skips_by_identity()) skip = passed_by;
    if (block.skips_by_padding()) {
      skip.resize(inside.size());
      padded(trial, block, [&](int64_t in, int64_t out) { skip[out] = passed_by[in]; });
    }
    y.resize(inside.size());
    for (size_t i = 0; i < y.size(); ++i) y[i] = a * skip[i] + c * inside[i];
  }
  return y;
}

template <class Real>
std::vector<Real> backward(const Trial& trial, const float* routing, const std::vector<std::vector<uint8_t>>& masks,
                           const std::vector<float>& scales, const std::vector<std::vector<float>>* normalized) {
  Values<Real> grad(trial.grad.begin(), trial.grad.end());
  for (int64_t b = int64_t(trial.blocks.size()) - 1; b >= 0; --b) {
    const Block& block = trial.blocks[b];
    const Real a = routing[b * 2], c = routing[b * 2 + 1];
    Values<Real> inside = grad;
    for (Real& value : inside) value *= c;
    if (trial.closed) normalized_back(trial, block.module_end(), scales, normalized, inside);
    for (int64_t u = block.first_unit + block.unit_count - 1; u >= block.first_unit; --u) {
      inside = convolved_back(trial, trial.units[u], inside);
      if (u == block.first_unit && block.skip == pathnet::kProjection) {
        Values<Real> skip = grad;
        if (trial.closed) normalized_back(trial, block.projection_end(), scales, normalized, skip);
        skip = convolved_back(trial, trial.units[block.projection_unit], skip);
        for (size_t i = 0; i < inside.size(); ++i) inside[i] += a * skip[i];
      }
      if (u == block.first_unit && block.behind_relu()) skip_back(trial, block, a, grad, inside);
      for (size_t i = 0; i < masks[u].size(); ++i) inside[i] *= Real(masks[u][i]);
      if (trial.units[u].scale_offset >= 0) normalized_back(trial, u, scales, normalized, inside);
    }
    if (!block.behind_relu()) skip_back(trial, block, a, grad, inside);
    grad = inside;
  }
  return grad;
}

template std::vector<float> forward(const Trial&, const float*, bool, Passed<float>*);
template std::vector<double> forward(const Trial&, const float*, bool, Passed<double>*);
template std::vector<float> backward(const Trial&, const float*, const std::vector<std::vector<uint8_t>>&,
                                     const std::vector<float>&, const std::vector<std::vector<float>>*);
template std::vector<double> backward(const Trial&, const float*, const std::vector<std::vector<uint8_t>>&,
                                      const std::vector<float>&, const std::vector<std::vector<float>>*);

}  // namespace trial
