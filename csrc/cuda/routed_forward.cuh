// Walks activations from the first block's input to the last block's output under a routing, BN mode `running`, and
// on request records the ReLU bits: one item of work is one routing and one sample.
//
// Numbers are pairs of bf16 in every precision, since a bf16 forward would flip ReLU bits. y itself is float32 and
// lies in global memory (L2: 64 KB a thread block), in the order in which threads hold results, so that a module
// reads and writes it once in whole lines: 128 KB a module and sample in stage 1, 1,000 to 5,500 clocks of L2 against
// 11,000 of tensor cores. Shared memory holds the two operands: relu(bn(y)) of the next block that is not skipped,
// emitted by the epilogue that completes y, and the intermediate, relu(bn(conv(...))).
//
// Of post-activation blocks y is the sum before the join: the skip is taken from relu(y), the operand is relu(y) with
// an affine map of ones and zeros, and biases are what the sums of a convolution start from. A skipped block is not
// free there but the second convolution's epilogue without its products, y once through L2.
#pragma once

#include "routed_forward.h"
#include "walk.cuh"

namespace pathnet::cuda {

struct alignas(8) Pair {
  float first, second;
};

template <class Exec, bool kWindowed>
class RoutedForward {
 public:
  PATHNET_DEVICE RoutedForward(Exec& exec, const PathForward& job)
      : exec_(exec), job_(job), program_(*job.program), y_(exec.block() * program_.scratch_size) {}

  PATHNET_DEVICE void run() {
    for (;;) {
      exec_.threads([&](int thread) {
        if (thread == 0) exec_.store(item_byte(), uint32_t(exec_.take(job_.counter)));
      });
      exec_.barrier();
      if (item() / job_.batch >= job_.paths) return;
      // An order that is none must not become an address.
      if (path() >= 0 && path() < job_.paths) walk();
      exec_.barrier();
    }
  }

 private:
  static constexpr int kParts = 2;
  static constexpr int kTilePairs = kWarpSize * 2;  // elements between two tiles of y
  static constexpr float kWithoutRelu = -__builtin_huge_valf();
  using Stream = WeightStream<Exec, false>;
  using Convolve = Convolution<Exec, kParts, false, kWindowed>;

  // Looked up where they are needed, since registers for them would have to live through the whole walk.
  PATHNET_DEVICE int item() const { return int(exec_.template uniform_load<uint32_t>(item_byte())); }
  PATHNET_DEVICE int path() const { return job_.order[item() / job_.batch]; }
  PATHNET_DEVICE int sample() const { return item() % job_.batch; }
  PATHNET_DEVICE const float* routing() const { return job_.routing + int64_t(path()) * program_.block_count * 2; }
  // Of the two copies of y in the scratch, the other; on the way to it numbers may pass 2^31.
  PATHNET_DEVICE int next_y() const {
    return int(2u * uint32_t(exec_.block() * program_.scratch_size) + uint32_t(program_.scratch_size / 2 - y_));
  }

  PATHNET_DEVICE void walk() {
    Stream stream(exec_, program_, job_.weights, routing());
    int b = following(0);
    begin(program_.blocks()[0]);
    emit_all(program_.blocks()[0].in, b);
    if (b < program_.block_count) clear_mid(program_.blocks()[b]);
    while (b < program_.block_count) {
      const int index = b;
      b = following(index + 1);
      through(stream, program_.blocks()[index], routing()[2 * index], routing()[2 * index + 1], b);
    }
    end();
  }

  // The first block from `b` on that does something; identity skips before it multiply `factor_` only.
  PATHNET_DEVICE int following(int b) {
    factor_ = 1.0f;
    for (; b < program_.block_count; ++b) {
      if (program_.blocks()[b].skip != kIdentity || routing()[2 * b + 1] != 0.0f) break;
      factor_ *= routing()[2 * b];
    }
    return b;
  }

  PATHNET_DEVICE void clear_mid(const BlockForm& form) {
    Images<Exec, kParts, kWindowed>{exec_}.clear(form.out, form.mid_byte, 1);
  }

