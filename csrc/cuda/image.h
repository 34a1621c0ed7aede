// The layout of images, ReLU bits and packed weights: index arithmetic only. It compiles for the host too, where the
// kernels' twin and its tests run it; nothing here knows threads or memory.
//
// An image (the gradient, the intermediate, an operand) is in shared memory, or in a thread block's part of a
// scratch in global memory whose rows are copied to shared memory unchanged. It is stored pixel by pixel with a
// border of one zero pixel, so no tap of a 3x3 convolution needs a bounds check. The channels of a pixel are
// 16-byte units of eight bf16. The units are swizzled: those of one channel group in eight neighbouring pixels are in
// eight different groups of banks, so every ldmatrix and every store of results is free of bank conflicts.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define PATHNET_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define PATHNET_HOST_DEVICE inline
#endif

namespace pathnet::cuda {

constexpr int kWarpSize = 32;
constexpr int kStripWidth = 8;   // pixels; two strips give the 16 rows of an m16n8k16 product
constexpr int kChannelTile = 8;  // output channels of one product: its columns
constexpr int kReduced = 16;     // channels that one product sums over
constexpr int kStripRows = 8;    // largest height of a strip; images are padded to a multiple of it
constexpr int kUnitBytes = 16;   // eight bf16
constexpr int kMaxChannels = 64;

PATHNET_HOST_DEVICE int ceil_div(int value, int by) { return (value + by - 1) / by; }

// Returns `value` rounded up to a multiple of `multiple`.
inline int round_up(int64_t value, int64_t multiple) { return int((value + multiple - 1) / multiple * multiple); }

// Division by a number known to the host, exact while value * divisor < 2^20.
struct Divider {
  int32_t divisor, multiplier;

  PATHNET_HOST_DEVICE int quotient(int value) const { return int(uint64_t(value) * uint32_t(multiplier) >> 20); }
};

PATHNET_HOST_DEVICE Divider divider(int divisor) { return {divisor, ((1 << 20) + divisor - 1) / divisor}; }

// The shape of an image in memory. Channels are padded to a multiple of 16 with zeros.
struct Image {
  int32_t channels, height, width;

  PATHNET_HOST_DEVICE int tiles() const { return channels / kChannelTile; }
  // Rows of a strip: a thread holds 64 results with two column tiles at 16 channels, and with four beyond.
  PATHNET_HOST_DEVICE int strip_rows() const { return channels == 16 ? kStripRows : kStripRows / 2; }
  PATHNET_HOST_DEVICE int strips_across() const { return ceil_div(width, kStripWidth); }
  PATHNET_HOST_DEVICE int strips() const { return ceil_div(height, strip_rows()) * strips_across(); }

  // Rows are padded with zeros to whole strips, so no load or store of a strip checks where the image ends.
  PATHNET_HOST_DEVICE int pitch() const { return width + 2; }
  PATHNET_HOST_DEVICE int rows() const { return ceil_div(height, kStripRows) * kStripRows + 2; }
  PATHNET_HOST_DEVICE int pixels() const { return rows() * pitch(); }
  // Index of a pixel, border included: (0, 0) is the corner of the border, (1, 1) the image's first pixel.
  PATHNET_HOST_DEVICE int pixel(int row, int column) const { return row * pitch() + column; }

  // Units of a pixel, a power of two: 2, 4 or 8.
  PATHNET_HOST_DEVICE int unit_shift() const { return channels == 16 ? 1 : channels == 32 ? 2 : 3; }
  PATHNET_HOST_DEVICE int plane_bytes() const { return ceil_div(pixels() << unit_shift(), 8) * 8 * kUnitBytes; }

  // Byte of a unit of a plane that begins at `base`, a multiple of 128. Eight units of 16 bytes span all banks, hence
  // 8 >> unit_shift() pixels. Within an aligned group of units whose size is a power of two, the byte of unit t is
  // that of the first XOR 16 t.
  PATHNET_HOST_DEVICE int unit_byte(int base, int pixel, int unit) const {
    const int shift = unit_shift(), swizzle = (pixel >> (3 - shift)) & ((1 << shift) - 1);
    return (base + (pixel << (shift + 4))) ^ (unit * kUnitBytes) ^ (swizzle * kUnitBytes);
  }
  // Byte of the pair of channels of a tile that a lane holds.
  PATHNET_HOST_DEVICE int pair_byte(int base, int pixel, int tile, int lane) const {
    return unit_byte(base, pixel, tile) + lane % 4 * 4;
  }

