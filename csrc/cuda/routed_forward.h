// The interface of the routed forward pass: the kernel's parameters, its launch, and its twin on the host.
#pragma once

#include <cstdint>
#include <string>

#include "program.h"

namespace pathnet::cuda {

// The kernel's parameters. All memory is the device's; the launcher reads a host copy of `program`.
struct PathForward {
  const Program* program;
  const uint8_t* weights;  // as pack_program_weights orders them
  const float* affine;   // [program->affine_size]: for each block, the factors and shifts of its two units' channels,
                         // then the biases added after its second convolution and after its projection
  const float* y0;       // [batch, channels_in, height, width]
  const float* routing;  // [paths, blocks, 2]
  const int32_t* order;  // [paths]: the order in which routings are taken, the longest first
  int32_t* counter;      // of the items of work taken so far; 0 before the launch
  int32_t batch, paths;
  float* scratch;      // [thread blocks, program->scratch_size]
  uint8_t* images;     // [thread blocks, program->images_scratch()]; unused by the twin, which has memory of its own
  float* output;       // [paths, batch, channels_out, height, width]
  uint8_t* relu_bits;  // [batch, program->bits_bytes] of the only routing, or null
};

// Sets `blocks` to the number of thread blocks that run at the same time; each needs its part of scratch and images.
// Returns null, or an error.
const char* routed_forward_blocks(const Program& program, int items, int& blocks);

// Launches the kernel on a CUDA stream. Returns null, or an error.
const char* launch_routed_forward(const PathForward& job, const Program& program, int blocks, void* stream);

// Runs the same kernel body on the host. Returns an empty string, or the first race, read of unwritten memory or
// access out of bounds.
std::string run_routed_forward(const PathForward& job);

}  // namespace pathnet::cuda
