// One convolution: its passes, windows and rounds of units.
//
// A thread block of eight warps owns the images of one item of work, a routing and a few samples. In the resident
// form they stay in shared memory for all blocks of the network, next to the ring of weights (weight_stream.cuh).
//
// In the windowed form they are in the thread block's part of a scratch in global memory, which L2 holds, in the same
// layout as in shared memory. A convolution copies the source rows that it reads to a window in shared memory, lines
// of strips at a time, and its epilogue reads and writes the scratch. Nothing hides the copies. Clocks per module on
// one multiprocessor (one sample, two terms, one window; computed by hand, not measured). Columns: L2 at 24 bytes per
// clock; of which copies (700 clocks latency each); tensor cores of an RTX 40 (512 multiply-adds per clock), an RTX
// 30 (256) and an A100 (1,024):
//               L2   of which copies   RTX 40   RTX 30    A100
//   stage 1 15,300             7,600   27,600   55,300  13,800
//   stage 2 10,600             4,900   27,600   55,300  13,800
//   stage 3 16,500             3,500   27,600   55,300  13,800
// Tensor cores and copies thus bound an RTX 40 at about 33,000 clocks. The scratch of 157 KB per thread block is 20
// MB in total; an RTX 4090 has 72 MB of L2, but an RTX 3090 has 6 MB for 13 MB of scratch. There DRAM serves it, at 7
// bytes per clock, in stages 1 and 3 in about the time of the tensor cores.
#pragma once

#include "products.cuh"
#include "weight_stream.cuh"

namespace pathnet::cuda {

// Runs one convolution for all samples of the thread block. An `Epilogue` has these functions:
//   start(program_conv, tile, lane, j): the value from which the sums of a lane's channel j of a tile start
//   mask<rows, tiles, dense>(conv, pass, strip, tile, lane): the bits of a lane's results of one strip, rows * 2 bits
//       a tile as bit_in_tile numbers them; requested before the product, which hides the loads
//   store<rows, tiles, dense>(program_conv, conv, pass, strip, tile, half, masks, sums): stores a warp's results of
//       one strip
template <class Exec, int kParts, bool kBackward, bool kWindowed>
class Convolution {
 public:
  using Stream = WeightStream<Exec, kBackward>;

  PATHNET_DEVICE Convolution(Exec& exec, Stream& stream, int samples, int capacity)
      : exec_(exec), stream_(stream), samples_(samples), capacity_(capacity) {}

  // Every shape of tile has its own code, so a kernel calls this in one place only. Without `products` only
  // the epilogue runs, on the sums' starting values, and no weights are read.
  template <class Epilogue>
  PATHNET_DEVICE void run(const Conv& program_conv, const Epilogue& epilogue, bool products) {
    LocalConv conv(program_conv);
    if (!products) {
      conv.chunks = 0;
      // In place of the barrier before a chunk.
      exec_.barrier();
    }
    PATHNET_NO_UNROLL
    for (int i = 0; i < program_conv.pass_count; ++i) {
      Pass pass = program_conv.passes[i];
      if (!program_conv.dense()) {
        if (conv.target.channels == 16) {
          one_pass<8, kNarrow, false>(conv, pass, program_conv, i, epilogue);
        } else if (kParts == 2 && conv.column_tiles == 1) {
          one_pass<4, kParts == 2 ? 1 : 2, false>(conv, pass, program_conv, i, epilogue);
        } else {
          one_pass<4, 2, false>(conv, pass, program_conv, i, epilogue);
        }
        continue;
      }
      // Constants to the compiler.
      pass.vertical = pass.horizontal = kBackward ? backward_axis(3, 1, 0) : forward_axis(3, 1);
      if (conv.target.channels == 16) {
        one_pass<8, kNarrow, true>(conv, pass, program_conv, i, epilogue);
      } else if (kParts == 1 && conv.column_tiles == 4) {
        one_pass<4, kParts == 1 ? 4 : 2, true>(conv, pass, program_conv, i, epilogue);
      } else if (conv.column_tiles == 2) {
        one_pass<4, 2, true>(conv, pass, program_conv, i, epilogue);
      } else {
        one_pass<4, 1, true>(conv, pass, program_conv, i, epilogue);
      }
    }
  }

 private:
  // Column tiles at 16 channels: one with two terms per number, because of the registers.
  static constexpr int kNarrow = kParts == 1 ? 2 : 1;

  using Product = Products<Exec, kParts, kWindowed>;
  using Planes = typename Product::Planes;
  using Masks = typename Exec::template PerWarp<typename Exec::template PerLane<uint32_t>>;

  template <int rows, int tiles, bool dense, class Epilogue>
  PATHNET_DEVICE void one_pass(const LocalConv& conv, const Pass& pass, const Conv& program_conv, int number,
                               const Epilogue& epilogue) {
    const int windows = kWindowed ? program_conv.passes[number].windows : 1;
    int weights = 0;
    PATHNET_NO_UNROLL
    for (int window = 0; window < windows; ++window) {
      Planes planes = {conv.source_byte, conv.source.plane_bytes()};
      if (kWindowed && conv.chunks > 0) planes = stage(program_conv, number, rows, window);
      one_window<rows, tiles, dense>(program_conv, conv, pass, planes, window, weights, epilogue);
    }
  }

