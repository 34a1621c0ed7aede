// Walks gradients from the last block's output to the first block's input, BN mode `running`: one item of work is one
// routing and `program.samples` samples of the batch.
//
// In that mode BN is a factor a channel, folded into the packed weights, so that between two convolutions nothing is
// left to do but to clear what a ReLU cut off. A block's second convolution takes the gradient to the intermediate,
// the first adds to the gradient in place, g <- a g + c J^T g; a skipped block costs nothing. Where the shape changes
// the two branches are gathered in the next stage's gradient, at the other end of the arena.
//
// In post-activation blocks, seen from sum to sum, the skip lies behind the first unit's ReLU as well: it is masked
// with the result, in instructions that change places. But a skipped block is not free there: g <- mask(a g) is the
// first convolution's epilogue without its products, reckoned at 0.4 of a module's instructions in stage 1, with no
// weights and half of its ReLU bits.
//
// The largest magnitude is noted as results are stored, and its power of two is taken out by the next block's
// coefficients: exact, and no pass over the gradient.
//
// What bounds it, for two samples a thread block of eight warps in bf16: clocks a module and sample of one SM of an
// H100, reckoned from the machine code and not measured yet. Tensor cores: 2,304 products at 1.6 clocks. Issue: the
// instructions of the units that one of four schedulers gets (of a stage-1 unit's 1,130, 144 products, 250 others in
// their loop, 400 or 720 in the epilogue as it stores or adds). Shared memory: what products and epilogues read and
// write, at 128 bytes a clock. L2: weights (shared by two samples) and ReLU bits, at 24 bytes a clock.
//               tensor cores   issue   shared memory     L2
//   stage 1            3,700   4,500           3,300    360
//   stage 2            3,700   3,700           2,700    850
//   stage 3            3,700   4,300           4,200  3,100
// So the epilogue's instructions bound stage 1, stage 2 is even, and stage 3 has three limits at about the same
// height. Figure 6 whole, 1.44 million modules and samples an SM: 3.4 s, and on top what eight warps cannot hide.
#pragma once

#include "routed_backward.h"
#include "walk.cuh"

namespace pathnet::cuda {

// The power p for which the largest magnitude lies in [2^(p-1), 2^p), from its bits; 0 for zero and non-finite ones.
PATHNET_DEVICE int power_of(uint32_t largest) {
  if (largest == 0 || largest >= 0x7f800000u) return 0;
  const int power = int(largest >> 23) - 126;
  return power > 126 ? 126 : power;
}

template <class Exec>
PATHNET_DEVICE float power_of_two(int power) {
  return Exec::from_bits(uint32_t(power + 127) << 23);
}

template <class Exec, int kParts, bool kWindowed>
class RoutedBackward {
 public:
  PATHNET_DEVICE RoutedBackward(Exec& exec, const PathBackward& job)
      : exec_(exec), job_(job), program_(*job.program) {}

  PATHNET_DEVICE void run() {
    for (;;) {
      exec_.threads([&](int thread) {
        if (thread == 0) exec_.store(item_byte(), uint32_t(exec_.take(job_.counter)));
      });
      exec_.barrier();
      const int item = int(exec_.template uniform_load<uint32_t>(item_byte()));
      if (item / groups() >= job_.paths) return;
      // An order that is none must not become an address, nor a start.
      if (path() >= 0 && path() < job_.paths && start() >= 0 && start() < job_.gradients) {
        walk(item % groups() * program_.samples);
      }
      exec_.barrier();
    }
  }

 private:
  using Stream = WeightStream<Exec, true>;
  using Convolve = Convolution<Exec, kParts, true, kWindowed>;

  PATHNET_DEVICE int groups() const { return ceil_div(job_.batch, program_.samples); }
  // Looked up where it is needed, since a register for it would have to live through the whole walk.
  PATHNET_DEVICE int path() const {
    return job_.order[int(exec_.template uniform_load<uint32_t>(item_byte())) / groups()];
  }
  PATHNET_DEVICE int start() const { return job_.starts[path()]; }

