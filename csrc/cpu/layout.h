// A network as the kernels of the processor see it: images of pixels with a border, convolutions as passes of taps.
//
// Images are NHWC: a pixel's channels are contiguous, zero-padded to groups of 16, so that one group of a
// pixel is a vector of AVX-512, half a row of an AMX tile, and 16 ReLU bits. A convolution's source has a border of
// zero pixels (the halo), so no tap has to test whether it is inside.
#pragma once

#include <cstdint>
#include <vector>

#include "../plan.h"

namespace pathnet::cpu {

constexpr int kGroup = 16;
// Maximum number of samples that a thread processes together.
constexpr int kMostSamples = 8;

struct Image {
  int64_t channels, height, width;
  int64_t halo;  // pixels on each side

  int64_t groups() const { return (channels + kGroup - 1) / kGroup; }
  int64_t padded() const { return groups() * kGroup; }
  int64_t pitch() const { return width + 2 * halo; }
  int64_t pixels() const { return (height + 2 * halo) * pitch(); }
  int64_t pixel(int64_t y, int64_t x) const { return (y + halo) * pitch() + x + halo; }
  // Elements without the border, as in images of whole batches.
  int64_t dense() const { return height * width * padded(); }
};

// Neighbouring taps of one row: the source pixels (row, column), (row, column + 1), ... from a target's origin.
struct Run {
  int64_t row, column;
  int64_t kernel[3];  // each tap's position in the kernel
};

// The target pixels (first_row + i * step, first_column + j * step). All of them read the same taps, from the origin
// (i * source_step, j * source_step) on.
struct Pass {
  int64_t first_row, first_column, rows, columns, step;
  int64_t source_step;
  int taps;  // of each run, 1 to 3
  std::vector<Run> runs;
};

// A convolution, or the transposed one of the backward pass: there a stride of s makes s * s passes.
struct Convolution {
  Image source, target;
  std::vector<Pass> passes;
  const float* weights;  // [out, in, kernel, kernel]
  int64_t positions;     // kernel * kernel
  bool transposed;
  const float* scales;  // of the target's channels, multiplied into the weights; null for none

  float weight(int64_t from, int64_t to, int64_t position) const {
    const int64_t out = transposed ? from : to, in = transposed ? to : from;
    const int64_t channels = transposed ? target.channels : source.channels;
    return weights[(out * channels + in) * positions + position] * (scales ? scales[to] : 1.0f);
  }
};

// What a padding skip does to an image: it takes every stride-th pixel, and adds zero channels before and after.
struct Padding {
  int64_t stride, before;
};

struct Network {
  Plan plan;
  std::vector<Image> ends;                  // of the blocks: y_0 to y_n
  std::vector<Image> inputs;                // of the units
  std::vector<Convolution> convolutions;    // of the units, projections among them
  std::vector<int> end_shape, input_shape;  // the index of each among the distinct shapes
  std::vector<uint8_t> all_bits;            // set bits, for units without ReLU
  int shapes;

  const Block& block(int64_t b) const { return plan.blocks[b]; }
  const Unit& unit(int64_t u) const { return plan.units[u]; }
  // A unit's ReLU bits, in a sample's row of them.
  const uint8_t* bits(int64_t u, const uint8_t* row) const {
    return unit(u).bits_offset < 0 ? all_bits.data() : row + unit(u).bits_offset;
  }
  Padding padding(const Block& block) const;
};

// fold_scales: whether to multiply BN's factors into the weights of the backward pass.
Network make_network(const Plan& plan, bool transposed, bool fold_scales);

// The start of each unit's normalised inputs in those of a batch, and the end of the last.
std::vector<int64_t> normalized_starts(const Network& network, int64_t batch);

}  // namespace pathnet::cpu