  // Copies the source's rows of one window to shared memory. The first barrier comes after all reads of the last
  // window and all stores to the source. Those and cp.async are accesses of threads of one block by the generic
  // proxy, so the barrier orders them; L1 holds no stale line, since cp.async.cg bypasses it and stores write
  // through.
  PATHNET_DEVICE Planes stage(const Conv& conv, int pass, int rows, int number) {
    const Window window(conv.source, conv.passes[pass], rows, number);
    const int pixel_shift = conv.source.unit_shift() + 4, first = window.first << pixel_shift;
    const int plane = conv.window_plane, plane_bytes = conv.source.plane_bytes();
    exec_.barrier();
    PATHNET_NO_UNROLL
    for (int i = 0; i < samples_ * kParts; ++i) {
      exec_.copy_image_async(kControlBytes + i * plane, conv.source_byte + i * plane_bytes + first,
                             window.pixels << pixel_shift);
    }
    exec_.commit_copies();
    exec_.template wait_copies<0>();
    exec_.barrier();
    return {kControlBytes - first, plane};
  }

  template <int rows, int tiles, bool dense, class Epilogue>
  PATHNET_DEVICE void one_window(const Conv& program_conv, const LocalConv& fields, const Pass& pass,
                                 const Planes& planes, int window, int& weights, const Epilogue& epilogue) {
    using Lanes = typename Exec::template PerLane<Sums<rows, tiles>>;
    const LocalConv conv = hidden(fields);
    // Rounds as the stream of weights counts them, with the thread block's full number of samples.
    const int rounds = ceil_div(pass.units(capacity_), kWarps), units = pass.units(samples_);
    const int copies = conv.chunks * conv.slices;
    const Product product(exec_, samples_);
    PATHNET_NO_UNROLL
    for (int round = 0; round < rounds; ++round) {
      typename Exec::template PerWarp<Lanes> sums;
      Masks masks[2];
      exec_.warps([&](int warp) {
        const int unit = round * kWarps + warp;
        exec_.lanes([&](int lane) {
          PATHNET_UNROLL
          for (int i = 0; i < tiles * 2; ++i) {
            const float start = epilogue.start(program_conv, first_tile(pass, unit, tiles) + i / 2, lane, i % 2);
            PATHNET_UNROLL
            for (int j = 0; j < rows * 2; ++j) sums[warp][lane].of[j / 2][i / 2][j % 2 * 2 + i % 2] = start;
          }
          if (unit >= units) return;
          PATHNET_UNROLL
          for (int half = 0; half < 2; ++half) {
            const Strip strip = product.strip_of(pass, rows, window, unit, half);
            masks[half][warp][lane] = strip.there ? epilogue.template mask<rows, tiles, dense>(
                                                        conv, pass, strip, first_tile(pass, unit, tiles), lane)
                                                  : 0u;
          }
        });
      });
      PATHNET_NO_UNROLL
      for (int copy = 0, chunk = 0, slice = 0; copy < copies; ++copy) {
        const bool reads = copies > 1 || (round == 0 && (!kWindowed || window == 0));
        if (reads) weights = stream_.next();
        exec_.warps([&](int warp) {
          const int unit = round * kWarps + warp;
          if (unit >= units) return;
          const typename Product::Slice taps(conv, weights, chunk, slice);
          if (dense) {
            product.template dense<rows, tiles>(conv, pass, planes, window, unit, taps, sums[warp]);
          } else {
            product.template by_taps<rows, tiles>(conv, pass, planes, window, unit, taps, sums[warp]);
          }
        });
        if (reads) stream_.ahead();
        if (++slice == conv.slices) {
          slice = 0;
          ++chunk;
        }
      }
      exec_.warps([&](int warp) {
        const int unit = round * kWarps + warp;
        if (unit >= units) return;
        PATHNET_UNROLL
        for (int half = 0; half < 2; ++half) {
          const Strip strip = product.strip_of(pass, rows, window, unit, half);
          if (!strip.there) continue;
          epilogue.template store<rows, tiles, dense>(program_conv, conv, pass, strip, first_tile(pass, unit, tiles),
                                                      half, masks[half][warp], sums[warp]);
        }
      });
    }
  }

  // Hides fields from the compiler, which would otherwise compute once, for all shapes of tile, what it derives from
  // them, and run out of registers. Backward, hiding the images' shapes is enough, and hiding more costs registers.
  static PATHNET_DEVICE LocalConv hidden(LocalConv conv) {
    PATHNET_UNROLL
    for (Image* image : {&conv.source, &conv.target}) {
      Exec::hide(image->channels);
      Exec::hide(image->height);
      Exec::hide(image->width);
    }
    if (!kBackward) {
      PATHNET_UNROLL
      for (int32_t* number : {&conv.target_byte, &conv.kernel, &conv.chunks, &conv.slices, &conv.column_tiles,
                              &conv.bits_byte, &conv.affine}) {
        Exec::hide(*number);
      }
    }
    return conv;
  }

  Exec& exec_;
  Stream& stream_;
  const int samples_, capacity_;
};

}  // namespace pathnet::cuda
