// What the walks back and forward share: the stream of weights, and a convolution on tensor cores.
//
// One thread block, eight warps, owns one routing and a few samples; their images stay in shared memory for all
// blocks of the network. A convolution is an implicit product over its taps: sixteen pixels (eight of each of two
// strips) by sixteen source channels, ldmatrix from the swizzled image, times the packed weights of a tap. A warp
// walks down the rows of its strips, so that one reading of the source serves three vertical taps and all column
// tiles: per module and sample, in KB of shared memory read a product of 16 x 8 x 16 (1.6 clocks of the tensor cores
// of an SM at the rate that mma.sync reaches),
//   stage 1 (16 channels, tile 8 rows x 2):  10 x 3 readings of 512 B and 9 x 2 x 256 B of weights for 144: 0.14 KB
//   stage 2 (32 channels, tile 4 rows x 4):   6 x 3 and 9 x 4 for 144: 0.13 KB
//   stage 3 (64 channels, tile 4 rows x 2):   6 x 3 and 9 x 2 for 72: 0.19 KB
// at 128 bytes a clock 1.0 to 1.5 clocks: the tensor cores bound every stage, stage 3 narrowly.
//
// Weights stream from L2 in chunks (sixteen source channels, all taps: 4.6, 9.2, 18.4 KB in bf16) into a ring of two
// or three slots, asynchronously and one or two chunks ahead, across the bounds of convolutions and blocks. The one
// barrier before each chunk serves the ring and the images alike. Where slots for whole chunks do not fit, a chunk
// comes in slices: the columns of the kernel, whose products are the same, or its taps, each of which reads the
// source anew: in two terms 40 and 36 clocks of shared memory for 24 and 12 products in stages 2 and 3 (48 and 24
// clocks of an A100's tensor cores at their peak, 77 and 39 at 62 %).
//
// Windowed, where images do not fit: they lie in the thread block's part of a scratch in global memory, which L2
// holds, in the layout that they have in shared memory. A convolution copies the rows that it reads to a window
// there, lines of strips at a time, and its epilogue reads and writes the scratch. Nothing hides the copies. For one
// sample and two terms, all of an image in one window, clocks a module of one multiprocessor, reckoned and not
// measured; L2 at 24 bytes a clock, of that the copies, with 700 for each to begin; tensor cores of an RTX 40 (512
// multiply-adds a clock), an RTX 30 (256) and an A100 (1,024):
//               L2   of that copies   RTX 40   RTX 30    A100
//   stage 1 15,300            7,600   27,600   55,300  13,800
//   stage 2 10,600            4,900   27,600   55,300  13,800
//   stage 3 16,500            3,500   27,600   55,300  13,800
// So tensor cores and copies bound an RTX 40 at about 33,000. The scratch of 157 KB a thread block is 20 MB in all of
// an RTX 4090's 72 MB of L2, but 13 MB of an RTX 3090's 6: there its DRAM is read, 7 bytes a clock, stages 1 and 3 in
// about the time of the tensor cores.
#pragma once

#include "execution.h"

namespace pathnet::cuda {

// Which convolutions a routing needs, in the order in which the walk runs them.
template <bool kBackward>
class Route {
 public:
  PATHNET_DEVICE Route(const Program& program, const float* routing)
      : program_(program), routing_(routing), block_(kBackward ? program.block_count - 1 : 0), turn_(-1) {
    advance();
  }

  PATHNET_DEVICE bool ended() const { return block_ < 0 || block_ >= program_.block_count; }
  PATHNET_DEVICE const Conv& conv() const { return conv_of(program_.blocks()[block_], turn_); }

  PATHNET_DEVICE void advance() {
    for (++turn_; !ended(); ++turn_) {
      if (turn_ == 3) {
        block_ += kBackward ? -1 : 1;
        turn_ = -1;
        continue;
      }
      if (needed()) return;
    }
  }

 private:
  // Backward the second convolution, the first, the projection; forward the first, the projection, the second.
  static PATHNET_DEVICE const Conv& conv_of(const BlockForm& form, int turn) {
    if (kBackward) return turn == 2 ? form.projection : form.units[1 - turn];
    return turn == 1 ? form.projection : form.units[turn / 2];
  }

