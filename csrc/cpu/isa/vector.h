// The vectors of the instruction set that this file is compiled for.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

#ifndef PATHNET_ISA_NAMESPACE
#define PATHNET_ISA_NAMESPACE base
#endif

#if defined(__AVX512F__)
#include "avx512.h"
#elif defined(__AVX2__)
#include "avx2.h"
#else
#include "base.h"
#endif

#include "../layout.h"

namespace pathnet::cpu {
namespace PATHNET_ISA_NAMESPACE {
namespace {

// ReLU bits of kLanes channels of a pixel, whose group of 16 is two bytes, the first channel lowest.
inline uint32_t read_bits(const uint8_t* pixel, int64_t channel) {
  const uint8_t* bytes = pixel + channel / 8;
  if (kLanes == 16) {
    uint16_t bits;
    std::memcpy(&bits, bytes, sizeof(bits));
    return bits;
  }
  return kLanes == 8 ? *bytes : *bytes >> channel % 8;
}

inline void write_bits(uint8_t* pixel, int64_t channel, uint32_t bits) {
  uint8_t* bytes = pixel + channel / 8;
  if (kLanes == 16) {
    const uint16_t whole = uint16_t(bits);
    std::memcpy(bytes, &whole, sizeof(whole));
  } else if (kLanes == 8) {
    *bytes = uint8_t(bits);
  } else {
    *bytes = channel % 8 == 0 ? uint8_t(bits) : uint8_t(*bytes | bits << 4);
  }
}

inline uint16_t to_bf16(float value) {
  uint32_t pattern;
  std::memcpy(&pattern, &value, sizeof(pattern));
  // Rounding would carry a NaN whose upper bits are all set over to zero.
  return value != value ? 0x7fc0 : uint16_t((pattern + 0x7fff + (pattern >> 16 & 1)) >> 16);
}

inline float from_bf16(uint16_t value) {
  const uint32_t pattern = uint32_t(value) << 16;
  float widened;
  std::memcpy(&widened, &pattern, sizeof(widened));
  return widened;
}

inline float largest_lane(Vector a) {
  float lanes[kLanes], largest = 0.0f;
  store(lanes, a);
  for (float lane : lanes) largest = lane > largest ? lane : largest;
  return largest;
}

// Flushes denormal numbers to zero in this thread while it lives: they are a hundred times slower, and are 2^-100
// below the largest element of a gradient, which backward passes keep rescaling. Forward passes keep them, since ReLU
// bits depend on them.
class FlushDenormals {
 public:
#if defined(__x86_64__)
  explicit FlushDenormals(bool flush = true) : before_(_mm_getcsr()) { _mm_setcsr(before_ | (flush ? 0x8040 : 0)); }
  ~FlushDenormals() { _mm_setcsr(before_); }

 private:
  unsigned before_;
#else
  explicit FlushDenormals(bool = true) {}
#endif
};

}  // namespace
}  // namespace PATHNET_ISA_NAMESPACE
}  // namespace pathnet::cpu
