// The output of the routed backward pass: norms, and on request the gradient of the first block's input.
#pragma once

#include "backward_item.cuh"

namespace pathnet::cuda {

template <class Exec, int kParts, bool kWindowed>
class BackwardOutput {
 public:
  using Item = BackwardItem<Exec, kParts, kWindowed>;

  PATHNET_DEVICE explicit BackwardOutput(const Item& item)
      : item_(item), exec_(item.exec), job_(item.job), program_(item.program) {}

  // Writes the norms and the gradients. A gradient that no block changed is returned bit for bit.
  PATHNET_DEVICE void write() const {
    exec_.barrier();
    if (job_.grad_input != nullptr) write_gradients(item_.path());
    for (int sample = 0; sample < item_.samples; ++sample) {
      exec_.warps([&](int warp) {
        typename Exec::template PerLane<double> squares(0.0);
        exec_.lanes([&](int lane) {
          const int thread = warp * kWarpSize + lane;
          squares[lane] = item_.changed ? squares_of_image(sample, thread) : squares_of_incoming(sample, thread);
        });
        const double total = exec_.sum(squares);
        exec_.lanes([&](int lane) {
          if (lane == 0) exec_.store(partial_byte(sample, warp), total);
        });
      });
    }
    exec_.barrier();
    exec_.threads([&](int thread) {
      for (int sample = thread; sample < item_.samples; sample += kThreads) {
        const int64_t slot = int64_t(item_.path()) * job_.batch + item_.first + sample;
        const int power = power_of(exec_.template load<uint32_t>(peak_byte(item_.parity, sample)));
        const int exponent = int(exec_.template load<uint32_t>(exponent_byte(sample))) + power;
        double total = 0.0;
        for (int warp = 0; warp < kWarps; ++warp) total += exec_.template load<double>(partial_byte(sample, warp));
        job_.norms[slot] = Exec::scaled_root(total, exponent);
        if (job_.exponent_input != nullptr) job_.exponent_input[slot] = exponent;
      }
    });
  }

 private:
  // Returns a thread's part of the squared norm, over the whole plane: borders and padded channels hold zeros. The
  // scaled values are below one.
  PATHNET_DEVICE float squares_of_image(int sample, int thread) const {
    const BlockForm& form = program_.blocks()[0];
    const Images<Exec, kParts, kWindowed> images{exec_};
    const float factor = item_.pending_scale(sample);
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
    const float* values = item_.incoming(sample);
    double sum = 0.0;
    PATHNET_NO_UNROLL
    for (int i = thread; i < program_.channels_in * image.height * image.width; i += kThreads) {
      sum += double(values[i]) * values[i];
    }
    return sum;
  }

  PATHNET_DEVICE void write_gradients(int path) const {
    const BlockForm& form = program_.blocks()[0];
    const Images<Exec, kParts, kWindowed> images{exec_};
    const int pixels = form.in.height * form.in.width, pairs = form.in.channels / 2;
    exec_.threads([&](int thread) {
      PATHNET_NO_UNROLL
      for (int i = thread; i < item_.samples * pairs * pixels; i += kThreads) {
        const int pixel = i % pixels, pair = i / pixels % pairs, sample = i / pixels / pairs;
        const float factor = item_.pending_scale(sample);
        const int64_t slot = int64_t(path) * job_.batch + item_.first + sample;
        float values[2] = {0.0f, 0.0f};
        if (item_.changed) {
          images.load_pair(
              Item::pair_byte(form.in, form.in_byte, sample, pixel / form.in.width, pixel % form.in.width, pair),
              form.in.plane_bytes(), values[0], values[1]);
        }
        PATHNET_UNROLL
        for (int j = 0; j < 2; ++j) {
          if (2 * pair + j >= program_.channels_in) continue;
          const int64_t element = int64_t(2 * pair + j) * pixels + pixel;
          job_.grad_input[slot * program_.channels_in * pixels + element] =
              item_.changed ? values[j] * factor : item_.incoming(sample)[element];
        }
      }
    });
  }

  const Item& item_;
  Exec& exec_;
  const PathBackward& job_;
  const Program& program_;
};

}  // namespace pathnet::cuda
