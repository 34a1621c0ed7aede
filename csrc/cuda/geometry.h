// Where everything lies: the index arithmetic of the whole-path kernels. It compiles for the host too, where the
// kernels' twin and its tests run it; nothing here knows threads or memory.
//
// An image (the gradient, the intermediate, an operand) lies in memory (shared, or a thread block's part of a scratch
// in global memory, whose rows are copied to shared memory as they lie) pixel by pixel with a border of one zero
// pixel, so that no tap of a 3x3 convolution needs a bounds test. The channels of a pixel are 16-byte units of eight
// bf16; the units of neighbouring pixels are exchanged (swizzled) so that eight neighbouring pixels' units of one
// channel group lie in eight different groups of banks: every ldmatrix and every store of results is conflict-free.
//
// A convolution is cut into strips, eight pixels wide and strip_rows() high. A warp computes two strips at a time,
// eight pixels of each being the sixteen rows of an m16n8k16 product, so that any side serves.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define PATHNET_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define PATHNET_HOST_DEVICE inline
#endif

namespace pathnet::cuda {

constexpr int kWarpSize = 32;
constexpr int kStripWidth = 8;   // pixels; with the other strip of a pair the 16 rows of a product
constexpr int kChannelTile = 8;  // output channels of one product: its columns
constexpr int kReduced = 16;     // channels that one product sums over
constexpr int kStripRows = 8;    // at most; images are filled up to it
constexpr int kUnitBytes = 16;   // eight bf16
constexpr int kMaxChannels = 64;

PATHNET_HOST_DEVICE int ceil_div(int value, int by) { return (value + by - 1) / by; }

// Division by a number that the host knows: exact while value * divisor < 2^20.
struct Divider {
  int32_t divisor, multiplier;

  PATHNET_HOST_DEVICE int quotient(int value) const { return int(uint64_t(value) * uint32_t(multiplier) >> 20); }
};

PATHNET_HOST_DEVICE Divider divider(int divisor) { return {divisor, ((1 << 20) + divisor - 1) / divisor}; }

// An image in memory. Channels are a multiple of 16; those that the network lacks hold zeros.
struct Image {
  int32_t channels, height, width;

  PATHNET_HOST_DEVICE int tiles() const { return channels / kChannelTile; }
  // Rows of a strip: 64 results a thread with two column tiles at 16 channels, with four beyond.
  PATHNET_HOST_DEVICE int strip_rows() const { return channels == 16 ? kStripRows : kStripRows / 2; }
  PATHNET_HOST_DEVICE int strips_across() const { return ceil_div(width, kStripWidth); }
  PATHNET_HOST_DEVICE int strips() const { return ceil_div(height, strip_rows()) * strips_across(); }

  // Rows are filled up to whole strips with zeros, so that neither readings nor stores of a strip ask where it ends.
  PATHNET_HOST_DEVICE int pitch() const { return width + 2; }
  PATHNET_HOST_DEVICE int rows() const { return ceil_div(height, kStripRows) * kStripRows + 2; }
  PATHNET_HOST_DEVICE int pixels() const { return rows() * pitch(); }
  // The pixel of the border's coordinates: (0, 0) is the border's corner, (1, 1) the image's first pixel.
  PATHNET_HOST_DEVICE int pixel(int row, int column) const { return row * pitch() + column; }

  // Units of a pixel, a power of two: 2, 4 or 8.
  PATHNET_HOST_DEVICE int unit_shift() const { return channels == 16 ? 1 : channels == 32 ? 2 : 3; }
  PATHNET_HOST_DEVICE int plane_bytes() const { return ceil_div(pixels() << unit_shift(), 8) * 8 * kUnitBytes; }

  // Byte of a unit of a plane that begins at `base`, a multiple of 128. Eight units of 16 bytes span all banks, hence
  // 8 >> unit_shift() pixels. Of a group of units that is a power of two in size and aligned, unit t has the byte of
  // the first, exclusive or 16 t.
  PATHNET_HOST_DEVICE int unit_byte(int base, int pixel, int unit) const {
    const int shift = unit_shift(), swizzle = (pixel >> (3 - shift)) & ((1 << shift) - 1);
    return (base + (pixel << (shift + 4))) ^ (unit * kUnitBytes) ^ (swizzle * kUnitBytes);
  }
  // Byte of the pair of channels that a lane holds of a tile.
  PATHNET_HOST_DEVICE int pair_byte(int base, int pixel, int tile, int lane) const {
    return unit_byte(base, pixel, tile) + lane % 4 * 4;
  }

