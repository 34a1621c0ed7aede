// Products of a convolution on tensor cores: a warp's unit of results from one slice of weights.
//
// A convolution is an implicit product over its taps: sixteen pixels (eight of each of two strips) by sixteen source
// channels, loaded by ldmatrix from the swizzled image, times the packed weights of a tap. A warp goes down the rows
// of its strips, so one load of the source serves three vertical taps and all column tiles. Shared memory read
// per product of 16 x 8 x 16, which takes 1.6 clocks of an SM's tensor cores at the rate that mma.sync reaches:
//   stage 1 (16 channels, tile 8 rows x 2):  10 x 3 loads of 512 B and 9 x 2 x 256 B of weights for 144: 0.14 KB
//   stage 2 (32 channels, tile 4 rows x 4):   6 x 3 and 9 x 4 for 144: 0.13 KB
//   stage 3 (64 channels, tile 4 rows x 2):   6 x 3 and 9 x 2 for 72: 0.19 KB
// At 128 bytes per clock these take 1.0 to 1.5 clocks: the tensor cores bound every stage, stage 3 narrowly.
#pragma once

#include "execution.h"

namespace pathnet::cuda {

// The fields of a Conv that products and epilogues use, in registers: fields in memory would be loaded again after
// every store.
struct LocalConv {
  Image source, target;
  int source_byte, target_byte, kernel, chunks, slices, column_tiles, bits_byte, affine;

  PATHNET_DEVICE explicit LocalConv(const Conv& conv)
      : source(conv.source),
        target(conv.target),
        source_byte(conv.source_byte),
        target_byte(conv.target_byte),
        kernel(conv.kernel),
        chunks(conv.chunks),
        slices(conv.slices),
        column_tiles(conv.column_tiles),
        bits_byte(conv.bits_byte),
        affine(conv.affine) {}
};

template <class Exec, int kParts, bool kWindowed>
class Products {
 public:
  PATHNET_DEVICE Products(Exec& exec, int samples) : exec_(exec), samples_(samples) {}

  // Where the products read a source: its sample 0's first pixel would be at `byte` of shared memory, whether or not
  // the window includes it; `bytes` is the size of one term of a sample.
  struct Planes {
    int byte, bytes;
  };

  // A slice of weights in shared memory: `count` taps of a chunk, from `first` on.
  struct Slice {
    int byte, chunk, first, count;

    PATHNET_DEVICE Slice(const LocalConv& conv, int byte, int chunk, int slice) : byte(byte), chunk(chunk) {
      const int taps = conv.kernel * conv.kernel;
      count = conv.slices == 1 ? taps : conv.slices == taps ? 1 : conv.kernel;
      first = slice * count;
    }
  };

  PATHNET_DEVICE Strip strip_of(const Pass& pass, int rows, int window, int unit, int half) const {
    return Strip(pass, rows, samples_, kWindowed ? window : 0, unit, half);
  }

  // 3x3 with stride 1: each load of sixteen pixels serves the three vertical taps of one column of the kernel.
  template <int rows, int tiles, class Lanes>
  PATHNET_DEVICE void dense(const LocalConv& conv, const Pass& pass, const Planes& planes, int window, int unit,
                            const Slice& slice, Lanes& sums) const {
    const Image source = conv.source;
    const int pitch = source.pitch(), tile = first_tile(pass, unit, tiles), columns = conv.target.tiles();
    // For each lane, the first pixel whose address it gives, and the sample's first byte.
    typename Exec::template PerLane<int> first, base;
    exec_.lanes([&](int lane) {
      const Strip strip = strip_of(pass, rows, window, unit, address_half(lane));
      const int x = strip.x + address_pixel(lane);
      first[lane] = source.pixel(strip.y, x < source.width ? x : source.width - 1);
      base[lane] = planes.byte + strip.sample * kParts * planes.bytes;
    });
    PATHNET_NO_UNROLL
    for (int tap = slice.first; tap < slice.first + slice.count; tap += 3) {
      const int column = tap / 3;
      Weights taps[3][kParts][tiles];
      PATHNET_UNROLL
      for (int row = 0; row < 3; ++row) load_taps<tiles>(slice, tap + row, tile, columns, taps[row]);
      PATHNET_UNROLL
      for (int line = 0; line < rows + 2; ++line) {
        Source pixels[kParts];
        PATHNET_UNROLL
        for (int part = 0; part < kParts; ++part) {
          exec_.load_source(pixels[part], [&](int lane) {
            return source.unit_byte(base[lane] + part * planes.bytes, first[lane] + line * pitch + column,
                                    2 * slice.chunk + address_unit(lane));
          });
        }
        PATHNET_UNROLL
        for (int row = 0; row < 3; ++row) {
          if (line - row >= 0 && line - row < rows) accumulate<tiles>(sums, line - row, pixels, taps[row]);
        }
      }
    }
  }

