// The item of work of the routed forward pass: one routing and one sample, whose y is in global memory.
#pragma once

#include "images.cuh"
#include "routed_forward.h"

namespace pathnet::cuda {

struct alignas(8) Pair {
  float first, second;
};

// BN as an affine map, for a lane's two channels of a tile.
struct LaneAffine {
  float factor[2] = {0.0f, 0.0f}, shift[2] = {0.0f, 0.0f};

  LaneAffine() = default;
  PATHNET_DEVICE LaneAffine(const float* table, const Image& image, int tile, int lane) {
    const float* factors = table + tile * kChannelTile + lane_channel(lane);
    PATHNET_UNROLL
    for (int j = 0; j < 2; ++j) {
      factor[j] = factors[j];
      shift[j] = factors[image.channels + j];
    }
  }
};

template <class Exec, bool kWindowed>
struct ForwardItem {
  static constexpr int kParts = 2;
  static constexpr int kTilePairs = kWarpSize * 2;  // elements between two tiles of y
  static constexpr float kWithoutRelu = -__builtin_huge_valf();

  PATHNET_DEVICE ForwardItem(Exec& exec, const PathForward& job)
      : exec(exec), job(job), program(*job.program), y(exec.block() * program.scratch_size) {}

  // Looked up where they are needed, since registers for them would have to live through the whole item.
  PATHNET_DEVICE int item() const { return int(exec.template uniform_load<uint32_t>(item_byte())); }
  PATHNET_DEVICE int path() const { return job.order[item() / job.batch]; }
  PATHNET_DEVICE int sample() const { return item() % job.batch; }
  PATHNET_DEVICE const float* routing() const { return job.routing + int64_t(path()) * program.block_count * 2; }
  // Returns the first element of the other copy of y in the scratch. Unsigned, since intermediate results may exceed
  // 2^31.
  PATHNET_DEVICE int next_y() const {
    return int(2u * uint32_t(exec.block() * program.scratch_size) + uint32_t(program.scratch_size / 2 - y));
  }

  // Access to the scratch by element: a float or a pair of neighbouring channels.
  template <class T>
  PATHNET_DEVICE T load_y(int element) const {
    return exec.template load_scratch<T>(job.scratch + element);
  }
  template <class T>
  PATHNET_DEVICE void store_y(int element, const T& value) const {
    exec.store_scratch(job.scratch + element, value);
  }

  // Returns where to record ReLU bits that begin at a byte of the sample's row; null if none are recorded.
  PATHNET_DEVICE uint8_t* recorded(int bits_byte) const {
    return job.relu_bits == nullptr ? nullptr : job.relu_bits + int64_t(sample()) * program.bits_bytes + bits_byte;
  }

  // Stores relu(bn(y)) of a pair of channels in an operand, zeros beyond the image, and returns its two ReLU bits.
  // NaN stays NaN. `least` is the clamp minimum: 0, or -infinity without a ReLU.
  PATHNET_DEVICE uint32_t activate(int byte, int plane_bytes, const LaneAffine& affine, float first, float second,
                                   bool inside, float least = 0.0f) const {
    first = inside ? Exec::multiply_add(affine.factor[0], first, affine.shift[0]) : 0.0f;
    second = inside ? Exec::multiply_add(affine.factor[1], second, affine.shift[1]) : 0.0f;
    const uint32_t bits = (first > least ? 1u : 0u) | (second > least ? 2u : 0u);
    Images<Exec, kParts, kWindowed>{exec}.store_pair(byte, plane_bytes, first <= least ? least : first,
                                                     second <= least ? least : second);
    return bits;
  }

  Exec& exec;
  const PathForward& job;
  const Program& program;
  int y;                // first element of the current copy of y in the scratch
  float factor = 1.0f;  // of the identity skips between the current block and the next
};

}  // namespace pathnet::cuda