  // ReLU bits of a sample, in the order in which threads hold results: [strip][lane][tile][strip_rows() * 2 bits].
  PATHNET_HOST_DEVICE int tile_bits_bytes() const { return strip_rows() / 4; }
  PATHNET_HOST_DEVICE int bits_bytes() const { return strips() * kWarpSize * tiles() * tile_bits_bytes(); }
  PATHNET_HOST_DEVICE int bits_byte(int strip, int lane, int tile) const {
    return ((strip * kWarpSize + lane) * tiles() + tile) * tile_bits_bytes();
  }

  // Elements of a sample in lane order, for float32 in global memory: [strip][row][tile][lane][2].
  PATHNET_HOST_DEVICE int lane_order_size() const { return strips() * strip_rows() * tiles() * kWarpSize * 2; }
  PATHNET_HOST_DEVICE int lane_order_index(int strip, int row, int tile, int lane) const {
    return (((strip * strip_rows() + row) * tiles() + tile) * kWarpSize + lane) * 2;
  }
};

// Returns the image with its channels padded to a multiple of 16.
inline Image padded(int64_t channels, int64_t height, int64_t width) {
  return {int32_t(round_up(channels, kReduced)), int32_t(height), int32_t(width)};
}

// A thread's elements of an m16n8 result: rows lane / 4 (a pixel of the first strip) and lane / 4 + 8 (of the
// second), two neighbouring channels of each.
PATHNET_HOST_DEVICE int lane_pixel(int lane) { return lane / 4; }
PATHNET_HOST_DEVICE int lane_channel(int lane) { return lane % 4 * 2; }
PATHNET_HOST_DEVICE int lane_of(int pixel, int channel) { return pixel * 4 + channel / 2; }
PATHNET_HOST_DEVICE int bit_in_tile(int row, int channel) { return row * 2 + channel % 2; }

// Index of an element's bit among the ReLU bits of a sample, eight bits a byte.
PATHNET_HOST_DEVICE int bit_index(const Image& image, int channel, int y, int x) {
  const int strip = y / image.strip_rows() * image.strips_across() + x / kStripWidth;
  const int lane = lane_of(x % kStripWidth, channel % kChannelTile);
  return image.bits_byte(strip, lane, channel / kChannelTile) * 8 + bit_in_tile(y % image.strip_rows(), channel);
}

// ldmatrix.x4 fills a 16 x 16 operand from four 8 x 8 matrices; lane l gives the address of row l % 8 of matrix
// l / 8. The row is a pixel of strip `half`, and holds the first or the second unit of the sixteen channels.
PATHNET_HOST_DEVICE int address_half(int lane) { return lane / 8 % 2; }
PATHNET_HOST_DEVICE int address_pixel(int lane) { return lane % 8; }
PATHNET_HOST_DEVICE int address_unit(int lane) { return lane / 16; }

// Packed weights of one chunk (sixteen of the channels summed over): [part][tap][tile][lane][4]. Element i of a lane
// is in row fragment_row and column fragment_column of the 16 x 8 operand.
PATHNET_HOST_DEVICE int fragment_row(int lane, int i) { return lane % 4 * 2 + i % 2 + i / 2 * 8; }
PATHNET_HOST_DEVICE int fragment_column(int lane) { return lane / 4; }
PATHNET_HOST_DEVICE int fragment_index(int tiles, int slice, int tile, int lane) {
  return ((slice * tiles + tile) * kWarpSize + lane) * 4;
}
PATHNET_HOST_DEVICE int chunk_bytes(int parts, int taps, int tiles) {
  return parts * taps * tiles * kWarpSize * 4 * 2;
}

// Taps are numbered column by column, so that a product's vertical reuse reads them in order.
PATHNET_HOST_DEVICE int tap_index(int kernel, int row, int column) { return column * kernel + row; }

}  // namespace pathnet::cuda
