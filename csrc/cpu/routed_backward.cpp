// Walks gradients from the last block's output to the first block's input, BN mode `running`, float32.
//
// A work item is one (routing, sample): its gradient stays in this thread's scratch for all blocks. For the
// networks of the paper that is 64 KB a buffer in stage 1 (16 channels of 32 x 32), so that the working set lies in
// L2 and a module's weights (9 to 147 KB) are its only traffic.
//
// A transposed convolution is written as a plain one: the gradient is spread out by the stride and given a border of
// zeros, rows of `pitch` floats; output position j of the flattened plane then reads position j + tap of every input
// plane, so the inner loop runs over long contiguous rows whatever the side is (the border columns compute garbage
// that is never read). It keeps kTileChannels x kTileVectors accumulators in registers:
// 16 multiply-adds for 2 loads and 8 broadcasts with AVX-512, bound by the multiply-adds.
//
// Compiled once an instruction set, each in the namespace PATHNET_ISA_NAMESPACE.

#include "routed_backward.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#ifndef PATHNET_ISA_NAMESPACE
#define PATHNET_ISA_NAMESPACE base
#endif

namespace pathnet {
namespace PATHNET_ISA_NAMESPACE {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
// Sixteen accumulators of the 32 registers of AVX-512, twelve of the sixteen of the others. A tile is narrow, since
// stage 3 of the paper's networks has only 80 positions, border included.
constexpr int kTileChannels = kLanes == 16 ? 8 : 4;
constexpr int kTileVectors = kLanes == 16 ? 2 : 3;
constexpr int kTile = kLanes * kTileVectors;

typedef float Vector __attribute__((vector_size(kLanes * sizeof(float))));

inline Vector load(const float* address) {
  Vector value;
  std::memcpy(&value, address, sizeof(value));
  return value;
}

inline void store(float* address, Vector value) { std::memcpy(address, &value, sizeof(value)); }

int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// The gradient of a unit's output, spread out by the stride inside a border of zeros.
struct Spread {
  explicit Spread(const Unit& unit)
      : kernel(unit.kernel),
        halo(unit.kernel - 1 - unit.padding),
        pitch(unit.in_width + unit.kernel - 1),
        rows(unit.in_height + unit.kernel - 1),
        positions(round_up(unit.in_height * pitch, kTile)) {}

  // Elements of one channel, with room for the last tile's reads beyond the plane.
  int64_t plane() const { return rows * pitch + kernel + kTile; }

  int64_t kernel, halo, pitch, rows;
  int64_t positions;  // computed of every output channel, border columns included
};

int64_t packed_weight_size(const Unit& unit) {
  return round_up(unit.in_channels, kTileChannels) * unit.out_channels * unit.kernel * unit.kernel;
}

int64_t packed_size(const Plan& plan) {
  int64_t size = 0;
  for (int64_t u = 0; u < plan.unit_count; ++u) size += packed_weight_size(plan.units[u]);
  return size;
}

// The scales of the channels that a unit's convolution reads; a projection shares its block's first unit's.
const float* scales_of(const Plan& plan, int64_t unit) {
  for (int64_t b = 0; b < plan.block_count; ++b) {
    if (plan.blocks[b].projection_unit == unit) unit = plan.blocks[b].first_unit;
  }
  return plan.scales + plan.units[unit].scale_offset;
}

// [input channel tile][output channel][flipped tap][input channel in tile], BN's scale multiplied in.
void pack_weights(const Plan& plan, float* packed) {
  for (int64_t u = 0; u < plan.unit_count; ++u) {
    const Unit& unit = plan.units[u];
    const int64_t taps = unit.kernel * unit.kernel;
    const float* weights = plan.weights + unit.weight_offset;
    const float* scales = scales_of(plan, u);
    for (int64_t tile = 0; tile < unit.in_channels; tile += kTileChannels) {
      for (int64_t out = 0; out < unit.out_channels; ++out) {
        for (int64_t tap = 0; tap < taps; ++tap) {
          for (int64_t in = tile; in < tile + kTileChannels; ++in) {
            *packed++ = in < unit.in_channels
                            ? weights[(out * unit.in_channels + in) * taps + (taps - 1 - tap)] * scales[in]
                            : 0.0f;
          }
        }
      }
    }
  }
}

struct Scratch {
  explicit Scratch(const Plan& plan) {
    int64_t dense = 0, spread = 0, product = 0;
    for (int64_t b = 0; b < plan.block_count; ++b) {
      dense = std::max({dense, plan.blocks[b].in_size(), plan.blocks[b].out_size()});
    }
    for (int64_t u = 0; u < plan.unit_count; ++u) {
      const Unit& unit = plan.units[u];
      const Spread layout(unit);
      dense = std::max({dense, unit.in_size(), unit.out_size()});
      spread = std::max(spread, unit.out_channels * layout.plane());
      product = std::max(product, kTileChannels * layout.positions);
    }
    mask.resize(round_up(dense, 8));
    for (std::vector<float>* buffer : {&grad, &next, &inner, &inner_next}) buffer->resize(dense);
    this->spread.resize(spread);
    this->product.resize(product);
  }

