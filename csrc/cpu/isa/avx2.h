// Vectors of eight floats, AVX2 and FMA.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace pathnet::cpu {
namespace PATHNET_ISA_NAMESPACE {
namespace {

constexpr int kLanes = 8;
using Vector = __m256;

inline Vector load(const float* address) { return _mm256_loadu_ps(address); }
inline void store(float* address, Vector value) { _mm256_storeu_ps(address, value); }
inline Vector splat(float value) { return _mm256_set1_ps(value); }
inline Vector multiply_add(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }
inline Vector maximum(Vector a, Vector b) { return _mm256_max_ps(a, b); }
inline Vector magnitude(Vector a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }

// The lanes whose bit is set; the rest become zero, NaNs too.
inline Vector keep(Vector a, uint32_t bits) {
  const __m256i lanes = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i set = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(int(bits)), lanes), lanes);
  return _mm256_and_ps(a, _mm256_castsi256_ps(set));
}

// The lanes that max(0, a) passes on: positive ones, and NaNs.
inline uint32_t passed(Vector a) {
  return uint32_t(_mm256_movemask_ps(_mm256_cmp_ps(a, _mm256_setzero_ps(), _CMP_NLE_UQ)));
}

inline uint32_t positive(Vector a) {
  return uint32_t(_mm256_movemask_ps(_mm256_cmp_ps(a, _mm256_setzero_ps(), _CMP_GT_OQ)));
}

}  // namespace
}  // namespace PATHNET_ISA_NAMESPACE
}  // namespace pathnet::cpu
