// The routed forward pass: from the first block's input to the last block's output under a routing, BN mode
// `running`. On request it records the ReLU bits.
//
// A thread block owns one item of work, one routing and one sample. Numbers are pairs of bf16 in every precision,
// since a bf16 forward pass would flip ReLU bits. y itself is float32, in the thread block's part of the
// scratch in global memory (64 KB of L2 per thread block), in the order in which threads hold results, so a module
// reads and writes it once in whole lines: 128 KB a module and sample in stage 1, 1,000 to 5,500 clocks of L2 against
// 11,000 of tensor cores, which are the limit. Shared memory holds two operands and the ring of weights: relu(bn(y))
// of the next block that is not skipped, emitted by the epilogue that completes y, and the intermediate,
// relu(bn(conv(...))).
//
// For post-activation blocks y is the sum before the ReLU: the skip reads relu(y), the operand is relu(y) with an
// affine map of ones and zeros, and the sums of a convolution start from its bias. A skipped block is not free there:
// it needs the second convolution's epilogue without its products, and y goes once through L2.
#pragma once

#include "convolution.cuh"
#include "forward_epilogue.cuh"

namespace pathnet::cuda {

template <class Exec, bool kWindowed>
class RoutedForward {
 public:
  PATHNET_DEVICE RoutedForward(Exec& exec, const PathForward& job)
      : exec_(exec), job_(job), program_(*job.program), item_(exec, job) {}

  PATHNET_DEVICE void run() {
    for (;;) {
      exec_.threads([&](int thread) {
        if (thread == 0) exec_.store(item_byte(), uint32_t(exec_.take(job_.counter)));
      });
      exec_.barrier();
      if (item_.item() / job_.batch >= job_.paths) return;
      // Invalid numbers in `order` must not become addresses.
      if (item_.path() >= 0 && item_.path() < job_.paths) run_item();
      exec_.barrier();
    }
  }

 private:
  using Item = ForwardItem<Exec, kWindowed>;
  using Epilogue = ForwardEpilogue<Exec, kWindowed>;
  using Stream = WeightStream<Exec, false>;
  using Convolve = Convolution<Exec, Item::kParts, false, kWindowed>;

  PATHNET_DEVICE void run_item() {
    Stream stream(exec_, program_, job_.weights, item_.routing());
    int b = next_block(0);
    load_input(program_.blocks()[0]);
    emit_operand(program_.blocks()[0].in, b);
    if (b < program_.block_count) clear_mid(program_.blocks()[b]);
    while (b < program_.block_count) {
      const int index = b;
      b = next_block(index + 1);
      run_block(stream, program_.blocks()[index], item_.routing()[2 * index], item_.routing()[2 * index + 1], b);
    }
    write_output();
  }

  // Returns the first block from `b` on that is not an identity skip; those before it only multiply `factor`.
  PATHNET_DEVICE int next_block(int b) {
    item_.factor = 1.0f;
    for (; b < program_.block_count; ++b) {
      if (program_.blocks()[b].skip != kIdentity || item_.routing()[2 * b + 1] != 0.0f) break;
      item_.factor *= item_.routing()[2 * b];
    }
    return b;
  }

  PATHNET_DEVICE void clear(const Image& image, int base) const {
    Images<Exec, Item::kParts, kWindowed>{exec_}.clear(image, base, 1);
  }
  PATHNET_DEVICE void clear_mid(const BlockForm& form) const { clear(form.out, form.mid_byte); }

  // Calls f(strip, y of its first row, the lane's x, tile, lane) for all of an image.
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

  // Loads y from the network's input, and clears the first operand.
  PATHNET_DEVICE void load_input(const BlockForm& form) {
    const Image& image = form.in;
    const float* values = job_.y0 + int64_t(item_.sample()) * program_.channels_in * image.height * image.width;
    clear(image, form.in_byte);
    exec_.barrier();
    each_lane(image, [&](int strip, int y, int x, int tile, int lane) {
      PATHNET_NO_UNROLL
      for (int row = 0; row < image.strip_rows(); ++row) {
        for (int j = 0; j < 2; ++j) {
          const int channel = tile * kChannelTile + lane_channel(lane) + j;
          const bool inside = x < image.width && y + row < image.height && channel < program_.channels_in;
          item_.store_y(
              item_.y + image.lane_order_index(strip, row, tile, lane) + j,
              inside ? item_.factor * values[(int64_t(channel) * image.height + y + row) * image.width + x] : 0.0f);
        }
      }
    });
  }

