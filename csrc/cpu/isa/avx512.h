// Vectors of sixteen floats, AVX-512.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace pathnet::cpu {
namespace PATHNET_ISA_NAMESPACE {
namespace {

constexpr int kLanes = 16;
using Vector = __m512;

inline Vector load(const float* address) { return _mm512_loadu_ps(address); }
inline void store(float* address, Vector value) { _mm512_storeu_ps(address, value); }
inline Vector splat(float value) { return _mm512_set1_ps(value); }
inline Vector multiply_add(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
inline Vector maximum(Vector a, Vector b) { return _mm512_max_ps(a, b); }
inline Vector magnitude(Vector a) { return _mm512_abs_ps(a); }

// The lanes whose bit is set; the rest become zero, NaNs too.
inline Vector keep(Vector a, uint32_t bits) { return _mm512_maskz_mov_ps(__mmask16(bits), a); }

// The lanes that max(0, a) passes on: positive ones, and NaNs.
inline uint32_t passed(Vector a) { return _mm512_cmp_ps_mask(a, _mm512_setzero_ps(), _CMP_NLE_UQ); }

inline uint32_t positive(Vector a) { return _mm512_cmp_ps_mask(a, _mm512_setzero_ps(), _CMP_GT_OQ); }

}  // namespace
}  // namespace PATHNET_ISA_NAMESPACE
}  // namespace pathnet::cpu