  // f(strip, y, x of its corner, tile, lane) for all of an image, whatever convolution computes it.
  template <class Function>
  PATHNET_DEVICE void each_lane(const Image& image, const Function& f) {
    exec_.warps([&](int warp) {
      PATHNET_NO_UNROLL
      for (int i = warp; i < image.strips() * image.tiles(); i += kWarps) {
        const int strip = i / image.tiles(), tile = i % image.tiles();
        const int y = strip / image.strips_across() * image.strip_rows();
        const int x = strip % image.strips_across() * kStripWidth;
        exec_.lanes([&](int lane) { f(strip, y, x + lane_pixel(lane), tile, lane); });
      }
    });
  }

  PATHNET_DEVICE void begin(const BlockForm& form) {
    const Image& image = form.in;
    const float* values = job_.y0 + int64_t(sample()) * program_.channels_in * image.height * image.width;
    Images<Exec, kParts, kWindowed>{exec_}.clear(image, form.in_byte, 1);
    exec_.barrier();
    each_lane(image, [&](int strip, int y, int x, int tile, int lane) {
      PATHNET_NO_UNROLL
      for (int row = 0; row < image.strip_rows(); ++row) {
        for (int j = 0; j < 2; ++j) {
          const int channel = tile * kChannelTile + lane_channel(lane) + j;
          const bool inside = x < image.width && y + row < image.height && channel < program_.channels_in;
          store_y(y_ + image.lane_order_index(strip, row, tile, lane) + j,
                  inside ? factor_ * values[(int64_t(channel) * image.height + y + row) * image.width + x] : 0.0f);
        }
      }
    });
  }

  // BN as an affine map, of a lane's two channels of a tile.
  struct Affine {
    float factor[2] = {0.0f, 0.0f}, shift[2] = {0.0f, 0.0f};

    Affine() = default;
    PATHNET_DEVICE Affine(const float* table, const Image& image, int tile, int lane) {
      const float* own = table + tile * kChannelTile + lane_channel(lane);
      PATHNET_UNROLL
      for (int j = 0; j < 2; ++j) {
        factor[j] = own[j];
        shift[j] = own[image.channels + j];
      }
    }
  };

  // relu(bn(y)) at a pair of channels to an operand, zeros beyond the image; returns its two ReLU bits. NaN stays
  // NaN. Without a ReLU `least` is -infinity in place of 0.
  PATHNET_DEVICE uint32_t activate(int byte, int plane_bytes, const Affine& affine, float first, float second,
                                   bool inside, float least = 0.0f) const {
    first = inside ? Exec::multiply_add(affine.factor[0], first, affine.shift[0]) : 0.0f;
    second = inside ? Exec::multiply_add(affine.factor[1], second, affine.shift[1]) : 0.0f;
    const uint32_t bits = (first > least ? 1u : 0u) | (second > least ? 2u : 0u);
    Images<Exec, kParts, kWindowed>{exec_}.store_pair(byte, plane_bytes, first <= least ? least : first,
                                                      second <= least ? least : second);
    return bits;
  }

  // By element of the scratch, a float or a pair of neighbouring channels.
  template <class T>
  PATHNET_DEVICE T load_y(int element) const {
    return exec_.template load_scratch<T>(job_.scratch + element);
  }
  template <class T>
  PATHNET_DEVICE void store_y(int element, const T& value) const {
    exec_.store_scratch(job_.scratch + element, value);
  }

  PATHNET_DEVICE uint8_t* recorded(int bits_byte) const {
    return job_.relu_bits == nullptr ? nullptr : job_.relu_bits + int64_t(sample()) * program_.bits_bytes + bits_byte;
  }

