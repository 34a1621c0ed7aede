// Checks of a plan's tables: a kernel that reads checked ones stays within its buffers.
#pragma once

#include <algorithm>
#include <vector>

#include "checks.h"
#include "plan.h"

namespace pathnet {

// Largest side and number of channels of an image; with it no product of a shape's sizes leaves int64.
constexpr int64_t kLargestSize = 1 << 15;

// Bytes of a sample's ReLU bits beyond any memory; with it no offset and size leave int64.
constexpr int64_t kMostBitsBytes = int64_t(1) << 40;

// Sizes of the memory that offsets in the tables point into: elements of weights and scales, bytes of a sample's ReLU
// bits.
struct PlanSizes {
  int64_t weights, scales, bits;
};

inline void check_scale(const Unit& unit, int64_t index, const PlanSizes& sizes) {
  STD_TORCH_CHECK(unit.scale_offset >= 0 && unit.scale_offset <= sizes.scales - unit.in_channels,
                  "units: expected a scale offset within ", sizes.scales, " scales in row ", index, ", got ",
                  unit.scale_offset);
}

// Checks a convolution, of a module or a projection.
inline void check_unit(const Unit& unit, int64_t index, bool projection, bool normalized, const PlanSizes& sizes) {
  for (int64_t size : {unit.in_channels, unit.in_height, unit.in_width, unit.out_channels, unit.out_height,
                       unit.out_width, unit.kernel, unit.stride}) {
    STD_TORCH_CHECK(size >= 1 && size <= kLargestSize, "units: expected sizes 1 to ", kLargestSize, " in row ", index,
                    ", got ", size);
  }
  STD_TORCH_CHECK(unit.padding >= 0 && unit.padding < unit.kernel, "units: expected padding below the kernel in row ",
                  index, ", got ", unit.padding);
  const int64_t in_sides[] = {unit.in_height, unit.in_width}, out_sides[] = {unit.out_height, unit.out_width};
  for (int d = 0; d < 2; ++d) {
    const int64_t room = in_sides[d] + 2 * unit.padding - unit.kernel;
    STD_TORCH_CHECK(room >= 0 && room / unit.stride + 1 == out_sides[d], "units: expected the output side of row ",
                    index, " to follow from its input, kernel, stride and padding, got ", out_sides[d]);
  }
  STD_TORCH_CHECK(unit.weight_offset >= 0 && unit.weight_offset <= sizes.weights - unit.weight_size(),
                  "units: expected a weight offset within ", sizes.weights, " weights in row ", index, ", got ",
                  unit.weight_offset);
  if (projection) {
    STD_TORCH_CHECK(unit.scale_offset == -1 && unit.bits_offset == -1,
                    "units: expected no scale and no bits (-1) for the projection in row ", index, ", got ",
                    unit.scale_offset, " and ", unit.bits_offset);
    return;
  }
  if (normalized) check_scale(unit, index, sizes);
  STD_TORCH_CHECK(unit.bits_offset == -1 || (unit.bits_offset >= 0 && unit.bits_offset % 2 == 0 &&
                                             unit.bits_offset <= sizes.bits - unit.bits_size()),
                  "units: expected an even bits offset within ", sizes.bits, " bytes (-1 for none) in row ", index,
                  ", got ", unit.bits_offset);
}

inline bool chains(const Unit& unit, const Unit& next) {
  return unit.out_channels == next.in_channels && unit.out_height == next.in_height &&
         unit.out_width == next.in_width;
}

// Checks the BN that ends a module or a projection, after its last convolution.
inline void check_end(const Plan& plan, int64_t index, const PlanSizes& sizes) {
  STD_TORCH_CHECK(index < plan.unit_count, "units: expected a row for the BN that ends row ", index - 1);
  const Unit &unit = plan.units[index], &before = plan.units[index - 1];
  STD_TORCH_CHECK(unit.kernel == 0 && unit.bits_offset == -1 && chains(before, unit) && chains(unit, unit),
                  "units: expected in row ", index, " the BN (kernel 0, no bits) of what row ", index - 1, " gives");
  check_scale(unit, index, sizes);
}

inline void check_block(const Plan& plan, int64_t index, const PlanSizes& sizes) {
  const Block& block = plan.blocks[index];
  STD_TORCH_CHECK(block.first_unit >= 0 && block.unit_count >= 1 && block.unit_count <= plan.unit_count &&
                      block.first_unit <= plan.unit_count - block.unit_count,
                  "blocks: expected units within ", plan.unit_count, " in row ", index, ", got ", block.unit_count,
                  " from ", block.first_unit);
  const Unit* units = plan.units + block.first_unit;
  const bool closed = plan.closed(block);
  STD_TORCH_CHECK(!closed || units[0].scale_offset == -1, "units: expected -1 for no scale in row ", block.first_unit,
                  ", got ", units[0].scale_offset);
  for (int64_t u = 0; u < block.unit_count; ++u) {
    check_unit(units[u], block.first_unit + u, false, u > 0 || !closed, sizes);
    STD_TORCH_CHECK(u == 0 || chains(units[u - 1], units[u]), "units: expected row ", block.first_unit + u,
                    " to take what the row before it gives");
  }
  if (closed) check_end(plan, block.module_end(), sizes);
  STD_TORCH_CHECK(!block.behind_relu() || units[0].bits_offset >= 0,
                  "blocks: expected skip 0, 1 or 2 before a unit "
                  "without ReLU in row ",
                  index, ", got ", block.skip);
  STD_TORCH_CHECK(block.skips_by_padding() || block.pad_before == 0,
                  "blocks: expected no zero channels (0) before those of a skip that pads none in row ", index,
                  ", got ", block.pad_before);
  const Unit& last = units[block.unit_count - 1];
  const Unit ends = {block.in_channels,
                     block.in_height,
                     block.in_width,
                     block.out_channels,
                     block.out_height,
                     block.out_width,
                     1,
                     1,
                     0,
                     0,
                     -1,
                     -1};
  auto same_ends = [](const Unit& a, const Unit& from, const Unit& to) {
    return a.in_channels == from.in_channels && a.in_height == from.in_height && a.in_width == from.in_width &&
           a.out_channels == to.out_channels && a.out_height == to.out_height && a.out_width == to.out_width;
  };
  STD_TORCH_CHECK(same_ends(ends, units[0], last), "blocks: expected the shapes of row ", index,
                  " to be those of its units");
  if (block.skip == kProjection) {
    STD_TORCH_CHECK(block.projection_unit >= 0 && block.projection_unit < plan.unit_count,
                    "blocks: expected a projection unit within ", plan.unit_count, " in row ", index, ", got ",
                    block.projection_unit);
    const Unit& projection = plan.units[block.projection_unit];
    check_unit(projection, block.projection_unit, true, false, sizes);
    STD_TORCH_CHECK(same_ends(projection, units[0], last), "units: expected the projection in row ",
                    block.projection_unit, " to have its block's shapes");
    if (closed) check_end(plan, block.projection_end(), sizes);
    return;
  }
  STD_TORCH_CHECK(block.projection_unit == -1, "blocks: expected no projection unit (-1) in row ", index, ", got ",
                  block.projection_unit);
  if (block.skips_by_padding()) {
    int64_t stride = 1;
    for (int64_t u = 0; u < block.unit_count; ++u) stride = std::min(stride * units[u].stride, kLargestSize);
    STD_TORCH_CHECK((block.in_height + stride - 1) / stride == block.out_height &&
                        (block.in_width + stride - 1) / stride == block.out_width &&
                        block.in_channels <= block.out_channels,
                    "blocks: expected row ", index, " to take every ", stride, "-th pixel and add channels");
    const int64_t added = block.out_channels - block.in_channels;
    STD_TORCH_CHECK(block.pad_before >= 0 && block.pad_before <= added, "blocks: expected 0 to ", added,
                    " zero channels before the input's in row ", index, ", got ", block.pad_before);
    return;
  }
  STD_TORCH_CHECK(block.skips_by_identity(), "blocks: expected skip 0 to 4 in row ", index, ", got ", block.skip);
  STD_TORCH_CHECK(block.in_channels == block.out_channels && block.in_height == block.out_height &&
                      block.in_width == block.out_width,
                  "blocks: expected equal shapes around the identity skip of row ", index);
}

inline void check_plan(const Plan& plan, const PlanSizes& sizes) {
  for (int64_t b = 0; b < plan.block_count; ++b) {
    check_block(plan, b, sizes);
    if (b == 0) continue;
    const Block &before = plan.blocks[b - 1], &block = plan.blocks[b];
    STD_TORCH_CHECK(before.out_channels == block.in_channels && before.out_height == block.in_height &&
                        before.out_width == block.in_width,
                    "blocks: expected row ", b, " to take what the row before it gives");
  }
  // Packing visits all units, so each must belong to a block.
  std::vector<int> owners(plan.unit_count, 0);
  for (int64_t b = 0; b < plan.block_count; ++b) {
    const Block& block = plan.blocks[b];
    const bool closed = plan.closed(block);
    for (int64_t u = 0; u < block.unit_count + closed; ++u) ++owners[block.first_unit + u];
    for (int64_t u = 0; block.skip == kProjection && u < 1 + closed; ++u) ++owners[block.projection_unit + u];
  }
  for (int64_t u = 0; u < plan.unit_count; ++u) {
    STD_TORCH_CHECK(owners[u] == 1, "units: expected row ", u, " to belong to one block, got ", owners[u]);
  }
}

// BN mode `running` has no closed blocks: there the last BN is part of weights and biases. In mode `batch` skips
// after the ReLU need closed blocks, and a network has either closed blocks or others.
inline void check_closed(const Plan& plan, bool batch) {
  for (int64_t b = 0; b < plan.block_count; ++b) {
    const bool closed = plan.closed(plan.blocks[b]);
    STD_TORCH_CHECK(batch || !closed, "units: expected a scale for this pass in row ", plan.blocks[b].first_unit);
    STD_TORCH_CHECK(closed == plan.closed(plan.blocks[0]),
                    "units: expected a scale in the first unit of every block or "
                    "of none, got another in row ",
                    plan.blocks[b].first_unit);
    STD_TORCH_CHECK(!batch || closed || !plan.blocks[b].behind_relu(),
                    "blocks: expected skip 0, 1 or 2 for this pass in row ", b, ", got ", plan.blocks[b].skip);
  }
}

// The tables of a plan, with their shapes and offsets checked.
inline Plan checked_tables(const Tensor& blocks, const Tensor& units, const PlanSizes& sizes) {
  check_dtype("blocks", blocks, ScalarType::Long);
  check_dtype("units", units, ScalarType::Long);
  check_shape("blocks", blocks, {-1, kBlockFields});
  STD_TORCH_CHECK(blocks.size(0) >= 1, "blocks: expected at least one row, got none");
  check_shape("units", units, {-1, kUnitFields});
  const Plan plan = {reinterpret_cast<const Block*>(blocks.const_data_ptr<int64_t>()),
                     blocks.size(0),
                     reinterpret_cast<const Unit*>(units.const_data_ptr<int64_t>()),
                     units.size(0),
                     nullptr,
                     nullptr,
                     nullptr,
                     sizes.bits};
  check_plan(plan, sizes);
  return plan;
}

// A plan with weights and BN's factors, to be packed.
inline Plan checked_plan(const Tensor& blocks, const Tensor& units, const Tensor& weights, const Tensor& scales) {
  const float *weight_values = checked_row("weights", weights), *scale_values = checked_row("scales", scales);
  Plan plan = checked_tables(blocks, units, {weights.numel(), scales.numel(), kMostBitsBytes});
  plan.weights = weight_values;
  plan.scales = scale_values;
  return plan;
}

}  // namespace pathnet