  PATHNET_DEVICE void walk(int first_sample) {
    const float* routing = job_.routing + int64_t(path()) * program_.block_count * 2;
    first_ = first_sample;
    samples_ = job_.batch - first_ < program_.samples ? job_.batch - first_ : program_.samples;
    parity_ = 0;
    changed_ = false;
    Stream stream(exec_, program_, job_.weights, routing);
    begin();
    for (int b = program_.block_count - 1; b >= 0; --b) {
      const float a = routing[2 * b], c = routing[2 * b + 1];
      const BlockForm& form = program_.blocks()[b];
      if (form.skip == kIdentity && a == 1.0f && c == 0.0f) continue;
      through(stream, form, a, c);
      changed_ = true;
    }
    end();
  }

  // The incoming gradient, and an intermediate whose border is zero.
  PATHNET_DEVICE void begin() {
    const BlockForm& last = program_.blocks()[program_.block_count - 1];
    const Images<Exec, kParts, kWindowed> images{exec_};
    images.clear(last.out, last.out_byte, program_.samples);
    images.clear(last.out, last.mid_byte, program_.samples);
    exec_.barrier();
    const int pixels = last.out.height * last.out.width;
    const int32_t* exponents = job_.exponent + int64_t(start()) * job_.batch + first_;
    const float* grads = incoming(0);
    exec_.threads([&](int thread) {
      for (int sample = thread; sample < samples_; sample += kThreads) {
        exec_.store(exponent_byte(sample), uint32_t(exponents[sample]));
        for (int parity = 0; parity < 2; ++parity) exec_.store(peak_byte(parity, sample), 0u);
      }
      PATHNET_NO_UNROLL
      for (int i = thread; i < samples_ * pixels * (last.out.channels / 2); i += kThreads) {
        const int pixel = i % pixels, pair = i / pixels % (last.out.channels / 2);
        const int sample = i / pixels / (last.out.channels / 2);
        const float* values = grads + int64_t(sample) * program_.channels_out * pixels + pixel;
        const int channel = 2 * pair;
        images.store_pair(
            pair_byte(last.out, last.out_byte, sample, pixel / last.out.width, pixel % last.out.width, pair),
            last.out.plane_bytes(), channel < program_.channels_out ? values[int64_t(channel) * pixels] : 0.0f,
            channel + 1 < program_.channels_out ? values[int64_t(channel + 1) * pixels] : 0.0f);
      }
    });
  }

  // Byte of a pair of neighbouring channels, numbered through all tiles.
  static PATHNET_DEVICE int pair_byte(const Image& image, int base, int sample, int y, int x, int pair) {
    return image.pair_byte(Images<Exec, kParts, kWindowed>::sample_byte(image, base, sample),
                           image.pixel(y + 1, x + 1), pair / 4, pair % 4);
  }

  PATHNET_DEVICE const float* incoming(int sample) const {
    const Image& out = program_.blocks()[program_.block_count - 1].out;
    return job_.grad +
           (int64_t(start()) * job_.batch + first_ + sample) * program_.channels_out * out.height * out.width;
  }

  // What the products of one convolution become.
  struct Epilogue {
    const RoutedBackward& walk;
    float keep, coefficient;  // target <- keep * target + coefficient * result
    bool last;                // does that, scales by the pending power of two, notes the new peak; else masks only
    bool adds;                // to what has been scaled already

    static PATHNET_DEVICE float start(const Conv&, int, int, int) { return 0.0f; }

    template <int rows, int tiles, bool dense>
    PATHNET_DEVICE uint32_t mask(const Geometry& conv, const Pass& pass, const Strip& strip, int tile,
                                 int lane) const {
      const uint8_t* bits = walk.relu_bits(strip.sample, conv.bits_byte);
      if (dense || pass.vertical.target_step == 1) {
        return Exec::template load_bits<rows * tiles / 4>(bits + conv.target.bits_byte(strip.index, lane, tile));
      }
      uint32_t word = 0;
      const int x = (strip.x + lane_pixel(lane)) * pass.horizontal.target_step + pass.horizontal.parity;
      PATHNET_NO_UNROLL
      for (int row = 0; row < rows; ++row) {
        const int y = (strip.y + row) * pass.vertical.target_step + pass.vertical.parity;
        if (x >= conv.target.width || y >= conv.target.height) continue;
        for (int t = 0; t < tiles; ++t) {
          const int index = bit_index(conv.target, (tile + t) * kChannelTile + lane_channel(lane), y, x);
          word |= uint32_t(bits[index / 8] >> index % 8 & 3) << (t * rows * 2 + bit_in_tile(row, 0));
        }
      }
      return word;
    }

