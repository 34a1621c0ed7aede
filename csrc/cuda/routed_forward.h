#pragma once

#include <cstdint>
#include <string>

#include "program.h"

namespace pathnet::cuda {

// Everything on the device, but for `program`'s host copy that the launcher reads.
struct PathForward {
  const Program* program;
  const uint8_t* weights;  // as pack_program_weights lays them out
  const float* affine;     // [program->affine_size]: of each block's two units the factors and the shifts of their
                           // channels, then what is added behind its second convolution and behind its projection
  const float* y0;         // [batch, channels_in, height, width]
  const float* routing;    // [paths, blocks, 2]
  const int32_t* order;    // [paths]: the order in which routings are taken, the longest first
  int32_t* counter;        // of the items taken; 0 before
  int32_t batch, paths;
  float* scratch;      // [thread blocks, program->scratch_size]
  uint8_t* images;     // [thread blocks, program->images_scratch()]; the twin has memory of its own
  float* output;       // [paths, batch, channels_out, height, width]
  uint8_t* relu_bits;  // [batch, program->bits_bytes] of the one routing, or null
};

// How many thread blocks run at a time; each needs its part of scratch and images. Null, or what went wrong.
const char* routed_forward_blocks(const Program& program, int items, int& blocks);

// On the device, on a CUDA stream. Null, or what went wrong.
const char* launch_routed_forward(const PathForward& job, const Program& program, int blocks, void* stream);

// The same kernel body on the host. Empty, or the first race, read of unwritten memory or access out of bounds.
std::string run_routed_forward(const PathForward& job);

}  // namespace pathnet::cuda
