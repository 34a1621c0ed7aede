// The kernels' layouts of ReLU bits and normalised inputs, written a second time.
#pragma once

#include <vector>

#include "memory.h"
#include "trial.h"

namespace trial {

using Masks = std::vector<std::vector<uint8_t>>;  // of each unit [batch][channels][height][width]
using Planes = std::vector<std::vector<float>>;   // likewise; empty for a unit without BN

// Calls then(unit, element of its mask, byte, bit) for every ReLU bit.
template <class Then>
void each_bit(const Trial& trial, const Then& then) {
  for (size_t u = 0; u < trial.units.size(); ++u) {
    const pathnet::Unit& unit = trial.units[u];
    if (unit.bits_offset < 0) continue;
    const int64_t pixels = unit.in_height * unit.in_width, groups = (unit.in_channels + 15) / 16;
    for (int64_t i = 0; i < trial.batch * unit.in_channels * pixels; ++i) {
      const int64_t sample = i / pixels / unit.in_channels, channel = i / pixels % unit.in_channels;
      const int64_t byte = sample * trial.bits_stride + unit.bits_offset + (i % pixels * groups * 16 + channel) / 8;
      then(u, size_t(i), size_t(byte), 1 << channel % 8);
    }
  }
}

inline Exact<uint8_t> as_bits(const Trial& trial, const Masks& masks) {
  Exact<uint8_t> bits(trial.batch * trial.bits_stride, false, 0);
  each_bit(trial, [&](size_t u, size_t i, size_t byte, int bit) {
    if (masks[u][i]) bits.data()[byte] |= uint8_t(bit);
  });
  return bits;
}

inline Masks as_masks(const Trial& trial, const Exact<uint8_t>& bits) {
  Masks masks = trial.relu_mask;
  each_bit(trial, [&](size_t u, size_t i, size_t byte, int bit) { masks[u][i] = (bits[byte] & bit) != 0; });
  return masks;
}

// From unit after unit [batch][height][width][channels padded to 16].
inline Planes as_planes(const Trial& trial, const Exact<float>& normalized) {
  Planes planes;
  const float* image = normalized.data();
  for (const pathnet::Unit& unit : trial.units) {
    planes.emplace_back();
    if (unit.scale_offset < 0) continue;
    const int64_t pixels = unit.in_height * unit.in_width, padded = (unit.in_channels + 15) / 16 * 16;
    for (int64_t s = 0; s < trial.batch; ++s, image += pixels * padded) {
      for (int64_t c = 0; c < unit.in_channels; ++c) {
        for (int64_t i = 0; i < pixels; ++i) planes.back().push_back(image[i * padded + c]);
      }
    }
  }
  return planes;
}

}  // namespace trial