  // The operand of block `b` from y, where no epilogue could emit it: at the start, and after a change of shape.
  PATHNET_DEVICE void emit_all(const Image& image, int b) {
    exec_.barrier();
    if (b == program_.block_count) return;
    const BlockForm& form = program_.blocks()[b];
    uint8_t* bits = recorded(form.bits_byte);
    const float least = form.relu ? 0.0f : kWithoutRelu;
    each_lane(image, [&](int strip, int y, int x, int tile, int lane) {
      uint32_t word = 0;
      const Affine affine(job_.affine + form.affine, image, tile, lane);
      PATHNET_NO_UNROLL
      for (int row = 0; row < image.strip_rows(); ++row) {
        if (x >= image.width || y + row >= image.height) continue;
        const Pair pair = load_y<Pair>(y_ + image.lane_order_index(strip, row, tile, lane));
        const int byte = image.pair_byte(form.in_byte, image.pixel(y + row + 1, x + 1), tile, lane);
        word |= activate(byte, image.plane_bytes(), affine, pair.first, pair.second, true, least)
                << bit_in_tile(row, 0);
      }
      if (bits == nullptr) return;
      uint8_t* own = bits + image.bits_byte(strip, lane, tile);
      own[0] = uint8_t(word);
      if (image.tile_bits_bytes() == 2) own[1] = uint8_t(word >> 8);
    });
  }

  // What the products of one convolution become. The first one's go through BN and ReLU to the intermediate. The
  // others' go to y, y <- keep * y + coefficient * (result + bias), and through the BN and ReLU of the next block to
  // its operand, where the shape stays.
  struct Epilogue {
    const RoutedForward& walk;
    int y;  // element of the scratch; negative for the intermediate
    float keep, coefficient;
    bool emits;
    int operand_byte, bits_byte, affine;  // of what is emitted

    PATHNET_DEVICE float start(const Conv& conv, int tile, int lane, int j) const {
      return conv.bias < 0 ? 0.0f : walk.job_.affine[conv.bias + tile * kChannelTile + lane_channel(lane) + j];
    }

    template <int rows, int tiles, bool dense>
    PATHNET_DEVICE uint32_t mask(const Geometry&, const Pass&, const Strip&, int, int) const {
      return 0;
    }

    template <int rows, int tiles, bool dense, class LaneMasks, class LaneSums>
    PATHNET_DEVICE void store(const Conv& described, const Geometry& conv, const Pass& pass, const Strip& strip,
                              int tile, int half, LaneMasks&, LaneSums& sums) const {
      const Image image = conv.target;
      const int plane_bytes = image.plane_bytes();
      uint8_t* bits = emits ? walk.recorded(bits_byte) : nullptr;
      const float least = described.behind_relu ? 0.0f : kWithoutRelu;
      walk.exec_.lanes([&](int lane) {
        uint32_t word = 0;
        const int element = image.lane_order_index(strip.index, 0, tile, lane);
        const int row_size = image.lane_order_index(0, 1, 0, 0);
        Affine affines[tiles] = {};
        PATHNET_UNROLL
        for (int t = 0; t < tiles; ++t) {
          if (emits) affines[t] = Affine(walk.job_.affine + affine, image, tile + t, lane);
        }
        // Whole strips whatever the convolution, so that what reads y by strips reads what was written.
        each_row<rows, tiles, true>(
            image, operand_byte, pass, strip, tile, lane, [&](int row, bool inside, const int (&bytes)[tiles]) {
              Pair own[tiles];
              PATHNET_UNROLL
              for (int t = 0; t < tiles; ++t) {
                own[t] = {0.0f, 0.0f};
                if (keep != 0.0f) own[t] = walk.template load_y<Pair>(y + element + row * row_size + t * kTilePairs);
              }
              PATHNET_UNROLL
              for (int t = 0; t < tiles; ++t) {
                const float* result = sums[lane].of[row][t] + 2 * half;
                own[t].first = own[t].first < least ? least : own[t].first;
                own[t].second = own[t].second < least ? least : own[t].second;
                own[t].first = Exec::multiply_add(coefficient, result[0], keep * own[t].first);
                own[t].second = Exec::multiply_add(coefficient, result[1], keep * own[t].second);
                if (y >= 0) walk.store_y(y + element + row * row_size + t * kTilePairs, own[t]);
                if (emits) {
                  word |= walk.activate(bytes[t], plane_bytes, affines[t], own[t].first, own[t].second, inside)
                          << (t * rows * 2 + bit_in_tile(row, 0));
                }
              }
            });
        if (bits != nullptr) {
          Exec::template store_bits<rows * tiles / 4>(bits + image.bits_byte(strip.index, lane, tile), word);
        }
      });
    }
  };

