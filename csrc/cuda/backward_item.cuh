// The item of work of the routed backward pass: one routing and the samples of a thread block.
#pragma once

#include "images.cuh"
#include "routed_backward.h"

namespace pathnet::cuda {

// Returns the power p for which the largest magnitude, given by its bits, is in [2^(p-1), 2^p); 0 if it is zero or
// not finite.
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
struct BackwardItem {
  using Images = pathnet::cuda::Images<Exec, kParts, kWindowed>;

  PATHNET_DEVICE BackwardItem(Exec& exec, const PathBackward& job) : exec(exec), job(job), program(*job.program) {}

  PATHNET_DEVICE int groups() const { return ceil_div(job.batch, program.samples); }
  // Looked up where it is needed, since a register for it would have to live through the whole item.
  PATHNET_DEVICE int path() const {
    return job.order[int(exec.template uniform_load<uint32_t>(item_byte())) / groups()];
  }
  PATHNET_DEVICE int start() const { return job.starts[path()]; }

  // Returns a sample's gradient of the last block's output, [channels, height, width].
  PATHNET_DEVICE const float* incoming(int sample) const {
    const Image& out = program.blocks()[program.block_count - 1].out;
    return job.grad + (int64_t(start()) * job.batch + first + sample) * program.channels_out * out.height * out.width;
  }

  // Returns the ReLU bits that begin at a byte of the sample's row.
  PATHNET_DEVICE const uint8_t* relu_bits(int sample, int byte) const {
    return job.relu_bits + (first + sample) * job.bits_stride + byte;
  }

  // Returns the factor of the next block's coefficients that divides by the largest magnitude's power of two.
  PATHNET_DEVICE float pending_scale(int sample) const {
    return power_of_two<Exec>(-power_of(exec.template uniform_load<uint32_t>(peak_byte(parity, sample))));
  }

  // Returns the byte of a pair of neighbouring channels, numbered through all tiles.
  static PATHNET_DEVICE int pair_byte(const Image& image, int base, int sample, int y, int x, int pair) {
    return image.pair_byte(Images::sample_byte(image, base, sample), image.pixel(y + 1, x + 1), pair / 4, pair % 4);
  }

  Exec& exec;
  const PathBackward& job;
  const Program& program;
  int first = 0, samples = 0;  // of the batch
  int parity = 0;              // which of the two peaks is the gradient's
  bool changed = false;        // whether any block has changed the gradient
};

}  // namespace pathnet::cuda