  // Computes the operand of block `b` from y where no epilogue can: at the start, and after a change of shape.
  PATHNET_DEVICE void emit_operand(const Image& image, int b) {
    exec_.barrier();
    if (b == program_.block_count) return;
    const BlockForm& form = program_.blocks()[b];
    uint8_t* bits = item_.recorded(form.bits_byte);
    const float least = form.relu ? 0.0f : Item::kWithoutRelu;
    each_lane(image, [&](int strip, int y, int x, int tile, int lane) {
      uint32_t word = 0;
      const LaneAffine affine(job_.affine + form.affine, image, tile, lane);
      PATHNET_NO_UNROLL
      for (int row = 0; row < image.strip_rows(); ++row) {
        if (x >= image.width || y + row >= image.height) continue;
        const Pair pair = item_.template load_y<Pair>(item_.y + image.lane_order_index(strip, row, tile, lane));
        const int byte = image.pair_byte(form.in_byte, image.pixel(y + row + 1, x + 1), tile, lane);
        word |= item_.activate(byte, image.plane_bytes(), affine, pair.first, pair.second, true, least)
                << bit_in_tile(row, 0);
      }
      if (bits == nullptr) return;
      uint8_t* tile_bits = bits + image.bits_byte(strip, lane, tile);
      tile_bits[0] = uint8_t(word);
      if (image.tile_bits_bytes() == 2) tile_bits[1] = uint8_t(word >> 8);
    });
  }

  PATHNET_DEVICE void run_block(Stream& stream, const BlockForm& form, float a, float c, int next) {
    Convolve convolve(exec_, stream, 1, 1);
    const bool shape = form.changes_shape();
    const BlockForm& follower = program_.blocks()[next < program_.block_count ? next : 0];
    if (shape) {
      exec_.barrier();
      clear_mid(form);
    }
    const bool projects = form.skip == kProjection && a != 0.0f;
    // Turns 0, 1, 2: first convolution, projection, second.
    PATHNET_NO_UNROLL
    for (int turn = 0; turn < 3; ++turn) {
      if (turn == 1 && shape && !projects) pad(form, form.pads() ? item_.factor * a : 0.0f);
      // Without a residual module an identity skip needs only the second convolution's epilogue.
      const bool products = turn == 1 ? projects : c != 0.0f;
      if (!products && (turn != 2 || shape)) continue;
      const Conv& conv = turn == 1 ? form.projection : form.units[turn / 2];
      Epilogue epilogue = {item_, -1, 0.0f, 1.0f, true, conv.target_byte, conv.bits_byte, conv.affine};
      if (turn > 0) {
        epilogue.y = shape ? item_.next_y() : item_.y;
        epilogue.keep = turn == 1 ? 0.0f : shape ? 1.0f : item_.factor * a;
        epilogue.coefficient = turn == 1 ? item_.factor * a : item_.factor * c;
        epilogue.emits = !shape && next < program_.block_count;
        epilogue.operand_byte = follower.in_byte;
        epilogue.bits_byte = follower.bits_byte;
        epilogue.affine = follower.affine;
      }
      convolve.run(conv, epilogue, products);
    }
    if (!shape) return;
    item_.y = item_.next_y();
    exec_.barrier();
    clear(form.out, form.out_byte);
    emit_operand(form.out, next);
  }

  // Starts the next y from the zero-padding skip: every stride-th pixel of y, or of relu(y), and zeros in the
  // channels that the skip adds.
  PATHNET_DEVICE void pad(const BlockForm& form, float a) {
    exec_.barrier();
    each_lane(form.out, [&](int strip, int y, int x, int tile, int lane) {
      PATHNET_NO_UNROLL
      for (int row = 0; row < form.out.strip_rows(); ++row) {
        const int from_y = (y + row) * form.stride, from_x = x * form.stride;
        const int from = from_y / form.in.strip_rows() * form.in.strips_across() + from_x / kStripWidth;
        const int element = form.out.lane_order_index(strip, row, tile, lane);
        // With an odd number of channels before the input's, a lane's two are in two of its lanes.
        for (int j = 0; j < 2; ++j) {
          const int channel = tile * kChannelTile + lane_channel(lane) + j - form.pad_before;
          const bool inside = a != 0.0f && x < form.out.width && y + row < form.out.height && channel >= 0 &&
                              channel < form.skip_channels;
          float value = 0.0f;
          if (inside) {
            const int from_lane = lane_of(from_x % kStripWidth, channel % kChannelTile);
            const int source =
                form.in.lane_order_index(from, from_y % form.in.strip_rows(), channel / kChannelTile, from_lane);
            value = item_.template load_y<float>(item_.y + source + channel % 2);
            value = a * (form.behind_relu() && value < 0.0f ? 0.0f : value);
          }
          item_.store_y(item_.next_y() + element + j, value);
        }
      }
    });
  }

  PATHNET_DEVICE void write_output() {
    const Image& image = program_.blocks()[program_.block_count - 1].out;
    float* output = job_.output + (int64_t(item_.path()) * job_.batch + item_.sample()) * program_.channels_out *
                                      image.height * image.width;
    exec_.barrier();
    each_lane(image, [&](int strip, int y, int x, int tile, int lane) {
      PATHNET_NO_UNROLL
      for (int row = 0; row < image.strip_rows(); ++row) {
        for (int j = 0; j < 2; ++j) {
          const int channel = tile * kChannelTile + lane_channel(lane) + j;
          if (x >= image.width || y + row >= image.height || channel >= program_.channels_out) continue;
          output[(int64_t(channel) * image.height + y + row) * image.width + x] =
              item_.template load_y<float>(item_.y + image.lane_order_index(strip, row, tile, lane) + j);
        }
      }
    });
  }

  Exec& exec_;
  const PathForward& job_;
  const Program& program_;
  Item item_;
};

}  // namespace pathnet::cuda