    // Bits beyond the image are zero, and so is what they let through.
    template <int rows, int tiles, bool dense, class LaneMasks, class LaneSums>
    PATHNET_DEVICE void store(const Conv& described, const Geometry& conv, const Pass& pass, const Strip& strip,
                              int tile, int half, LaneMasks& masks, LaneSums& sums) const {
      Exec& exec = walk.exec_;
      const Images<Exec, kParts, kWindowed> images{exec};
      const Image target = conv.target;
      const int plane_bytes = target.plane_bytes();
      const int base = Images<Exec, kParts, kWindowed>::sample_byte(target, conv.target_byte, strip.sample);
      if (!last) {
        exec.lanes([&](int lane) {
          const uint32_t mask = masks[lane];
          each_row<rows, tiles, dense>(
              target, base, pass, strip, tile, lane, [&](int row, bool, const int (&bytes)[tiles]) {
                PATHNET_UNROLL
                for (int t = 0; t < tiles; ++t) {
                  const float* result = sums[lane].of[row][t] + 2 * half;
                  const int bit = t * rows * 2 + bit_in_tile(row, 0);
                  images.store_pair(bytes[t], plane_bytes, mask >> bit & 1 ? result[0] : 0.0f,
                                    mask >> (bit + 1) & 1 ? result[1] : 0.0f);
                }
              });
        });
        return;
      }
      if (described.behind_relu) {
        join<rows, tiles, dense, true>(target, base, pass, strip, tile, half, masks, sums);
      } else {
        join<rows, tiles, dense, false>(target, base, pass, strip, tile, half, masks, sums);
      }
    }

    // The last of a walk's results at a target with what is kept of it.
    template <int rows, int tiles, bool dense, bool kBehindRelu, class LaneMasks, class LaneSums>
    PATHNET_DEVICE void join(const Image& target, int base, const Pass& pass, const Strip& strip, int tile, int half,
                             LaneMasks& masks, LaneSums& sums) const {
      Exec& exec = walk.exec_;
      const Images<Exec, kParts, kWindowed> images{exec};
      const int plane_bytes = target.plane_bytes();
      const float scale = walk.pending_scale(strip.sample);
      const float kept = adds ? keep : keep * scale, factor = coefficient * scale;
      typename Exec::template PerLane<float> peak(0.0f);
      exec.lanes([&](int lane) {
        const uint32_t mask = masks[lane];
        each_row<rows, tiles, dense>(target, base, pass, strip, tile, lane,
                                     [&](int row, bool, const int (&bytes)[tiles]) {
                                       float old[tiles][2] = {};
                                       PATHNET_UNROLL
                                       for (int t = 0; t < tiles; ++t) {
                                         if (kept != 0.0f)
                                           images.load_pair(bytes[t], plane_bytes, old[t][0], old[t][1]);
                                       }
                                       PATHNET_UNROLL
                                       for (int t = 0; t < tiles; ++t) {
                                         float values[2];
                                         PATHNET_UNROLL
                                         for (int j = 0; j < 2; ++j) {
                                           const bool passes = mask >> (t * rows * 2 + bit_in_tile(row, j)) & 1;
                                           values[j] = factor * sums[lane].of[row][t][2 * half + j];
                                           if (!kBehindRelu && !passes) values[j] = 0.0f;
                                           if (kept != 0.0f)
                                             values[j] = Exec::multiply_add(kept, old[t][j], values[j]);
                                           if (kBehindRelu && !passes) values[j] = 0.0f;
                                           peak[lane] = Exec::larger_magnitude(peak[lane], values[j]);
                                         }
                                         images.store_pair(bytes[t], plane_bytes, values[0], values[1]);
                                       }
                                     });
      });
      exec.raise(peak_byte(1 - walk.parity_, strip.sample), peak);
    }
  };

  PATHNET_DEVICE float pending_scale(int sample) const {
    return power_of_two<Exec>(-power_of(exec_.template uniform_load<uint32_t>(peak_byte(parity_, sample))));
  }