  PATHNET_DEVICE void through(Stream& stream, const BlockForm& form, float a, float c, int next) {
    Convolve convolve(exec_, stream, 1, 1);
    const bool shape = form.changes_shape();
    const BlockForm& follower = program_.blocks()[next < program_.block_count ? next : 0];
    if (shape) {
      exec_.barrier();
      clear_mid(form);
    }
    const bool projects = form.skip == kProjection && a != 0.0f;
    PATHNET_NO_UNROLL
    for (int turn = 0; turn < 3; ++turn) {
      if (turn == 1 && shape && !projects) pad(form, form.pads() ? factor_ * a : 0.0f);
      // Where the residual module is left out and the skip is an identity, the second convolution's epilogue alone.
      const bool products = turn == 1 ? projects : c != 0.0f;
      if (!products && (turn != 2 || shape)) continue;
      const Conv& conv = turn == 1 ? form.projection : form.units[turn / 2];
      Epilogue epilogue = {*this, -1, 0.0f, 1.0f, true, conv.target_byte, conv.bits_byte, conv.affine};
      if (turn > 0) {
        epilogue.y = shape ? next_y() : y_;
        epilogue.keep = turn == 1 ? 0.0f : shape ? 1.0f : factor_ * a;
        epilogue.coefficient = turn == 1 ? factor_ * a : factor_ * c;
        epilogue.emits = !shape && next < program_.block_count;
        epilogue.operand_byte = follower.in_byte;
        epilogue.bits_byte = follower.bits_byte;
        epilogue.affine = follower.affine;
      }
      convolve.run(conv, epilogue, products);
    }
    if (!shape) return;
    y_ = next_y();
    exec_.barrier();
    Images<Exec, kParts, kWindowed>{exec_}.clear(form.out, form.out_byte, 1);
    emit_all(form.out, next);
  }

  // Every stride-th pixel of y, or of relu(y), and zeros in the channels that the input lacks.
  PATHNET_DEVICE void pad(const BlockForm& form, float a) {
    exec_.barrier();
    each_lane(form.out, [&](int strip, int y, int x, int tile, int lane) {
      PATHNET_NO_UNROLL
      for (int row = 0; row < form.out.strip_rows(); ++row) {
        const bool inside = a != 0.0f && x < form.out.width && y + row < form.out.height && tile < form.in.tiles();
        const int from_y = (y + row) * form.stride, from_x = x * form.stride;
        const int from = from_y / form.in.strip_rows() * form.in.strips_across() + from_x / kStripWidth;
        const int source = inside ? form.in.lane_order_index(from, from_y % form.in.strip_rows(), tile,
                                                             lane_of(from_x % kStripWidth, lane_channel(lane)))
                                  : 0;
        const int element = form.out.lane_order_index(strip, row, tile, lane);
        for (int j = 0; j < 2; ++j) {
          const float value = inside ? load_y<float>(y_ + source + j) : 0.0f;
          store_y(next_y() + element + j, inside ? a * (form.behind_relu() && value < 0.0f ? 0.0f : value) : 0.0f);
        }
      }
    });
  }

  PATHNET_DEVICE void end() {
    const Image& image = program_.blocks()[program_.block_count - 1].out;
    float* output =
        job_.output + (int64_t(path()) * job_.batch + sample()) * program_.channels_out * image.height * image.width;
    exec_.barrier();
    each_lane(image, [&](int strip, int y, int x, int tile, int lane) {
      PATHNET_NO_UNROLL
      for (int row = 0; row < image.strip_rows(); ++row) {
        for (int j = 0; j < 2; ++j) {
          const int channel = tile * kChannelTile + lane_channel(lane) + j;
          if (x >= image.width || y + row >= image.height || channel >= program_.channels_out) continue;
          output[(int64_t(channel) * image.height + y + row) * image.width + x] =
              load_y<float>(y_ + image.lane_order_index(strip, row, tile, lane) + j);
        }
      }
    });
  }

  Exec& exec_;
  const PathForward& job_;
  const Program& program_;
  int y_;                // element of the scratch
  float factor_ = 1.0f;  // of the identity skips between the block at hand and the next
};

}  // namespace pathnet::cuda
