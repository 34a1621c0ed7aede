// A network as the whole-path kernels read it: made once on the host, in shared memory's terms, and copied to the
// device as a tensor of int32. The walk back and the walk forward have one each.
//
// A program has one of two forms, as the shared memory of a thread block allows. Resident: all images lie in shared
// memory, in front of the weights. Windowed: they lie in the thread block's part of a scratch in global memory (L2
// holds it), and shared memory has a window of the source of the convolution at hand.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "../plan.h"
#include "geometry.h"

namespace pathnet::cuda {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kMaxSamples = 8;

// Shared memory before the arena: exponents, peaks, partial sums and the item at hand.
struct Control {
  int32_t item;
  int32_t exponent[kMaxSamples];
  uint32_t peak[2][kMaxSamples];  // bits of the largest magnitude after the last block that changed the gradient
  double partial[kMaxSamples][kWarps];
};
constexpr int kControlBytes = (sizeof(Control) + 127) / 128 * 128;

// One convolution of a walk. Backward it is transposed: `source` is the gradient of the network's output side.
struct Conv {
  Image source, target;
  int32_t source_byte, target_byte;  // of shared memory, or of the scratch
  int32_t kernel, stride;
  int32_t weights_byte;         // of the packed weights
  int32_t chunk_bytes, chunks;  // a chunk holds the weights of sixteen source channels,
  int32_t slices;               // and is cut into so many copies: 1, one a column of the kernel, or one a tap
  int32_t window_plane;         // bytes of one term of a sample in the window
  int32_t column_tiles;         // that one warp computes at a time
  int32_t bits_byte;            // of the target's ReLU in a sample's row; -1 where nothing is masked or recorded
  int32_t affine;               // forward: element of the BN table of the ReLU that follows; -1 without one
  int32_t bias;                 // forward: element of that table where what is added behind it begins; -1 for none
  int32_t behind_relu;          // 1 or 0: whether the skip that its results are added to lies behind a ReLU
  int32_t reads;                // of slices by a thread block

  int32_t pass_count;
  Pass passes[4];

  // Whether a reading of the source serves the three vertical taps of a column of the kernel.
  PATHNET_HOST_DEVICE bool dense() const { return kernel == 3 && stride == 1 && slices <= 3; }
  PATHNET_HOST_DEVICE int rounds(const Pass& pass, int samples) const {
    return ceil_div(pass.units(samples), kWarps);
  }

  PATHNET_HOST_DEVICE int copies() const { return chunks * slices; }
  PATHNET_HOST_DEVICE int slice_bytes() const { return chunk_bytes / slices; }
  // How often a thread block asks for a slice: with more than one, every round of units reads all of them again.
  PATHNET_HOST_DEVICE int slices_read(int samples) const {
    if (copies() == 1) return pass_count;
    int reads = 0;
    for (int i = 0; i < pass_count; ++i) reads += rounds(passes[i], samples) * passes[i].windows * copies();
    return reads;
  }
};

struct BlockForm {
  int32_t skip;  // as in plan.h
  int32_t relu;  // 1 or 0: whether the first unit has a ReLU; without one its ReLU bits are set
  int32_t stride;
  int32_t skip_channels;  // of the input, before they were filled up to 16
  Image in, out;
  int32_t in_byte, out_byte, mid_byte;  // as a convolution's; backward of gradients, forward of operands
  int32_t bits_byte, affine;            // of the first unit's ReLU
  Conv units[2];
  Conv projection;

  PATHNET_HOST_DEVICE bool changes_shape() const { return skip != kIdentity && skip != kActivated; }
  PATHNET_HOST_DEVICE bool pads() const { return skip == kPad || skip == kActivatedPad; }
  PATHNET_HOST_DEVICE bool behind_relu() const { return skip == kActivated || skip == kActivatedPad; }
};

struct Program {
  int32_t backward;  // 1 or 0: forward
  int32_t parts;     // bf16 terms of a number: 1, or 2 for float32 precision
  int32_t samples;   // of a thread block
  int32_t block_count;
  int32_t channels_in, channels_out;  // the network's own, before padding to 16
  int32_t windowed;                   // 1, or 0: resident
  int32_t images_bytes;               // of all images: of shared memory, or of a thread block's part of the scratch
  int32_t window_bytes;               // of shared memory, in the windowed form
  int32_t slot_bytes, slots, shared_bytes;
  int32_t weights_bytes;  // of the packed weights of this direction
  int32_t bits_bytes;     // of a sample's row
  int32_t scratch_size;   // forward: float32 elements of one sample's two copies of y
  int32_t affine_size;    // forward: elements of the BN table, which has the biases too
  int32_t checksum;       // of all other numbers: a program comes from make_program, unchanged

  PATHNET_HOST_DEVICE const BlockForm* blocks() const { return reinterpret_cast<const BlockForm*>(this + 1); }
  PATHNET_HOST_DEVICE int slot_byte(int slot) const {
    return kControlBytes + (windowed ? window_bytes : images_bytes) + slot * slot_bytes;
  }
  // Of any convolution; no windows where images are resident.
  int most_windows() const;
  int most_slices() const;
  // Bytes of a thread block's part of the scratch for images.
  PATHNET_HOST_DEVICE int64_t images_scratch() const { return windowed ? images_bytes : 0; }
};
static_assert(sizeof(Program) % 4 == 0 && sizeof(BlockForm) % 4 == 0, "programs are tensors of int32");

constexpr int64_t program_size(int64_t blocks) { return int64_t(sizeof(Program) + blocks * sizeof(BlockForm)) / 4; }

// The program of a plan's blocks for thread blocks of at most `shared_bytes` of shared memory. Reads the plan's
// tables only. Throws std::invalid_argument where the kernels have no form for a block, naming it and the reason.
std::vector<int32_t> make_program(const Plan& plan, bool backward, int parts, int shared_bytes);

// Whether these numbers are a whole program as make_program gives it.
bool is_program(const int32_t* numbers, int64_t size);

// The plan's weights in the order in which the program's convolutions read them, BN's scales multiplied in where the
// walk goes back; bf16 in two bytes each.
void pack_program_weights(const Plan& plan, const Program& program, uint8_t* packed);

}  // namespace pathnet::cuda