  PATHNET_DEVICE bool needed() const {
    const bool projection = turn_ == (kBackward ? 2 : 1);
    if (!projection) return routing_[2 * block_ + 1] != 0.0f;
    return program_.blocks()[block_].skip == kProjection && routing_[2 * block_] != 0.0f;
  }

  const Program& program_;
  const float* routing_;
  int block_, turn_;
};

// Slices of weights in the order of the walk, copied ahead of their use.
template <class Exec, bool kBackward>
class WeightStream {
 public:
  PATHNET_DEVICE WeightStream(Exec& exec, const Program& program, const uint8_t* weights, const float* routing)
      : exec_(exec),
        weights_(weights),
        route_(program, routing),
        slots_(program.slots),
        slot_bytes_(program.slot_bytes) {
    first_slot_ = filled_ = used_ = program.slot_byte(0);
    last_slot_ = program.slot_byte(slots_ - 1);
    enter();
    for (int slot = 0; slot + 1 < slots_; ++slot) copy_next();
  }

  // Shared byte of the next slice. Everything that the block stored before is visible after it.
  PATHNET_DEVICE int next() {
    if (slots_ == 3) {
      exec_.template wait_copies<1>();
    } else {
      exec_.template wait_copies<0>();
    }
    exec_.barrier();
    if (slots_ == 2) copy_next();
    const int slot = used_;
    used_ = following(used_);
    return slot;
  }

  // After a slice's product: with three slots there is time until here, where no warp waits for it.
  PATHNET_DEVICE void ahead() {
    if (slots_ == 3) copy_next();
  }

 private:
  PATHNET_DEVICE int following(int slot) const { return slot == last_slot_ ? first_slot_ : slot + slot_bytes_; }

  // The route's convolution at hand; asked for in the program only once.
  PATHNET_DEVICE void enter() {
    if (route_.ended()) return;
    const Conv& conv = route_.conv();
    from_ = conv.weights_byte;
    bytes_ = conv.slice_bytes();
    slices_ = slices_left_ = conv.copies();
    reads_left_ = conv.reads;
  }

  PATHNET_DEVICE void copy_next() {
    if (!route_.ended()) {
      exec_.copy_async(filled_, weights_ + from_, bytes_);
      from_ += bytes_;
      if (--slices_left_ == 0) {
        slices_left_ = slices_;
        from_ -= slices_ * bytes_;
      }
      if (--reads_left_ == 0) {
        route_.advance();
        enter();
      }
    }
    filled_ = following(filled_);
    exec_.commit_copies();
  }

  Exec& exec_;
  const uint8_t* weights_;
  Route<kBackward> route_;
  const int slots_, slot_bytes_;
  int first_slot_, last_slot_, filled_, used_;                                // shared bytes
  int from_ = 0, bytes_ = 0, slices_ = 0, slices_left_ = 0, reads_left_ = 0;  // of the route's convolution
};

// Images of one or two bf16 terms a number, in shared memory or, where walks are windowed, in the scratch.
template <class Exec, int kParts, bool kWindowed>
struct Images {
  Exec& exec;

  // First byte of a sample's image.
  static PATHNET_DEVICE int sample_byte(const Image& image, int base, int sample) {
    return base + sample * kParts * image.plane_bytes();
  }

  // Two neighbouring channels at `byte`; `plane_bytes` further on lie the second terms.
  PATHNET_DEVICE void store_pair(int byte, int plane_bytes, float first, float second) const {
    PATHNET_UNROLL
    for (int part = 0; part < kParts; ++part) {
      const uint32_t pair = Exec::to_bf16(first, second);
      if (kWindowed) {
        exec.store_image(byte + part * plane_bytes, pair);
      } else {
        exec.store(byte + part * plane_bytes, pair);
      }
      first -= Exec::low(pair);
      second -= Exec::high(pair);
    }
  }

