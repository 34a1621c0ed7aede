// A program: the network as the whole-path kernels read it. The host makes it once for each direction, in bytes of
// shared memory, and copies it to the device as a tensor of int32.
//
// A program has one of two forms, depending on the shared memory of a thread block. Resident: all images are in
// shared memory, in front of the weights. Windowed: images are in the thread block's part of a scratch in global
// memory, which L2 holds, and shared memory has a window of the source of the current convolution.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "../plan.h"
#include "strips.h"

namespace pathnet::cuda {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kMaxSamples = 8;

// The head of shared memory, before images or window.
struct Control {
  int32_t item;                   // the current item of work
  int32_t exponent[kMaxSamples];  // of each sample's gradient
  uint32_t peak[2][kMaxSamples];  // bits of the largest magnitude after the last block that changed the gradient
  double partial[kMaxSamples][kWarps];  // partial sums of squared norms
};
constexpr int kControlBytes = (sizeof(Control) + 127) / 128 * 128;

// One convolution. The backward pass runs its transpose: `source` is then the gradient of its output.
struct Conv {
  Image source, target;
  int32_t source_byte, target_byte;  // in shared memory, or in the scratch
  int32_t kernel, stride;
  int32_t weights_byte;         // in the packed weights
  int32_t chunk_bytes, chunks;  // a chunk holds the weights of sixteen source channels
  int32_t slices;               // copies a chunk is cut into: 1, one per column of the kernel, or one per tap
  int32_t window_plane;         // bytes of one term of a sample in the window
  int32_t column_tiles;         // computed by one warp at a time
  int32_t bits_byte;            // of the target's ReLU in a sample's row; -1 where nothing is masked or recorded
  int32_t affine;               // forward: first element of the next ReLU's BN in the BN table; -1 without one
  int32_t bias;                 // forward: first element of the bias in the BN table; -1 without one
  int32_t behind_relu;          // 1 or 0: whether the skip that its results are added to starts after a ReLU
  int32_t reads;                // slices that a thread block reads

  int32_t pass_count;
  Pass passes[4];

  // Whether one load of the source serves the three vertical taps of a column of the kernel.
  PATHNET_HOST_DEVICE bool dense() const { return kernel == 3 && stride == 1 && slices <= 3; }
  PATHNET_HOST_DEVICE int rounds(const Pass& pass, int samples) const {
    return ceil_div(pass.units(samples), kWarps);
  }

  PATHNET_HOST_DEVICE int copies() const { return chunks * slices; }
  PATHNET_HOST_DEVICE int slice_bytes() const { return chunk_bytes / slices; }
  // Slices that a thread block reads: if there is more than one, every round of units reads all of them again.
  PATHNET_HOST_DEVICE int slices_read(int samples) const {
    if (copies() == 1) return pass_count;
    int reads = 0;
    for (int i = 0; i < pass_count; ++i) reads += rounds(passes[i], samples) * passes[i].windows * copies();
    return reads;
  }
};

struct BlockForm {
  int32_t skip;  // a Skip of plan.h
  int32_t relu;  // 1 or 0: whether the first unit has a ReLU; without one its ReLU bits are set
  int32_t stride;
  int32_t skip_channels;  // of the input, before padding to a multiple of 16
  int32_t pad_before;     // channels that a zero-padding skip adds before them
  Image in, out;
  int32_t in_byte, out_byte,
      mid_byte;               // like a Conv's; for gradients in the backward pass, for operands in the forward
  int32_t bits_byte, affine;  // of the first unit's ReLU
  Conv units[2];
  Conv projection;

  PATHNET_HOST_DEVICE bool changes_shape() const { return skip != kIdentity && skip != kActivated; }
  PATHNET_HOST_DEVICE bool pads() const { return skip == kPad || skip == kActivatedPad; }
  PATHNET_HOST_DEVICE bool behind_relu() const { return skip == kActivated || skip == kActivatedPad; }
};

struct Program {
  int32_t backward;  // 1, or 0: forward
  int32_t parts;     // bf16 terms of a number: 1, or 2 for float32 precision
  int32_t samples;   // of a thread block
  int32_t block_count;
  int32_t channels_in, channels_out;  // of the network, before padding to a multiple of 16
  int32_t windowed;                   // 1, or 0: resident
  int32_t images_bytes;               // of all images, in shared memory or in a thread block's part of the scratch
  int32_t window_bytes;               // of shared memory; 0 in the resident form
  int32_t slot_bytes, slots, shared_bytes;
  int32_t weights_bytes;  // of the packed weights of this direction
  int32_t bits_bytes;     // of a sample's row
  int32_t scratch_size;   // forward: float32 elements of one sample's two copies of y
  int32_t affine_size;    // forward: elements of the BN table, which includes the biases
  int32_t checksum;       // of all other numbers, which shows that make_program made them

  PATHNET_HOST_DEVICE const BlockForm* blocks() const { return reinterpret_cast<const BlockForm*>(this + 1); }
  PATHNET_HOST_DEVICE int slot_byte(int slot) const {
    return kControlBytes + (windowed ? window_bytes : images_bytes) + slot * slot_bytes;
  }
  // Largest number of windows of any pass; 0 in the resident form.
  int max_windows() const;
  // Largest number of slices of any chunk.
  int max_slices() const;
  // Bytes of images in a thread block's part of the scratch.
  PATHNET_HOST_DEVICE int64_t images_scratch() const { return windowed ? images_bytes : 0; }
};
static_assert(sizeof(Program) % 4 == 0 && sizeof(BlockForm) % 4 == 0, "programs are tensors of int32");

constexpr int64_t program_size(int64_t blocks) { return int64_t(sizeof(Program) + blocks * sizeof(BlockForm)) / 4; }

// Returns the program of a plan's blocks for thread blocks of at most `shared_bytes` of shared memory. Reads only the
// plan's tables. Throws std::invalid_argument, naming the block and the reason, if the kernels cannot run a block.
std::vector<int32_t> make_program(const Plan& plan, bool backward, int parts, int shared_bytes);

// Returns the checksum of a program's numbers, without the checksum's own field.
int32_t checksum_of(const int32_t* numbers, int64_t size);

// Returns whether these numbers are a complete program, unchanged since make_program made it.
bool is_program(const int32_t* numbers, int64_t size);

// Writes the plan's weights in the order in which the program's convolutions read them, two bytes per bf16; for the
// backward pass BN's scales are multiplied in.
void pack_program_weights(const Plan& plan, const Program& program, uint8_t* packed);

}  // namespace pathnet::cuda
