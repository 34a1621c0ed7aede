// The parts that a convolution is cut into: passes over classes of target positions, windows, strips and units.
//
// A convolution is cut into strips, eight pixels wide and strip_rows() high. A warp computes two strips at a time:
// eight pixels of each are the sixteen rows of an m16n8k16 product, so images of any side fit.
#pragma once

#include "image.h"

namespace pathnet::cuda {

// Coordinates along one axis of a product's grid: grid position p of class `parity` reads source position
// p * source_step + offset(tap) and yields target position p * target_step + parity. Forward, and backward with
// stride 1, there is one class. Backward with stride 2 the even and the odd target positions are two classes, since
// different taps contribute to them.
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

// The taps of a transposed convolution are packed flipped: target t reads source (t + padding - tap) / stride through
// the forward tap, hence source (t - padding + f) / stride through packed tap f, the forward's kernel - 1 - f.
PATHNET_HOST_DEVICE Axis backward_axis(int kernel, int stride, int parity) {
  if (stride == 1) return {1, 1, 0, kernel, 0, 1, -(kernel / 2), 1};
  if (kernel == 1) return {1, 2, 0, 1, 0, 1, 0, 1};
  if (parity == 0) return {1, 2, 0, 1, 1, 1, 0, 1};
  return {1, 2, 1, 2, 0, 2, 0, 1};
}

// One class of a convolution's target positions, as a grid of strips. A warp computes one unit at a time: a pair of
// strips and a group of column tiles. Where images do not stay in shared memory, the grid is computed window by
// window: as many lines of strips as have their source rows fit.
struct Pass {
  Axis vertical, horizontal;
  int32_t height, width;  // of the grid
  int32_t read_height;    // rows of the grid whose source is read; a dense product reads whole strips
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

// The same pass cut into windows of `lines` lines of strips.
PATHNET_HOST_DEVICE Pass in_windows(Pass pass, int lines) {
  pass.windows = ceil_div(pass.lines(), lines);
  pass.strips = divider(lines * pass.across.divisor);
  return pass;
}

// The part of a source that one window holds: whole rows with their border, laid out as in the image. It begins at a
// multiple of eight pixels, the period of the swizzle.
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

// One strip of a unit's pair: the first (half 0) or the second (half 1).
struct Strip {
  int sample, index, y, x;
  bool there;  // false for the missing second strip of an odd count, and beyond the last window's end

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
