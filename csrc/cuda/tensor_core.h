// Tensor cores in software: fragments as PTX defines them for ldmatrix.x4 and mma.m16n8k16, and sums as tensor cores
// round them.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace pathnet::cuda {

// The two operands of m16n8k16, for all lanes of a warp.
struct HostSource {
  float of[16][16];  // [pixel][channel]
};
struct HostWeights {
  float of[16][8];  // [channel summed over][channel produced]
};

inline float float_of_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
inline uint32_t bits_of_float(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

// Returns the value rounded toward zero to the 24 bits of float32.
inline double round_toward_zero(double value) {
  uint64_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  bits &= ~((uint64_t(1) << 29) - 1);
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

// Adds a product to the accumulator result(lane), four floats of each lane, and rounds as tensor cores do: the
// products and the accumulator are truncated at kFraction bits below the largest exponent among them, and their sum
// is rounded toward zero to float32. Every addition thus shrinks what it adds to (Ootomo and Yokota, "Recovering
// single precision accuracy from Tensor Cores", 2022, section 3), which rounding to nearest would hide.
template <class Result>
void multiply_accumulate(const Result& result, const HostSource& a, const HostWeights& b) {
  constexpr int kFraction = 25;
  for (int row = 0; row < 16; ++row) {
    float terms[17][8];
    uint32_t largest[8] = {};
    for (int column = 0; column < 8; ++column) {
      terms[16][column] = result(row % 8 * 4 + column / 2)[row / 8 * 2 + column % 2];
    }
    for (int k = 0; k < 16; ++k) {
      for (int column = 0; column < 8; ++column) terms[k][column] = a.of[row][k] * b.of[k][column];
    }
    for (int k = 0; k < 17; ++k) {
      for (int column = 0; column < 8; ++column) {
        largest[column] = std::max(largest[column], bits_of_float(terms[k][column]) & 0x7f800000u);
      }
    }
    for (int column = 0; column < 8; ++column) {
      float& sum = result(row % 8 * 4 + column / 2)[row / 8 * 2 + column % 2];
      const int exponent = int(largest[column] >> 23);
      if (exponent <= kFraction || exponent == 255) {
        sum = 0.0f;
        for (int k = 0; k < 17; ++k) sum += terms[k][column];
        continue;
      }
      const float up = float_of_bits(uint32_t(127 + 127 + kFraction - exponent) << 23);
      int32_t total = 0;
      for (int k = 0; k < 17; ++k) total += int32_t(terms[k][column] * up);
      sum = float(std::ldexp(round_toward_zero(total), exponent - 127 - kFraction));
    }
  }
}

}  // namespace pathnet::cuda