  PATHNET_DEVICE void through(Stream& stream, const BlockForm& form, float a, float c) {
    Convolve convolve(exec_, stream, samples_, program_.samples);
    const bool shape = form.changes_shape();
    if (shape) Images<Exec, kParts, kWindowed>{exec_}.clear(form.in, form.in_byte, program_.samples);
    // Where the residual module is left out and the skip is an identity, the first convolution's epilogue alone.
    PATHNET_NO_UNROLL
    for (int turn = c != 0.0f ? 0 : shape ? 2 : 1; turn < (form.skip == kProjection && a != 0.0f ? 3 : 2); ++turn) {
      const Conv& conv = turn == 2 ? form.projection : form.units[1 - turn];
      const float keep = turn == 2 ? 1.0f : turn == 1 && !shape ? a : 0.0f;
      const float coefficient = turn == 0 ? 1.0f : turn == 1 ? c : a;
      convolve.run(conv, Epilogue{*this, keep, coefficient, turn != 0, turn == 2}, turn == 2 || c != 0.0f);
    }
    if (form.pads() && a != 0.0f) add_padded(form, a);
    exec_.barrier();
    settle();
    if (shape) enter_stage(form);
  }

  // The transposed zero-padding skip: every stride-th pixel of the channels that the input has, where it lies behind
  // the ReLU those that passed.
  PATHNET_DEVICE void add_padded(const BlockForm& form, float a) {
    const Images<Exec, kParts, kWindowed> images{exec_};
    exec_.barrier();
    each_pair(form.out, [&](int sample, int y, int x, int pair) {
      if (2 * pair >= form.skip_channels) return;
      float first, second, old_first, old_second;
      const int from = pair_byte(form.out, form.out_byte, sample, y, x, pair);
      const int to = pair_byte(form.in, form.in_byte, sample, y * form.stride, x * form.stride, pair);
      images.load_pair(from, form.out.plane_bytes(), first, second);
      images.load_pair(to, form.in.plane_bytes(), old_first, old_second);
      const float factor = a * pending_scale(sample);
      if (2 * pair + 1 >= form.skip_channels) second = 0.0f;
      if (form.behind_relu()) {
        const int bit = bit_index(form.in, 2 * pair, y * form.stride, x * form.stride);
        const int bits = relu_bits(sample, form.bits_byte)[bit / 8] >> bit % 8;
        if (!(bits & 1)) first = 0.0f;
        if (!(bits & 2)) second = 0.0f;
      }
      store_changed(to, form.in, sample, old_first + factor * first, old_second + factor * second);
    });
  }

  // Of a sample, those that begin at a byte of its row.
  PATHNET_DEVICE const uint8_t* relu_bits(int sample, int byte) const {
    return job_.relu_bits + (first_ + sample) * job_.bits_stride + byte;
  }

  PATHNET_DEVICE void store_changed(int byte, const Image& image, int sample, float first, float second) const {
    Images<Exec, kParts, kWindowed>{exec_}.store_pair(byte, image.plane_bytes(), first, second);
    exec_.raise_one(peak_byte(1 - parity_, sample),
                    Exec::to_bits(Exec::larger_magnitude(Exec::larger_magnitude(0.0f, first), second)));
  }

  template <class Function>
  PATHNET_DEVICE void each_pair(const Image& image, const Function& f) {
    const int pairs = image.channels / 2, pixels = image.height * image.width;
    exec_.threads([&](int thread) {
      PATHNET_NO_UNROLL
      for (int i = thread; i < samples_ * pixels * pairs; i += kThreads) {
        const int pair = i % pairs, pixel = i / pairs % pixels, sample = i / pairs / pixels;
        f(sample, pixel / image.width, pixel % image.width, pair);
      }
    });
  }

  // After a block: the power of two that was taken out is added to the exponent, and the peaks change places.
  PATHNET_DEVICE void settle() {
    exec_.threads([&](int thread) {
      for (int sample = thread; sample < samples_; sample += kThreads) {
        const int power = power_of(exec_.template load<uint32_t>(peak_byte(parity_, sample)));
        const int exponent = int(exec_.template load<uint32_t>(exponent_byte(sample)));
        exec_.store(exponent_byte(sample), uint32_t(exponent + power));
        exec_.store(peak_byte(parity_, sample), 0u);
      }
    });
    parity_ = 1 - parity_;
  }

  PATHNET_DEVICE void enter_stage(const BlockForm& form) {
    const int index = int(&form - program_.blocks());
    if (index == 0) return;
    const BlockForm& next = program_.blocks()[index - 1];
    Images<Exec, kParts, kWindowed>{exec_}.clear(next.out, next.mid_byte, program_.samples);
  }

