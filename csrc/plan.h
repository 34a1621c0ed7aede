// A network as kernels see it: tables of plain numbers beside packed weights and ReLU bits.
#pragma once

#include <cstdint>

namespace pathnet {

// y = conv(relu(s * x + t)); one row of the unit table. A projection is a bare convolution: no scale, no bits.
// Without bits alone there is no ReLU, without scales alone no BN. Kernel 0 stands for a BN that no convolution
// follows.
struct Unit {
  int64_t in_channels, in_height, in_width;
  int64_t out_channels, out_height, out_width;
  int64_t kernel, stride, padding;
  int64_t weight_offset;  // elements into the weights; [out, in, kernel, kernel]
  int64_t scale_offset;   // elements into the scales; -1 for none
  int64_t bits_offset;    // bytes into a sample's ReLU bits as the cpu engine lays them; -1 for none

  // Of the ReLU bits: two bytes a pixel and group of 16 channels.
  int64_t bits_size() const { return in_height * in_width * ((in_channels + 15) / 16) * 2; }
  int64_t weight_size() const { return out_channels * in_channels * kernel * kernel; }
};

// The last two lie behind the first unit's ReLU: the skips of a post-activation block, seen from sum to sum.
enum Skip : int64_t { kIdentity = 0, kProjection = 1, kPad = 2, kActivated = 3, kActivatedPad = 4 };

// One row of the block table: units [first_unit, first_unit + unit_count) are the residual module. Where its first
// unit has no BN the block is closed: a BN ends the module, in the row behind its last unit, and another a
// projection, in the row behind it. So post-activation blocks are seen in BN mode `batch`.
struct Block {
  int64_t first_unit, unit_count;
  int64_t skip;             // a Skip
  int64_t projection_unit;  // reads what the first unit's convolution reads; -1 without a projection
  int64_t in_channels, in_height, in_width;
  int64_t out_channels, out_height, out_width;

  bool skips_by_identity() const { return skip == kIdentity || skip == kActivated; }
  bool skips_by_padding() const { return skip == kPad || skip == kActivatedPad; }
  bool behind_relu() const { return skip == kActivated || skip == kActivatedPad; }
  int64_t module_end() const { return first_unit + unit_count; }
  int64_t projection_end() const { return projection_unit + 1; }
};

constexpr int64_t kUnitFields = sizeof(Unit) / sizeof(int64_t);
constexpr int64_t kBlockFields = sizeof(Block) / sizeof(int64_t);
static_assert(kUnitFields == 12 && kBlockFields == 10, "the tables' columns, in pathnet/native.py too");

struct Plan {
  const Block* blocks;
  int64_t block_count;
  const Unit* units;
  int64_t unit_count;
  const float* weights;
  const float* scales;
  const uint8_t* relu_bits;  // [batch, bits_stride]
  int64_t bits_stride;

  bool closed(const Block& block) const { return units[block.first_unit].scale_offset < 0; }
};

}  // namespace pathnet
