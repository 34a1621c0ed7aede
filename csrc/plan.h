// A network as kernels see it: tables of plain numbers, weights, and ReLU bits.
#pragma once

#include <cstdint>

namespace pathnet {

// A row of the unit table: y = conv(relu(s * x + t)). Without scales there is no BN, without bits no ReLU; a
// projection has neither. Kernel 0 stands for a BN that no convolution follows.
struct Unit {
  int64_t in_channels, in_height, in_width;
  int64_t out_channels, out_height, out_width;
  int64_t kernel, stride, padding;
  int64_t weight_offset;  // elements into the weights; [out, in, kernel, kernel]
  int64_t scale_offset;   // elements into the scales; -1 for none
  int64_t bits_offset;    // bytes into a sample's ReLU bits in the cpu engine's layout; -1 for none

  // Bytes of the ReLU bits: two for each pixel and group of 16 channels.
  int64_t bits_size() const { return in_height * in_width * ((in_channels + 15) / 16) * 2; }
  int64_t weight_size() const { return out_channels * in_channels * kernel * kernel; }
};

// The last two start after the first unit's ReLU: they are skips of post-activation blocks, whose boundaries are at
// the additions.
enum Skip : int64_t { kIdentity = 0, kProjection = 1, kPad = 2, kActivated = 3, kActivatedPad = 4 };

// A row of the block table: units [first_unit, first_unit + unit_count) are the residual module. The block is closed
// if its first unit has no BN: then a BN ends the module, in the row after its last unit, and another one the
// projection, in the row after it. Post-activation blocks have this form in BN mode `batch`.
struct Block {
  int64_t first_unit, unit_count;
  int64_t skip;             // a Skip
  int64_t projection_unit;  // its convolution has the source of the first unit's; -1 without a projection
  int64_t in_channels, in_height, in_width;
  int64_t out_channels, out_height, out_width;
  int64_t pad_before;  // zero channels that a padding skip adds before those of the input; 0 for any other skip

  bool skips_by_identity() const { return skip == kIdentity || skip == kActivated; }
  bool skips_by_padding() const { return skip == kPad || skip == kActivatedPad; }
  bool behind_relu() const { return skip == kActivated || skip == kActivatedPad; }
  int64_t module_end() const { return first_unit + unit_count; }
  int64_t projection_end() const { return projection_unit + 1; }
};

constexpr int64_t kUnitFields = sizeof(Unit) / sizeof(int64_t);
constexpr int64_t kBlockFields = sizeof(Block) / sizeof(int64_t);
static_assert(kUnitFields == 12 && kBlockFields == 11, "the columns in pathnet/engines/tables.py");

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
