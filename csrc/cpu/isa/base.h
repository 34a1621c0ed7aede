// Vectors of four floats, in the compiler's own vector types: any processor.
#pragma once

#include <cstdint>
#include <cstring>

namespace pathnet::cpu {
namespace PATHNET_ISA_NAMESPACE {
namespace {

constexpr int kLanes = 4;
typedef float Vector __attribute__((vector_size(16)));
typedef int32_t IntVector __attribute__((vector_size(16)));

inline Vector load(const float* address) {
  Vector value;
  std::memcpy(&value, address, sizeof(value));
  return value;
}
inline void store(float* address, Vector value) { std::memcpy(address, &value, sizeof(value)); }
inline Vector splat(float value) { return Vector{} + value; }
inline Vector multiply_add(Vector a, Vector b, Vector c) { return a * b + c; }
inline Vector maximum(Vector a, Vector b) { return (Vector)(((a > b) & (IntVector)a) | (~(a > b) & (IntVector)b)); }
inline Vector magnitude(Vector a) { return (Vector)((IntVector)a & 0x7fffffff); }

// The lanes whose bit is set; the rest become zero, NaNs too.
inline Vector keep(Vector a, uint32_t bits) {
  const IntVector lanes = {1, 2, 4, 8};
  return (Vector)((IntVector)a & ((lanes & int32_t(bits)) != 0));
}

// The lanes that max(0, a) passes on: positive ones, and NaNs.
inline uint32_t passed(Vector a) {
  const IntVector clamped = a <= 0.0f;
  return 15 & ~((clamped[0] & 1) | (clamped[1] & 2) | (clamped[2] & 4) | (clamped[3] & 8));
}

inline uint32_t positive(Vector a) {
  const IntVector set = a > 0.0f;
  return (set[0] & 1) | (set[1] & 2) | (set[2] & 4) | (set[3] & 8);
}

}  // namespace
}  // namespace PATHNET_ISA_NAMESPACE
}  // namespace pathnet::cpu
