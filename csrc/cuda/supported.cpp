#include "supported.h"

#include <stdexcept>
#include <string>

namespace pathnet::cuda {
namespace {

[[noreturn]] void refuse(int64_t block, const std::string& reason) {
  throw std::invalid_argument("block " + std::to_string(block) + ": it " + reason);
}

// Pixels of an image with its border; keeps the bytes of a thread block's images below 2^31.
constexpr int64_t kMaxPixels = 1 << 16;

// Elements of a sample in whole strips; keeps two copies for 256 thread blocks below 2^31. A column of pixels takes a
// strip of eight.
constexpr int kMaxElements = 1 << 22;

void check_unit(const Plan& plan, int64_t index, const Unit& unit) {
  // The first block activates the network's input itself; every later unit is activated by an epilogue.
  const bool bare = index == 0 && &unit == &plan.units[plan.blocks[index].first_unit];
  if (unit.scale_offset < 0 || (unit.bits_offset < 0 && !bare)) {
    refuse(index, "has a convolution without BN and ReLU");
  }
  if (unit.kernel != 3 || unit.padding != 1) refuse(index, "has a convolution that is not 3x3 with padding 1");
  if (unit.in_channels > kMaxChannels || unit.out_channels > kMaxChannels) {
    refuse(index, "has more than " + std::to_string(kMaxChannels) + " channels");
  }
}

}  // namespace

void check_supported(const Plan& plan, int64_t index) {
  const Block& block = plan.blocks[index];
  // First, since everything after is computed in 32 bits.
  for (int64_t pixels :
       {(block.in_height + 8) * (block.in_width + 2), (block.out_height + 8) * (block.out_width + 2)}) {
    if (pixels > kMaxPixels) {
      refuse(index, "has images of more than " + std::to_string(kMaxPixels) + " pixels with their borders");
    }
  }
  if (block.unit_count != 2) refuse(index, "is not a basic block (two convolutions)");
  const Unit& first = plan.units[block.first_unit];
  const Unit& second = plan.units[block.first_unit + 1];
  for (const Unit* unit : {&first, &second}) check_unit(plan, index, *unit);
  for (const Image& image : {padded(block.in_channels, block.in_height, block.in_width),
                             padded(block.out_channels, block.out_height, block.out_width)}) {
    if (image.lane_order_size() > kMaxElements) {
      refuse(index, "has images of more than " + std::to_string(kMaxElements) + " numbers in strips of eight pixels");
    }
  }
  if (first.stride > 2 || second.stride != 1)
    refuse(index, "has a stride other than 1, or 2 in its first convolution");
  if (round_up(first.out_channels, kReduced) != round_up(second.out_channels, kReduced)) {
    refuse(index, "has convolutions of different widths");
  }
  if (block.skip == kProjection) {
    const Unit& projection = plan.units[block.projection_unit];
    if (projection.kernel != 1 || projection.padding != 0 || projection.stride != first.stride) {
      refuse(index, "has a projection that is not 1x1 with the stride of its first convolution");
    }
  }
}

}  // namespace pathnet::cuda
