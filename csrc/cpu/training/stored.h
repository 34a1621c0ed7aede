// Numbers of a batch as training stores them, float32 or bf16, in vectors of float32.
//
// Images of a batch are as torch's channels_last has them: [height, width, channels], without padding. A vector may
// therefore reach beyond a pixel's last channel: `count` says how many of its lanes are the pixel's.
#pragma once

#include <algorithm>
#include <type_traits>

#include "../isa/vector.h"

namespace pathnet::cpu {
namespace PATHNET_ISA_NAMESPACE {
namespace {

struct Bf16 {
  uint16_t bits;
};

inline Vector load_stored(const float* address) { return load(address); }
inline void store_stored(float* address, Vector value) { store(address, value); }

#if defined(__AVX512F__)
inline Vector load_stored(const Bf16* address) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(address));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
#elif defined(__AVX2__)
inline Vector load_stored(const Bf16* address) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(address));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
#else
inline Vector load_stored(const Bf16* address) {
  float lanes[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = from_bf16(address[lane].bits);
  return load(lanes);
}
#endif

#if defined(__AVX512BF16__)
inline void store_stored(Bf16* address, Vector value) {
  const __m256bh bits = _mm512_cvtneps_pbh(value);
  std::memcpy(address, &bits, sizeof(bits));
}
#elif defined(__AVX512F__)
// Rounding would carry a NaN whose upper bits are all set over to zero: NaNs, which arithmetic leaves quiet, are cut.
inline void store_stored(Bf16* address, Vector value) {
  const __m512i bits = _mm512_castps_si512(value),
                odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __mmask16 number = _mm512_cmp_ps_mask(value, value, _CMP_ORD_Q);
  const __m512i rounded = _mm512_mask_add_epi32(bits, number, bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __m256i narrow = _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
  std::memcpy(address, &narrow, sizeof(narrow));
}
#elif defined(__AVX2__)
// NaNs are cut, as above.
inline void store_stored(Bf16* address, Vector value) {
  const __m256i bits = _mm256_castps_si256(value),
                odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i number = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_ORD_Q));
  const __m256i rounded =
      _mm256_add_epi32(bits, _mm256_and_si256(number, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))));
  const __m256i high = _mm256_srli_epi32(rounded, 16);
  // Packs within halves of the register, whose results are then brought together.
  const __m256i narrow = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0xd8);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(address), _mm256_castsi256_si128(narrow));
}
#else
inline void store_stored(Bf16* address, Vector value) {
  float lanes[kLanes];
  store(lanes, value);
  for (int lane = 0; lane < kLanes; ++lane) address[lane].bits = to_bf16(lanes[lane]);
}
#endif

// The first `count` lanes; the rest are zero.
template <class Stored>
Vector load_some(const Stored* address, int64_t count) {
  if (count >= kLanes) return load_stored(address);
  Stored lanes[kLanes] = {};
  if (count > 0) std::memcpy(lanes, address, size_t(count) * sizeof(Stored));
  return load_stored(lanes);
}

template <class Stored>
void store_some(Stored* address, Vector value, int64_t count) {
  if (count >= kLanes) return store_stored(address, value);
  Stored lanes[kLanes];
  store_stored(lanes, value);
  if (count > 0) std::memcpy(address, lanes, size_t(count) * sizeof(Stored));
}

// Calls work(lanes) with what load_some and store_some take as the count: a constant where all lanes are the pixel's,
// so that loops over pixels do not test it.
template <class Work>
void for_lanes(int64_t count, const Work& work) {
  if (count >= kLanes) {
    work(std::integral_constant<int64_t, kLanes>());
  } else if (count > 0) {
    work(count);
  }
}

}  // namespace
}  // namespace PATHNET_ISA_NAMESPACE
}  // namespace pathnet::cpu