  PATHNET_DEVICE void load_pair(int byte, int plane_bytes, float& first, float& second) const {
    const uint32_t pair = load(byte);
    first = Exec::low(pair);
    second = Exec::high(pair);
    if (kParts == 1) return;
    const uint32_t rest = load(byte + plane_bytes);
    first += Exec::low(rest);
    second += Exec::high(rest);
  }

  PATHNET_DEVICE uint32_t load(int byte) const {
    return kWindowed ? exec.load_image(byte) : exec.template load<uint32_t>(byte);
  }

  PATHNET_DEVICE void clear(const Image& image, int base, int samples) const {
    const int units = samples * kParts * image.plane_bytes() / kUnitBytes;
    exec.threads([&](int thread) {
      PATHNET_NO_UNROLL
      for (int unit = thread; unit < units; unit += kThreads) {
        if (kWindowed) {
          exec.clear_image_unit(base + unit * kUnitBytes);
        } else {
          exec.clear_unit(base + unit * kUnitBytes);
        }
      }
    });
  }
};

// What of a convolution its products and epilogues use.
struct Geometry {
  Image source, target;
  int source_byte, target_byte, kernel, chunks, slices, column_tiles, bits_byte, affine;

  PATHNET_DEVICE explicit Geometry(const Conv& conv)
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

// Runs one convolution for all samples of the block. `Epilogue` has
//   start(conv, tile, lane, j): what the sums of a lane's channel j of a tile start from
//   mask<rows, tiles, dense>(conv, pass, strip, tile, lane): the bits of a lane's results of one strip, rows * 2 bits
//   a tile
//       as bit_in_tile has them; asked for before the product, so that the loads take no time
//   store<rows, tiles, dense>(described, conv, pass, strip, tile, half, masks, sums): takes a warp's results of one
//   strip of a pair
template <class Exec, int kParts, bool kBackward, bool kWindowed>
class Convolution {
 public:
  using Stream = WeightStream<Exec, kBackward>;

  PATHNET_DEVICE Convolution(Exec& exec, Stream& stream, int samples, int capacity)
      : exec_(exec), stream_(stream), samples_(samples), capacity_(capacity) {}

  // Every shape of tile is code of its own; callers call this in one place. Without `products` the epilogue alone
  // runs on what the sums start from, and no weights are asked for.
  template <class Epilogue>
  PATHNET_DEVICE void run(const Conv& described, const Epilogue& epilogue, bool products) {
    // A copy in registers: what lies in memory would be read again after every store.
    Geometry conv(described);
    if (!products) {
      conv.chunks = 0;
      // The one that a chunk brings.
      exec_.barrier();
    }
    PATHNET_NO_UNROLL
    for (int i = 0; i < described.pass_count; ++i) {
      Pass pass = described.passes[i];
      if (!described.dense()) {
        if (conv.target.channels == 16) {
          one_pass<8, kNarrow, false>(conv, pass, described, i, epilogue);
        } else if (kParts == 2 && conv.column_tiles == 1) {
          one_pass<4, kParts == 2 ? 1 : 2, false>(conv, pass, described, i, epilogue);
        } else {
          one_pass<4, 2, false>(conv, pass, described, i, epilogue);
        }
        continue;
      }
      // Constants for the compiler.
      pass.vertical = pass.horizontal = kBackward ? backward_axis(3, 1, 0) : forward_axis(3, 1);
      if (conv.target.channels == 16) {
        one_pass<8, kNarrow, true>(conv, pass, described, i, epilogue);
      } else if (kParts == 1 && conv.column_tiles == 4) {
        one_pass<4, kParts == 1 ? 4 : 2, true>(conv, pass, described, i, epilogue);
      } else if (conv.column_tiles == 2) {
        one_pass<4, 2, true>(conv, pass, described, i, epilogue);
      } else {
        one_pass<4, 1, true>(conv, pass, described, i, epilogue);
      }
    }
  }

 private:
  // Column tiles at 16 channels: with two terms a number one, for the registers' sake.
  static constexpr int kNarrow = kParts == 1 ? 2 : 1;

