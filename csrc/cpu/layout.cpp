#include "layout.h"

#include <algorithm>

namespace pathnet::cpu {
namespace {

// One direction's taps at target positions congruent to `phase` modulo the stride, by ascending offset from the
// source position of their origin.
struct Tap {
  int64_t offset, kernel;
};

std::vector<Tap> taps_of(const Unit& unit, bool transposed, int64_t phase) {
  std::vector<Tap> taps;
  for (int64_t k = 0; k < unit.kernel; ++k) {
    if (!transposed) {
      taps.push_back({k - unit.padding, k});
    } else if ((phase + unit.padding - k) % unit.stride == 0) {
      taps.push_back({(phase + unit.padding - k) / unit.stride, k});
    }
  }
  if (transposed) std::reverse(taps.begin(), taps.end());
  return taps;
}

Pass make_pass(const Unit& unit, bool transposed, int64_t row_phase, int64_t column_phase, const Image& target) {
  const int64_t step = transposed ? unit.stride : 1;
  Pass pass = {row_phase,
               column_phase,
               (target.height - row_phase + step - 1) / step,
               (target.width - column_phase + step - 1) / step,
               step,
               transposed ? 1 : unit.stride,
               1,
               {}};
  const std::vector<Tap> rows = taps_of(unit, transposed, row_phase);
  const std::vector<Tap> columns = taps_of(unit, transposed, column_phase);
  const int64_t count = columns.size();
  if (pass.source_step == 1 && count >= 1 && count <= 3) pass.taps = int(count);
  for (const Tap& row : rows) {
    for (int64_t first = 0; first < count; first += pass.taps) {
      Run run = {row.offset, columns[first].offset, {}};
      for (int t = 0; t < pass.taps; ++t) run.kernel[t] = row.kernel * unit.kernel + columns[first + t].kernel;
      pass.runs.push_back(run);
    }
  }
  return pass;
}

int64_t overreach(const Pass& pass, const Image& source) {
  int64_t most = 0;
  const int64_t last_row = (pass.rows - 1) * pass.source_step, last_column = (pass.columns - 1) * pass.source_step;
  for (const Run& run : pass.runs) {
    most = std::max({most, -run.row, -run.column, last_row + run.row - (source.height - 1),
                     last_column + run.column + pass.taps - 1 - (source.width - 1)});
  }
  return most;
}

int shape_index(std::vector<Image>& shapes, const Image& image) {
  for (size_t i = 0; i < shapes.size(); ++i) {
    const Image& shape = shapes[i];
    if (shape.channels == image.channels && shape.height == image.height && shape.width == image.width) return int(i);
  }
  shapes.push_back(image);
  return int(shapes.size()) - 1;
}

}  // namespace

Padding Network::padding(const Block& block) const {
  int64_t stride = 1;
  // Larger than any side: the skip then takes only the first pixel.
  for (int64_t u = 0; u < block.unit_count; ++u) {
    stride = std::min(stride * plan.units[block.first_unit + u].stride, int64_t(1) << 15);
  }
  return {stride, block.pad_before};
}

Network make_network(const Plan& plan, bool transposed, bool fold_scales) {
  Network network = {plan, {}, {}, {}, {}, {}, {}, 0};
  int64_t halo = 0;
  for (int64_t u = 0; u < plan.unit_count; ++u) {
    const Unit& unit = plan.units[u];
    const Image in = {unit.in_channels, unit.in_height, unit.in_width, 0};
    const Image out = {unit.out_channels, unit.out_height, unit.out_width, 0};
    Convolution convolution = {transposed ? out : in,
                               transposed ? in : out,
                               {},
                               plan.weights && unit.kernel > 0 ? plan.weights + unit.weight_offset : nullptr,
                               unit.kernel * unit.kernel,
                               transposed,
                               nullptr};
    const int64_t phases = unit.kernel == 0 ? 0 : transposed ? unit.stride : 1;
    for (int64_t row = 0; row < std::min(phases, convolution.target.height); ++row) {
      for (int64_t column = 0; column < std::min(phases, convolution.target.width); ++column) {
        convolution.passes.push_back(make_pass(unit, transposed, row, column, convolution.target));
        halo = std::max(halo, overreach(convolution.passes.back(), convolution.source));
      }
    }
    network.convolutions.push_back(convolution);
    network.inputs.push_back(in);
    if (unit.bits_offset < 0) {
      network.all_bits.resize(std::max<size_t>(network.all_bits.size(), unit.bits_size()), 255);
    }
  }
  for (int64_t b = 0; b < plan.block_count; ++b) {
    const Block& block = plan.blocks[b];
    if (b == 0) network.ends.push_back({block.in_channels, block.in_height, block.in_width, 0});
    network.ends.push_back({block.out_channels, block.out_height, block.out_width, 0});
    if (!fold_scales) continue;
    for (int64_t u = 0; u < block.unit_count; ++u) {
      const int64_t unit = block.first_unit + u;
      network.convolutions[unit].scales = plan.scales + plan.units[unit].scale_offset;
    }
    if (block.skip == kProjection) {
      network.convolutions[block.projection_unit].scales = network.convolutions[block.first_unit].scales;
    }
  }
  std::vector<Image> shapes;
  for (Image& image : network.ends) {
    image.halo = halo;
    network.end_shape.push_back(shape_index(shapes, image));
  }
  for (Image& image : network.inputs) {
    image.halo = halo;
    network.input_shape.push_back(shape_index(shapes, image));
  }
  for (Convolution& convolution : network.convolutions) convolution.source.halo = convolution.target.halo = halo;
  network.shapes = int(shapes.size());
  return network;
}

std::vector<int64_t> normalized_starts(const Network& network, int64_t batch) {
  std::vector<int64_t> starts = {0};
  for (size_t u = 0; u < network.inputs.size(); ++u) {
    const bool normalized = network.unit(u).scale_offset >= 0;
    starts.push_back(starts.back() + (normalized ? batch * network.inputs[u].dense() : 0));
  }
  return starts;
}

}  // namespace pathnet::cpu
