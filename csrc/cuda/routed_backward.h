#pragma once

#include <cstdint>
#include <string>

#include "program.h"

namespace pathnet::cuda {

// Bytes of ReLU bits that a thread reads at once; a sample's are a multiple of them.
constexpr int kMostBits = 4;

// Everything on the device, but for `program`'s host copy that the launcher reads.
struct PathBackward {
  const Program* program;
  const uint8_t* weights;    // as pack_program_weights lays them out
  const uint8_t* relu_bits;  // [batch] rows of program->bits_bytes, `bits_stride` bytes apart
  const float* grad;         // [gradients, batch, channels_out, height, width]
  const int32_t* exponent;   // [gradients, batch]
  const int32_t* starts;     // [paths]: the gradient that each starts from
  const float* routing;      // [paths, blocks, 2]
  const int32_t* order;      // [paths]: the order in which paths are taken, the longest first
  int32_t* counter;          // of the items taken; 0 before
  int64_t bits_stride;
  int32_t gradients, batch, paths;
  uint8_t* images;          // [thread blocks, program->images_scratch()]; the twin has memory of its own
  double* norms;            // [paths, batch]
  float* grad_input;        // [paths, batch, channels_in, height, width], or null
  int32_t* exponent_input;  // [paths, batch], or null
};

// How many thread blocks run at a time; each needs its part of the images. Null, or what went wrong.
const char* routed_backward_blocks(const Program& program, int items, int& blocks);

// On the device, on a CUDA stream. Null, or what went wrong.
const char* launch_routed_backward(const PathBackward& job, const Program& program, int blocks, void* stream);

// The same kernel body on the host. Empty, or the first race, read of unwritten memory or access out of bounds.
std::string run_routed_backward(const PathBackward& job);

}  // namespace pathnet::cuda
