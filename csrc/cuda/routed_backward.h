// The interface of the routed backward pass: the kernel's parameters, its launch, and its twin on the host.
#pragma once

#include <cstdint>
#include <string>

#include "program.h"

namespace pathnet::cuda {

// Maximum number of bytes of ReLU bits that a thread reads at once; the bits of a sample are a multiple of them.
constexpr int kMaxLoadBytes = 4;

// The kernel's parameters. All memory is the device's; the launcher reads a host copy of `program`.
struct PathBackward {
  const Program* program;
  const uint8_t* weights;    // as pack_program_weights orders them
  const uint8_t* relu_bits;  // [batch] rows of program->bits_bytes, `bits_stride` bytes apart
  const float* grad;         // [gradients, batch, channels_out, height, width]
  const int32_t* exponent;   // [gradients, batch]
  const int32_t* starts;     // [paths]: index of the gradient from which each path starts
  const float* routing;      // [paths, blocks, 2]
  const int32_t* order;      // [paths]: the order in which paths are taken, the longest first
  int32_t* counter;          // of the items of work taken so far; 0 before the launch
  int64_t bits_stride;
  int32_t gradients, batch, paths;
  uint8_t* images;    // [thread blocks, program->images_scratch()]; unused by the twin, which has its own memory
  double* norms;      // [paths, batch]
  float* grad_input;  // [paths, batch, channels_in, height, width], or null
  int32_t* exponent_input;  // [paths, batch], or null
};

// Sets `blocks` to the number of thread blocks that run at the same time; each needs its part of the images. Returns
// null, or an error.
const char* routed_backward_blocks(const Program& program, int items, int& blocks);

// Launches the kernel on a CUDA stream. Returns null, or an error.
const char* launch_routed_backward(const PathBackward& job, const Program& program, int blocks, void* stream);

// Runs the same kernel body on the host. Returns an empty string, or the first race, read of unwritten memory or
// access out of bounds.
std::string run_routed_backward(const PathBackward& job);

}  // namespace pathnet::cuda