  // Norms, and on request the gradient. A walk that changed nothing gives back what came, bit for bit.
  PATHNET_DEVICE void end() {
    exec_.barrier();
    if (job_.grad_input != nullptr) give_gradients(path());
    for (int sample = 0; sample < samples_; ++sample) {
      exec_.warps([&](int warp) {
        typename Exec::template PerLane<double> squares(0.0);
        exec_.lanes([&](int lane) {
          const int thread = warp * kWarpSize + lane;
          squares[lane] = changed_ ? squares_of_image(sample, thread) : squares_of_incoming(sample, thread);
        });
        const double total = exec_.sum(squares);
        exec_.lanes([&](int lane) {
          if (lane == 0) exec_.store(partial_byte(sample, warp), total);
        });
      });
    }
    exec_.barrier();
    exec_.threads([&](int thread) {
      for (int sample = thread; sample < samples_; sample += kThreads) {
        const int64_t slot = int64_t(path()) * job_.batch + first_ + sample;
        const int power = power_of(exec_.template load<uint32_t>(peak_byte(parity_, sample)));
        const int exponent = int(exec_.template load<uint32_t>(exponent_byte(sample))) + power;
        double total = 0.0;
        for (int warp = 0; warp < kWarps; ++warp) total += exec_.template load<double>(partial_byte(sample, warp));
        job_.norms[slot] = Exec::scaled_root(total, exponent);
        if (job_.exponent_input != nullptr) job_.exponent_input[slot] = exponent;
      }
    });
  }

  // A thread's share, over the whole plane: borders and channels that the network lacks hold zeros. The scaled values
  // are below one.
  PATHNET_DEVICE float squares_of_image(int sample, int thread) const {
    const BlockForm& form = program_.blocks()[0];
    const Images<Exec, kParts, kWindowed> images{exec_};
    const float factor = pending_scale(sample);
    const int plane_bytes = form.in.plane_bytes();
    const int base = Images<Exec, kParts, kWindowed>::sample_byte(form.in, form.in_byte, sample);
    float sum = 0.0f;
    for (int byte = thread * 4; byte < plane_bytes; byte += kThreads * 4) {
      float first, second;
      images.load_pair(base + byte, plane_bytes, first, second);
      first *= factor;
      second *= factor;
      sum += first * first + second * second;
    }
    return sum;
  }

  PATHNET_DEVICE double squares_of_incoming(int sample, int thread) const {
    const Image& image = program_.blocks()[0].in;
    const float* values = incoming(sample);
    double sum = 0.0;
    PATHNET_NO_UNROLL
    for (int i = thread; i < program_.channels_in * image.height * image.width; i += kThreads) {
      sum += double(values[i]) * values[i];
    }
    return sum;
  }

  PATHNET_DEVICE void give_gradients(int path) {
    const BlockForm& form = program_.blocks()[0];
    const Images<Exec, kParts, kWindowed> images{exec_};
    const int pixels = form.in.height * form.in.width, pairs = form.in.channels / 2;
    exec_.threads([&](int thread) {
      PATHNET_NO_UNROLL
      for (int i = thread; i < samples_ * pairs * pixels; i += kThreads) {
        const int pixel = i % pixels, pair = i / pixels % pairs, sample = i / pixels / pairs;
        const float factor = pending_scale(sample);
        const int64_t slot = int64_t(path) * job_.batch + first_ + sample;
        float values[2] = {0.0f, 0.0f};
        if (changed_) {
          images.load_pair(
              pair_byte(form.in, form.in_byte, sample, pixel / form.in.width, pixel % form.in.width, pair),
              form.in.plane_bytes(), values[0], values[1]);
        }
        PATHNET_UNROLL
        for (int j = 0; j < 2; ++j) {
          if (2 * pair + j >= program_.channels_in) continue;
          const int64_t element = int64_t(2 * pair + j) * pixels + pixel;
          job_.grad_input[slot * program_.channels_in * pixels + element] =
              changed_ ? values[j] * factor : incoming(sample)[element];
        }
      }
    });
  }

  Exec& exec_;
  const PathBackward& job_;
  const Program& program_;
  int first_ = 0, samples_ = 0;  // of the item at hand
  int parity_ = 0;               // which of the peaks the gradient has now
  bool changed_ = false;
};

}  // namespace pathnet::cuda