  // Any kernel and stride, tap by tap: for the blocks that change the shape, and for weights cut by taps.
  template <int rows, int tiles, class Lanes>
  PATHNET_DEVICE void by_taps(const LocalConv& conv, const Pass& pass, const Planes& planes, int window, int unit,
                              const Slice& slice, Lanes& sums) const {
    const Image source = conv.source;
    const int tile = first_tile(pass, unit, tiles), columns = conv.target.tiles();
    typename Exec::template PerLane<int> top, left, base;
    exec_.lanes([&](int lane) {
      const Strip strip = strip_of(pass, rows, window, unit, address_half(lane));
      const int x = strip.x + address_pixel(lane);
      top[lane] = strip.y;
      left[lane] = (x < pass.width ? x : pass.width - 1) * pass.horizontal.source_step + 1;
      base[lane] = planes.byte + strip.sample * kParts * planes.bytes;
    });
    PATHNET_NO_UNROLL
    for (int i = 0; i < pass.vertical.taps; ++i) {
      PATHNET_NO_UNROLL
      for (int j = 0; j < pass.horizontal.taps; ++j) {
        const int tap = tap_index(conv.kernel, pass.vertical.tap(i), pass.horizontal.tap(j));
        if (tap < slice.first || tap >= slice.first + slice.count) continue;
        Weights taps[kParts][tiles];
        load_taps<tiles>(slice, tap, tile, columns, taps);
        PATHNET_UNROLL
        for (int row = 0; row < rows; ++row) {
          Source pixels[kParts];
          PATHNET_UNROLL
          for (int part = 0; part < kParts; ++part) {
            exec_.load_source(pixels[part], [&](int lane) {
              const int y = top[lane] + row, inside = y < pass.height ? y : pass.height - 1;
              const int pixel = source.pixel(inside * pass.vertical.source_step + pass.vertical.offset(i) + 1,
                                             left[lane] + pass.horizontal.offset(j));
              return source.unit_byte(base[lane] + part * planes.bytes, pixel, 2 * slice.chunk + address_unit(lane));
            });
          }
          accumulate<tiles>(sums, row, pixels, taps);
        }
      }
    }
  }

 private:
  using Source = typename Exec::Source;
  using Weights = typename Exec::Weights;

  template <int tiles>
  PATHNET_DEVICE void load_taps(const Slice& slice, int tap, int tile, int columns,
                                Weights (&taps)[kParts][tiles]) const {
    PATHNET_UNROLL
    for (int part = 0; part < kParts; ++part) {
      PATHNET_UNROLL
      for (int t = 0; t < tiles; ++t) {
        exec_.load_weights(taps[part][t], [&](int lane) {
          return slice.byte + fragment_index(columns, part * slice.count + tap - slice.first, tile + t, lane) * 2;
        });
      }
    }
  }

  // With two terms per number there are three products: low x high, high x low and high x high; low x low is below
  // the rounding error. Tensor cores round their sums toward zero, a bias that grows with every product of a chain.
  // Therefore the three start from zero, and their sum is added by an ordinary addition, which rounds to nearest.
  template <int tiles, class Lanes>
  PATHNET_DEVICE void accumulate(Lanes& sums, int row, const Source (&pixels)[kParts],
                                 const Weights (&taps)[kParts][tiles]) const {
    PATHNET_UNROLL
    for (int t = 0; t < tiles; ++t) {
      if (kParts == 1) {
        exec_.multiply([&](int lane) -> float (&)[4] { return sums[lane].of[row][t]; }, pixels[0], taps[0][t]);
        continue;
      }
      typename Exec::template PerLane<Sums<1, 1>> chained;
      exec_.lanes([&](int lane) {
        PATHNET_UNROLL
        for (int i = 0; i < 4; ++i) chained[lane].of[0][0][i] = 0.0f;
      });
      const auto chain = [&](int lane) -> float (&)[4] { return chained[lane].of[0][0]; };
      exec_.multiply(chain, pixels[kParts - 1], taps[0][t]);
      exec_.multiply(chain, pixels[0], taps[kParts - 1][t]);
      exec_.multiply(chain, pixels[0], taps[0][t]);
      exec_.lanes([&](int lane) {
        PATHNET_UNROLL
        for (int i = 0; i < 4; ++i) sums[lane].of[row][t][i] += chained[lane].of[0][0][i];
      });
    }
  }

  Exec& exec_;
  const int samples_;
};

}  // namespace pathnet::cuda