  using Source = typename Exec::Source;
  using Weights = typename Exec::Weights;
  using Masks = typename Exec::template PerWarp<typename Exec::template PerLane<uint32_t>>;

  // Where the products read a source: its sample 0's first pixel would lie at `byte` of shared memory.
  struct Planes {
    int byte, bytes;
  };

  template <int rows, int tiles, bool dense, class Epilogue>
  PATHNET_DEVICE void one_pass(const Geometry& conv, const Pass& pass, const Conv& described, int number,
                               const Epilogue& epilogue) {
    const int windows = kWindowed ? described.passes[number].windows : 1;
    int weights = 0;
    PATHNET_NO_UNROLL
    for (int window = 0; window < windows; ++window) {
      Planes planes = {conv.source_byte, conv.source.plane_bytes()};
      if (kWindowed && conv.chunks > 0) planes = stage(described, number, rows, window);
      one_window<rows, tiles, dense>(described, conv, pass, planes, window, weights, epilogue);
    }
  }

  // Copies the source's rows of one window to shared memory. The first barrier is behind all readings of the last
  // window and all stores to the source: those and cp.async are accesses of threads of one block by the generic
  // proxy, so the barrier orders them; no line of L1 is in between, which cp.async.cg passes by and stores write
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
  PATHNET_DEVICE void one_window(const Conv& described, const Geometry& shape, const Pass& pass, const Planes& planes,
                                 int window, int& weights, const Epilogue& epilogue) {
    using Lanes = typename Exec::template PerLane<Sums<rows, tiles>>;
    const Geometry conv = hidden(shape);
    // Rounds as the stream counts them, with the thread block's full number of samples.
    const int rounds = ceil_div(pass.units(capacity_), kWarps), units = pass.units(samples_);
    const int copies = conv.chunks * conv.slices;
    PATHNET_NO_UNROLL
    for (int round = 0; round < rounds; ++round) {
      typename Exec::template PerWarp<Lanes> sums;
      Masks masks[2];
      exec_.warps([&](int warp) {
        const int unit = round * kWarps + warp;
        exec_.lanes([&](int lane) {
          PATHNET_UNROLL
          for (int i = 0; i < tiles * 2; ++i) {
            const float start = epilogue.start(described, first_tile(pass, unit, tiles) + i / 2, lane, i % 2);
            PATHNET_UNROLL
            for (int j = 0; j < rows * 2; ++j) sums[warp][lane].of[j / 2][i / 2][j % 2 * 2 + i % 2] = start;
          }
          if (unit >= units) return;
          PATHNET_UNROLL
          for (int half = 0; half < 2; ++half) {
            const Strip strip = strip_of(pass, rows, window, unit, half);
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
          const Taps taps(conv, weights, chunk, slice);
          if (dense) {
            dense_product<rows, tiles>(conv, pass, planes, window, unit, taps, sums[warp]);
          } else {
            tap_product<rows, tiles>(conv, pass, planes, window, unit, taps, sums[warp]);
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
          const Strip strip = strip_of(pass, rows, window, unit, half);
          if (!strip.there) continue;
          epilogue.template store<rows, tiles, dense>(described, conv, pass, strip, first_tile(pass, unit, tiles),
                                                      half, masks[half][warp], sums[warp]);
        }
      });
    }
  }

  // What the compiler would work out of these numbers once, for all shapes of tile, would take more registers than
  // there are. Backward hiding the images' sides is enough, and hiding more costs registers.
  static PATHNET_DEVICE Geometry hidden(Geometry conv) {
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

  PATHNET_DEVICE Strip strip_of(const Pass& pass, int rows, int window, int unit, int half) const {
    return Strip(pass, rows, samples_, kWindowed ? window : 0, unit, half);
  }

  // A slice of weights: of a chunk the taps from `first` on, `count` of them.
  struct Taps {
    int byte, chunk, first, count;

    PATHNET_DEVICE Taps(const Geometry& conv, int byte, int chunk, int slice) : byte(byte), chunk(chunk) {
      const int taps = conv.kernel * conv.kernel;
      count = conv.slices == 1 ? taps : conv.slices == taps ? 1 : conv.kernel;
      first = slice * count;
    }
  };

  // 3x3, stride 1: each reading of sixteen pixels meets the three vertical taps of one column of the kernel.
  template <int rows, int tiles, class Lanes>
  PATHNET_DEVICE void dense_product(const Geometry& conv, const Pass& pass, const Planes& planes, int window,
                                    int unit, const Taps& slice, Lanes& sums) {
    const Image source = conv.source;
    const int pitch = source.pitch(), tile = first_tile(pass, unit, tiles), columns = conv.target.tiles();
    // Of each lane, the first pixel that it gives the address of, and the sample's first byte.
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

  // Any kernel and stride, tap by tap: the two blocks of the network that change the shape.
  template <int rows, int tiles, class Lanes>
  PATHNET_DEVICE void tap_product(const Geometry& conv, const Pass& pass, const Planes& planes, int window, int unit,
                                  const Taps& slice, Lanes& sums) {
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

  template <int tiles>
  PATHNET_DEVICE void load_taps(const Taps& slice, int tap, int tile, int columns, Weights (&taps)[kParts][tiles]) {
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

  // With two terms a number: low x high, high x low and high x high; low x low lies below the rounding. Tensor cores
  // cut their sums toward zero, a bias that grows with every product of a chain; so the three start from zero, and
  // their sum is added by an ordinary addition, which rounds to nearest.
  template <int tiles, class Lanes>
  PATHNET_DEVICE void accumulate(Lanes& sums, int row, const Source (&pixels)[kParts],
                                 const Weights (&taps)[kParts][tiles]) {
    PATHNET_UNROLL
    for (int t = 0; t < tiles; ++t) {
      if (kParts == 1) {
        exec_.multiply([&](int lane) -> float (&)[4] { return sums[lane].of[row][t]; }, pixels[0], taps[0][t]);
        continue;
      }
      typename Exec::template PerLane<Sums<1, 1>> own;
      exec_.lanes([&](int lane) {
        PATHNET_UNROLL
        for (int i = 0; i < 4; ++i) own[lane].of[0][0][i] = 0.0f;
      });
      const auto chain = [&](int lane) -> float (&)[4] { return own[lane].of[0][0]; };
      exec_.multiply(chain, pixels[kParts - 1], taps[0][t]);
      exec_.multiply(chain, pixels[0], taps[kParts - 1][t]);
      exec_.multiply(chain, pixels[0], taps[0][t]);
      exec_.lanes([&](int lane) {
        PATHNET_UNROLL
        for (int i = 0; i < 4; ++i) sums[lane].of[row][t][i] += own[lane].of[0][0][i];
      });
    }
  }

  Exec& exec_;
  Stream& stream_;
  const int samples_, capacity_;
};

// The pairs of neighbouring channels that a lane holds of one strip, row by row: f(row, whether it belongs to the
// image, bytes of the tiles' pairs in a sample's first plane). Whole rows, so that all loads of one are under way
// before its first store; a dense convolution's rows without a branch, those beyond the image too.
template <int rows, int tiles, bool dense, class Function>
PATHNET_DEVICE void each_row(const Image& target, int base, const Pass& pass, const Strip& strip, int tile, int lane,
                             const Function& f) {
  const int x = strip.x + lane_pixel(lane), pitch = target.pitch();
  if (x >= pass.width) return;
  const int first = target.pixel(strip.y * pass.vertical.target_step + pass.vertical.parity + 1,
                                 x * pass.horizontal.target_step + pass.horizontal.parity + 1);
  PATHNET_UNROLL
  for (int row = 0; row < rows; ++row) {
    const bool inside = strip.y + row < pass.height;
    if (dense || inside) {
      const int byte = target.pair_byte(base, first + row * pass.vertical.target_step * pitch, tile, lane);
      int bytes[tiles];
      PATHNET_UNROLL
      for (int t = 0; t < tiles; ++t) bytes[t] = byte ^ t * kUnitBytes;
      f(row, inside, bytes);
    }
  }
}

}  // namespace pathnet::cuda