  // ReLU bits of a sample, in the order in which threads hold results: [strip][lane][tile][strip_rows() * 2 bits].
  PATHNET_HOST_DEVICE int tile_bits_bytes() const { return strip_rows() / 4; }
  PATHNET_HOST_DEVICE int bits_bytes() const { return strips() * kWarpSize * tiles() * tile_bits_bytes(); }
  PATHNET_HOST_DEVICE int bits_byte(int strip, int lane, int tile) const {
    return ((strip * kWarpSize + lane) * tiles() + tile) * tile_bits_bytes();
  }

  // Elements of a sample in the same order, for float32 in global memory: [strip][row][tile][lane][2].
  PATHNET_HOST_DEVICE int lane_order_size() const { return strips() * strip_rows() * tiles() * kWarpSize * 2; }
  PATHNET_HOST_DEVICE int lane_order_index(int strip, int row, int tile, int lane) const {
    return (((strip * strip_rows() + row) * tiles() + tile) * kWarpSize + lane) * 2;
  }
};

// What a thread holds of an m16n8 result: rows lane / 4 (pixel of the first strip) and lane / 4 + 8 (of the second),
// two neighbouring channels of each.
PATHNET_HOST_DEVICE int lane_pixel(int lane) { return lane / 4; }
PATHNET_HOST_DEVICE int lane_channel(int lane) { return lane % 4 * 2; }
PATHNET_HOST_DEVICE int lane_of(int pixel, int channel) { return pixel * 4 + channel / 2; }
PATHNET_HOST_DEVICE int bit_in_tile(int row, int channel) { return row * 2 + channel % 2; }

// Bit of one element in a sample's bits, eight a byte.
PATHNET_HOST_DEVICE int bit_index(const Image& image, int channel, int y, int x) {
  const int strip = y / image.strip_rows() * image.strips_across() + x / kStripWidth;
  const int lane = lane_of(x % kStripWidth, channel % kChannelTile);
  return image.bits_byte(strip, lane, channel / kChannelTile) * 8 + bit_in_tile(y % image.strip_rows(), channel);
}

// ldmatrix.x4 fills a 16 x 16 operand from four 8 x 8 matrices, lane l giving the address of row l % 8 of matrix
// l / 8: pixels of strip `half`, and the first or second unit of the sixteen channels.
PATHNET_HOST_DEVICE int address_half(int lane) { return lane / 8 % 2; }
PATHNET_HOST_DEVICE int address_pixel(int lane) { return lane % 8; }
PATHNET_HOST_DEVICE int address_unit(int lane) { return lane / 16; }

// Packed weights of one chunk (sixteen of the channels summed over): [part][tap][tile][lane][4]. Element i of a lane
// is one of row fragment_row, column fragment_column of the 16 x 8 operand.
PATHNET_HOST_DEVICE int fragment_row(int lane, int i) { return lane % 4 * 2 + i % 2 + i / 2 * 8; }
PATHNET_HOST_DEVICE int fragment_column(int lane) { return lane / 4; }
PATHNET_HOST_DEVICE int fragment_index(int tiles, int slice, int tile, int lane) {
  return ((slice * tiles + tile) * kWarpSize + lane) * 4;
}
PATHNET_HOST_DEVICE int chunk_bytes(int parts, int taps, int tiles) {
  return parts * taps * tiles * kWarpSize * 4 * 2;
}

// Taps are numbered column by column, as the vertical reuse of the product reads them.
PATHNET_HOST_DEVICE int tap_index(int kernel, int row, int column) { return column * kernel + row; }

// Coordinates along one axis for the product's grid: grid position p of class `parity` reads source position
// p * source_step + offset(tap) and gives target position p * target_step + parity. Forward, and backward with
// stride 1, there is one class; backward with stride 2 the target's even and odd positions are classes of their own,
// since different taps reach them.
struct Axis {
  int32_t source_step, target_step, parity, taps;
  int32_t first_tap, tap_step;        // of the packed weights
  int32_t first_offset, offset_step;  // of the source, in pixels

