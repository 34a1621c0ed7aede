// The routed backward pass: from gradients at the last block's output to those at the first block's input under a
// routing, BN mode `running`.
//
// A thread block owns one item of work, one routing and `program.samples` samples of the batch: two of a CIFAR
// network in bf16, one in float32 precision. Shared memory holds the samples' gradient and an intermediate, in bf16
// or pairs of it, and the ring of weights (in the windowed form a window in place of the images, see
// convolution.cuh).
//
// In this mode BN is one factor per channel, folded into the packed weights, so between two convolutions the only
// step left is to mask with the ReLU bits. A block's second convolution maps the gradient to the intermediate; the
// first adds to the gradient in place, g <- a g + c J^T g; a skipped block costs nothing. Where the shape changes,
// both branches are summed in the next stage's gradient, at the other end of the images' memory.
//
// The boundaries of post-activation blocks are at the additions, so the skip too starts after the first unit's ReLU:
// the ReLU masks the skip together with the result, in instructions that change places. But a skipped block is not
// free there: g <- mask(a g) is the first convolution's epilogue without its products, an estimated 0.4 of a module's
// instructions in stage 1, with no weights and half of the module's ReLU bits.
//
// The largest magnitude is recorded as results are stored, and the next block's coefficients divide by its power of
// two: exact, and without a pass over the gradient.
//
// Clocks per module and sample on one SM of an H100 (thread blocks of eight warps and two samples, bf16; computed
// from the machine code, not measured). Columns: tensor cores, 2,304 products at 1.6 clocks; issue, the instructions
// of the units that each of four schedulers gets (a stage-1 unit has 1,130: 144 products, 250 others in their loop,
// and 400 or 720 in the epilogue as it stores or adds); shared memory, reads and writes of products and epilogues at
// 128 bytes per clock; L2, weights (shared by two samples) and ReLU bits at 24 bytes per clock.
//               tensor cores   issue   shared memory     L2
//   stage 1            3,700   4,500           3,300    360
//   stage 2            3,700   3,700           2,700    850
//   stage 3            3,700   4,300           4,200  3,100
// So the epilogue's instructions bound stage 1, stage 2 is even, and stage 3 has three limits of about the same
// height. All of Figure 6, 1.44 million modules and samples per SM: 3.4 s, plus latency that eight warps cannot hide.
#pragma once

#include "backward_epilogue.cuh"
#include "backward_output.cuh"
#include "convolution.cuh"

namespace pathnet::cuda {

template <class Exec, int kParts, bool kWindowed>
class RoutedBackward {
 public:
  PATHNET_DEVICE RoutedBackward(Exec& exec, const PathBackward& job)
      : exec_(exec), job_(job), program_(*job.program), item_(exec, job) {}

  PATHNET_DEVICE void run() {
    for (;;) {
      exec_.threads([&](int thread) {
        if (thread == 0) exec_.store(item_byte(), uint32_t(exec_.take(job_.counter)));
      });
      exec_.barrier();
      const int item = int(exec_.template uniform_load<uint32_t>(item_byte()));
      if (item / item_.groups() >= job_.paths) return;
      // Invalid numbers in `order` or `starts` must not become addresses.
      if (item_.path() >= 0 && item_.path() < job_.paths && item_.start() >= 0 && item_.start() < job_.gradients) {
        run_item(item % item_.groups() * program_.samples);
      }
      exec_.barrier();
    }
  }

 private:
  using Item = BackwardItem<Exec, kParts, kWindowed>;
  using Epilogue = BackwardEpilogue<Exec, kParts, kWindowed>;
  using Stream = WeightStream<Exec, true>;
  using Convolve = Convolution<Exec, kParts, true, kWindowed>;

  PATHNET_DEVICE void run_item(int first_sample) {
    const float* routing = job_.routing + int64_t(item_.path()) * program_.block_count * 2;
    item_.first = first_sample;
    item_.samples = job_.batch - item_.first < program_.samples ? job_.batch - item_.first : program_.samples;
    item_.parity = 0;
    item_.changed = false;
    Stream stream(exec_, program_, job_.weights, routing);
    load_gradients();
    for (int b = program_.block_count - 1; b >= 0; --b) {
      const float a = routing[2 * b], c = routing[2 * b + 1];
      const BlockForm& form = program_.blocks()[b];
      if (form.skip == kIdentity && a == 1.0f && c == 0.0f) continue;
      run_block(stream, form, a, c);
      item_.changed = true;
    }
    BackwardOutput<Exec, kParts, kWindowed>(item_).write();
  }

  // Loads the incoming gradient, and clears the intermediate, whose border must be zero.
  PATHNET_DEVICE void load_gradients() {
    const BlockForm& last = program_.blocks()[program_.block_count - 1];
    const Images<Exec, kParts, kWindowed> images{exec_};
    images.clear(last.out, last.out_byte, program_.samples);
    images.clear(last.out, last.mid_byte, program_.samples);
    exec_.barrier();
    const int pixels = last.out.height * last.out.width;
    const int32_t* exponents = job_.exponent + int64_t(item_.start()) * job_.batch + item_.first;
    const float* grads = item_.incoming(0);
    exec_.threads([&](int thread) {
      for (int sample = thread; sample < item_.samples; sample += kThreads) {
        exec_.store(exponent_byte(sample), uint32_t(exponents[sample]));
        for (int parity = 0; parity < 2; ++parity) exec_.store(peak_byte(parity, sample), 0u);
      }
      PATHNET_NO_UNROLL
      for (int i = thread; i < item_.samples * pixels * (last.out.channels / 2); i += kThreads) {
        const int pixel = i % pixels, pair = i / pixels % (last.out.channels / 2);
        const int sample = i / pixels / (last.out.channels / 2);
        const float* values = grads + int64_t(sample) * program_.channels_out * pixels + pixel;
        const int channel = 2 * pair;
        images.store_pair(
            Item::pair_byte(last.out, last.out_byte, sample, pixel / last.out.width, pixel % last.out.width, pair),
            last.out.plane_bytes(), channel < program_.channels_out ? values[int64_t(channel) * pixels] : 0.0f,
            channel + 1 < program_.channels_out ? values[int64_t(channel + 1) * pixels] : 0.0f);
      }
    });
  }