  std::vector<float> grad, next, inner, inner_next, spread, product, mask;
};

void spread_out(const Unit& unit, const Spread& layout, const float* grad, float* spread) {
  std::fill_n(spread, unit.out_channels * layout.plane(), 0.0f);
  for (int64_t c = 0; c < unit.out_channels; ++c) {
    float* plane = spread + c * layout.plane();
    for (int64_t i = 0; i < unit.out_height; ++i) {
      float* row = plane + (layout.halo + i * unit.stride) * layout.pitch + layout.halo;
      const float* values = grad + (c * unit.out_height + i) * unit.out_width;
      for (int64_t j = 0; j < unit.out_width; ++j) row[j * unit.stride] = values[j];
    }
  }
}

// One tile of kTileChannels output planes at kTile positions.
void product_tile(const float* spread, int64_t plane, int64_t channels, int64_t kernel, int64_t pitch,
                  const float* packed, float* product, int64_t product_pitch) {
  Vector sums[kTileChannels][kTileVectors] = {};
  for (int64_t c = 0; c < channels; ++c) {
    const float* row = spread + c * plane;
    for (int64_t i = 0; i < kernel; ++i, row += pitch) {
      for (int64_t j = 0; j < kernel; ++j, packed += kTileChannels) {
        Vector values[kTileVectors];
        for (int v = 0; v < kTileVectors; ++v) values[v] = load(row + j + v * kLanes);
        for (int t = 0; t < kTileChannels; ++t) {
          for (int v = 0; v < kTileVectors; ++v) sums[t][v] += values[v] * packed[t];
        }
      }
    }
  }
  for (int t = 0; t < kTileChannels; ++t) {
    for (int v = 0; v < kTileVectors; ++v) store(product + t * product_pitch + v * kLanes, sums[t][v]);
  }
}

// One float a bit, eight at a time, so that the loop that applies them has no bit arithmetic in it.
struct ByteMasks {
  constexpr ByteMasks() : of() {
    for (int byte = 0; byte < 256; ++byte) {
      for (int bit = 0; bit < 8; ++bit) of[byte][bit] = float((byte >> bit) & 1);
    }
  }
  float of[256][8];
};
constexpr ByteMasks kByteMasks;

void expand_bits(const uint8_t* bits, int64_t size, float* mask) {
  for (int64_t byte = 0; byte * 8 < size; ++byte)
    std::memcpy(mask + byte * 8, kByteMasks.of[bits[byte]], 8 * sizeof(float));
}

// grad_input += coefficient * bits * transposed convolution of grad; the scale is in the packed weights.
void add_transposed(const Unit& unit, const float* packed, const uint8_t* bits, const float* grad, float coefficient,
                    Scratch& scratch, float* grad_input) {
  const Spread layout(unit);
  spread_out(unit, layout, grad, scratch.spread.data());
  expand_bits(bits, unit.in_size(), scratch.mask.data());
  for (int64_t tile = 0; tile < unit.in_channels; tile += kTileChannels) {
    for (int64_t position = 0; position < layout.positions; position += kTile) {
      product_tile(scratch.spread.data() + position, layout.plane(), unit.out_channels, unit.kernel, layout.pitch,
                   packed, scratch.product.data() + position, layout.positions);
    }
    packed += kTileChannels * unit.out_channels * unit.kernel * unit.kernel;
    const int64_t last = std::min<int64_t>(tile + kTileChannels, unit.in_channels);
    for (int64_t c = tile; c < last; ++c) {
      for (int64_t i = 0; i < unit.in_height; ++i) {
        const float* values = scratch.product.data() + (c - tile) * layout.positions + i * layout.pitch;
        const int64_t first = (c * unit.in_height + i) * unit.in_width;
        const float* mask = scratch.mask.data() + first;
        float* out = grad_input + first;
        for (int64_t j = 0; j < unit.in_width; ++j) out[j] += mask[j] != 0.0f ? coefficient * values[j] : 0.0f;
      }
    }
  }
}

class Walk {
 public:
  explicit Walk(const RoutedBackward& job) : job_(job), plan_(job.plan), scratch_(job.plan) {
    packed_.reserve(plan_.unit_count);
    const float* packed = job.packed_weights;
    for (int64_t u = 0; u < plan_.unit_count; ++u) {
      packed_.push_back(packed);
      packed += packed_weight_size(plan_.units[u]);
    }
  }