  PATHNET_HOST_DEVICE int tap(int i) const { return first_tap + i * tap_step; }
  PATHNET_HOST_DEVICE int offset(int i) const { return first_offset + i * offset_step; }
};

PATHNET_HOST_DEVICE Axis forward_axis(int kernel, int stride) {
  return {stride, 1, 0, kernel, 0, 1, -(kernel / 2), 1};
}

// The transposed convolution's taps are packed flipped: target t takes source (t + padding - tap) / stride of the
// forward's tap, hence of packed tap f (the forward's kernel - 1 - f) source (t - padding + f) / stride.
PATHNET_HOST_DEVICE Axis backward_axis(int kernel, int stride, int parity) {
  if (stride == 1) return {1, 1, 0, kernel, 0, 1, -(kernel / 2), 1};
  if (kernel == 1) return {1, 2, 0, 1, 0, 1, 0, 1};
  if (parity == 0) return {1, 2, 0, 1, 1, 1, 0, 1};
  return {1, 2, 1, 2, 0, 2, 0, 1};
}

// One class of a convolution's target positions, as a grid of strips; a warp takes a unit, a pair of strips and a
// group of column tiles, at a time. Where images do not stay in shared memory the grid is computed a window at a
// time: so many lines of strips that the rows of the source which they read fit.
struct Pass {
  Axis vertical, horizontal;
  int32_t height, width;  // of the grid
  int32_t read_height;    // of the grid: the rows whose source is read, those of whole strips by a dense product
  int32_t all_strips;     // of a sample
  int32_t windows;
  Divider strips;  // of a sample in a window; the last window may have fewer
  Divider across;  // strips in a line of strips
  Divider groups;  // of column tiles

  PATHNET_HOST_DEVICE int units(int samples) const { return (samples * strips.divisor + 1) / 2 * groups.divisor; }
  PATHNET_HOST_DEVICE int window_lines() const { return across.quotient(strips.divisor); }
  PATHNET_HOST_DEVICE int lines() const { return across.quotient(all_strips); }
};

PATHNET_HOST_DEVICE Pass make_pass(const Image& target, const Axis& vertical, const Axis& horizontal,
                                   int column_tiles, bool dense) {
  const auto size = [](int of, const Axis& axis) {
    return (of - axis.parity + axis.target_step - 1) / axis.target_step;
  };
  const Image grid = {target.channels, size(target.height, vertical), size(target.width, horizontal)};
  return {vertical,
          horizontal,
          grid.height,
          grid.width,
          dense ? ceil_div(grid.height, grid.strip_rows()) * grid.strip_rows() : grid.height,
          grid.strips(),
          1,
          divider(grid.strips()),
          divider(grid.strips_across()),
          divider(target.tiles() / column_tiles)};
}

// The same pass, so many lines of strips at a time.
PATHNET_HOST_DEVICE Pass in_windows(Pass pass, int lines) {
  pass.windows = ceil_div(pass.lines(), lines);
  pass.strips = divider(lines * pass.across.divisor);
  return pass;
}

// What one window holds of a source: whole rows with their border, as they lie in the image. It begins at a multiple
// of eight pixels, after which the swizzle repeats.
struct Window {
  int first, pixels;

  PATHNET_HOST_DEVICE Window(const Image& source, const Pass& pass, int strip_rows, int window) {
    const int from = window * pass.window_lines() * strip_rows, all = from + pass.window_lines() * strip_rows;
    const int to = all < pass.read_height ? all : pass.read_height;
    const Axis& axis = pass.vertical;
    first = source.pixel(from * axis.source_step + axis.offset(0) + 1, 0) / 8 * 8;
    pixels = source.pixel((to - 1) * axis.source_step + axis.offset(axis.taps - 1) + 2, 0) - first;
  }
};

// One strip of a unit's pair: the first (half 0) or the second.
struct Strip {
  int sample, index, y, x;
  bool there;

  Strip() = default;
  PATHNET_HOST_DEVICE Strip(const Pass& pass, int rows, int samples, int window, int unit, int half) {
    const int number = pass.groups.quotient(unit) * 2 + half;
    const int before = window * pass.strips.divisor;  // strips of a sample in earlier windows
    there = number < samples * pass.strips.divisor;
    sample = pass.strips.quotient(there ? number : 0);
    index = (there ? number : 0) - sample * pass.strips.divisor;
    // The last window may end early; the first is whole.
    if (window > 0 && before + index >= pass.all_strips) {
      there = false;
      index = 0;
    }
    const int line = pass.across.quotient(index), first_line = window > 0 ? window * pass.window_lines() : 0;
    y = (first_line + line) * rows;
    x = (index - line * pass.across.divisor) * kStripWidth;
    index += before;
  }
};

PATHNET_HOST_DEVICE int first_tile(const Pass& pass, int unit, int column_tiles) {
  return (unit - pass.groups.quotient(unit) * pass.groups.divisor) * column_tiles;
}

}  // namespace pathnet::cuda