  PATHNET_DEVICE void run_block(Stream& stream, const BlockForm& form, float a, float c) {
    Convolve convolve(exec_, stream, item_.samples, program_.samples);
    const bool shape = form.changes_shape();
    if (shape) Images<Exec, kParts, kWindowed>{exec_}.clear(form.in, form.in_byte, program_.samples);
    // Turns 0, 1, 2: second convolution, first, projection. Without a residual module an identity skip needs the
    // first convolution's epilogue alone.
    PATHNET_NO_UNROLL
    for (int turn = c != 0.0f ? 0 : shape ? 2 : 1; turn < (form.skip == kProjection && a != 0.0f ? 3 : 2); ++turn) {
      const Conv& conv = turn == 2 ? form.projection : form.units[1 - turn];
      const float keep = turn == 2 ? 1.0f : turn == 1 && !shape ? a : 0.0f;
      const float coefficient = turn == 0 ? 1.0f : turn == 1 ? c : a;
      convolve.run(conv, Epilogue{item_, keep, coefficient, turn != 0, turn == 2}, turn == 2 || c != 0.0f);
    }
    if (form.pads() && a != 0.0f) add_padded(form, a);
    exec_.barrier();
    settle();
    if (shape) enter_stage(form);
  }

  // Adds the transpose of the zero-padding skip: every stride-th pixel of the input's channels, masked if the skip
  // starts after the ReLU.
  PATHNET_DEVICE void add_padded(const BlockForm& form, float a) {
    const Images<Exec, kParts, kWindowed> images{exec_};
    exec_.barrier();
    each_pair(Image{form.in.channels, form.out.height, form.out.width}, [&](int sample, int y, int x, int pair) {
      if (2 * pair >= form.skip_channels) return;
      float first, second, old_first, old_second;
      const int from_pair = pair + form.pad_before / 2;
      const auto load = [&](int pair_of_out, float& even, float& odd) {
        images.load_pair(Item::pair_byte(form.out, form.out_byte, sample, y, x, pair_of_out), form.out.plane_bytes(),
                         even, odd);
      };
      load(from_pair, first, second);
      const bool alone = 2 * pair + 1 >= form.skip_channels;
      if (form.pad_before % 2 == 1) {
        // The pair is the second of one and the first of the next, which the image lacks where nothing belongs there.
        first = second;
        float beyond;
        if (!alone) load(from_pair + 1, second, beyond);
      }
      if (alone) second = 0.0f;
      const int to = Item::pair_byte(form.in, form.in_byte, sample, y * form.stride, x * form.stride, pair);
      images.load_pair(to, form.in.plane_bytes(), old_first, old_second);
      const float factor = a * item_.pending_scale(sample);
      if (form.behind_relu()) {
        const int bit = bit_index(form.in, 2 * pair, y * form.stride, x * form.stride);
        const int bits = item_.relu_bits(sample, form.bits_byte)[bit / 8] >> bit % 8;
        if (!(bits & 1)) first = 0.0f;
        if (!(bits & 2)) second = 0.0f;
      }
      store_changed(to, form.in, sample, old_first + factor * first, old_second + factor * second);
    });
  }

  PATHNET_DEVICE void store_changed(int byte, const Image& image, int sample, float first, float second) const {
    Images<Exec, kParts, kWindowed>{exec_}.store_pair(byte, image.plane_bytes(), first, second);
    exec_.raise_one(peak_byte(1 - item_.parity, sample),
                    Exec::to_bits(Exec::larger_magnitude(Exec::larger_magnitude(0.0f, first), second)));
  }

  template <class Function>
  PATHNET_DEVICE void each_pair(const Image& image, const Function& f) {
    const int pairs = image.channels / 2, pixels = image.height * image.width;
    exec_.threads([&](int thread) {
      PATHNET_NO_UNROLL
      for (int i = thread; i < item_.samples * pixels * pairs; i += kThreads) {
        const int pair = i % pairs, pixel = i / pairs % pixels, sample = i / pairs / pixels;
        f(sample, pixel / image.width, pixel % image.width, pair);
      }
    });
  }

  // After a block, adds the power of two that was taken out to the exponent, and exchanges the two peaks.
  PATHNET_DEVICE void settle() {
    exec_.threads([&](int thread) {
      for (int sample = thread; sample < item_.samples; sample += kThreads) {
        const int power = power_of(exec_.template load<uint32_t>(peak_byte(item_.parity, sample)));
        const int exponent = int(exec_.template load<uint32_t>(exponent_byte(sample)));
        exec_.store(exponent_byte(sample), uint32_t(exponent + power));
        exec_.store(peak_byte(item_.parity, sample), 0u);
      }
    });
    item_.parity = 1 - item_.parity;
  }

  // Clears the intermediate of the stage that the next block (its predecessor in the network) belongs to.
  PATHNET_DEVICE void enter_stage(const BlockForm& form) {
    const int index = int(&form - program_.blocks());
    if (index == 0) return;
    const BlockForm& next = program_.blocks()[index - 1];
    Images<Exec, kParts, kWindowed>{exec_}.clear(next.out, next.mid_byte, program_.samples);
  }

  Exec& exec_;
  const PathBackward& job_;
  const Program& program_;
  Item item_;
};

}  // namespace pathnet::cuda