  void operator()(int64_t item) {
    const int64_t sample = item / job_.routings, path = item % job_.routings;
    const float* routing = job_.routing + path * plan_.block_count * 2;
    bits_ = plan_.relu_bits + sample * plan_.bits_stride;
    const int64_t size_out = plan_.blocks[plan_.block_count - 1].out_size();
    std::copy_n(job_.grad + sample * size_out, size_out, scratch_.grad.data());
    int exponent = job_.exponent[sample];
    for (int64_t b = plan_.block_count - 1; b >= 0; --b) {
      const float a = routing[2 * b], c = routing[2 * b + 1];
      if (plan_.blocks[b].skip == kIdentity && a == 1.0f && c == 0.0f) continue;
      through(plan_.blocks[b], a, c);
      std::swap(scratch_.grad, scratch_.next);
      exponent += rescale(scratch_.grad.data(), plan_.blocks[b].in_size());
    }
    const int64_t size_in = plan_.blocks[0].in_size();
    const int64_t slot = path * job_.batch + sample;
    std::copy_n(scratch_.grad.data(), size_in, job_.grad_input + slot * size_in);
    job_.exponent_input[slot] = exponent;
  }

 private:
  // scratch.next = a J_skip^T grad + c J_residual^T grad
  void through(const Block& block, float a, float c) {
    skip(block, a);
    if (c == 0.0f) return;
    const float* grad = scratch_.grad.data();
    for (int64_t u = block.first_unit + block.unit_count - 1; u > block.first_unit; --u) {
      const Unit& unit = plan_.units[u];
      std::fill_n(scratch_.inner_next.data(), unit.in_size(), 0.0f);
      add_transposed(unit, packed_[u], bits_ + unit.bits_offset, grad, 1.0f, scratch_, scratch_.inner_next.data());
      std::swap(scratch_.inner, scratch_.inner_next);
      grad = scratch_.inner.data();
    }
    const Unit& first = plan_.units[block.first_unit];
    add_transposed(first, packed_[block.first_unit], bits_ + first.bits_offset, grad, c, scratch_,
                   scratch_.next.data());
  }

  void skip(const Block& block, float a) {
    const float* grad = scratch_.grad.data();
    float* next = scratch_.next.data();
    if (block.skip == kIdentity && a != 0.0f) {
      for (int64_t j = 0; j < block.in_size(); ++j) next[j] = a * grad[j];
      return;
    }
    std::fill_n(next, block.in_size(), 0.0f);
    if (a == 0.0f) return;
    if (block.skip == kProjection) {
      add_transposed(plan_.units[block.projection_unit], packed_[block.projection_unit],
                     bits_ + plan_.units[block.first_unit].bits_offset, grad, a, scratch_, next);
    } else {
      pad_transposed(block, a, grad, next);
    }
  }

  void pad_transposed(const Block& block, float a, const float* grad, float* next) {
    int64_t stride = 1;
    for (int64_t u = 0; u < block.unit_count; ++u) stride *= plan_.units[block.first_unit + u].stride;
    for (int64_t c = 0; c < block.in_channels; ++c) {
      for (int64_t i = 0; i < block.out_height; ++i) {
        const float* from = grad + (c * block.out_height + i) * block.out_width;
        float* to = next + (c * block.in_height + i * stride) * block.in_width;
        for (int64_t j = 0; j < block.out_width; ++j) to[j * stride] = a * from[j];
      }
    }
  }

  // Brings the largest magnitude into [1/2, 1) by an exact power of two, and returns the power taken out. Zero and
  // non-finite gradients stay as they are.
  static int rescale(float* grad, int64_t size) {
    // Magnitudes compare as their bit patterns do, and integers are compared many at a time.
    uint32_t largest_bits = 0;
    for (int64_t j = 0; j < size; ++j) {
      uint32_t pattern;
      std::memcpy(&pattern, grad + j, sizeof(pattern));
      largest_bits = std::max(largest_bits, pattern & 0x7fffffffu);
    }
    if (largest_bits == 0 || largest_bits >= 0x7f800000u) return 0;
    float largest;
    std::memcpy(&largest, &largest_bits, sizeof(largest));
    int power;
    std::frexp(largest, &power);
    // In two factors, since 2^-power can leave the range of float32 where the result does not.
    const float half = std::ldexp(1.0f, -power / 2), rest = std::ldexp(1.0f, -power - (-power / 2));
    for (int64_t j = 0; j < size; ++j) grad[j] = grad[j] * half * rest;
    return power;
  }

  const RoutedBackward& job_;
  const Plan& plan_;
  Scratch scratch_;
  std::vector<const float*> packed_;
  const uint8_t* bits_ = nullptr;
};

void walk(const RoutedBackward& job, int64_t begin, int64_t end) {
  Walk walk(job);
  for (int64_t item = begin; item < end; ++item) walk(item);
}

}  // namespace

RoutedBackwardKernel routed_backward_kernel() { return {packed_size, pack_weights, walk}; }

}  // namespace PATHNET_ISA_NAMESPACE
}  // namespace pathnet
