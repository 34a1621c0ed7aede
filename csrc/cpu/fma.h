// Convolutions by fused multiply-add, on floats, or on pairs of bf16 numbers where the processor has that product.
//
// A tile keeps X pixels times V vectors of target channels in registers. For every source channel it takes T vectors of
// weights (V of each) for T neighbouring taps, and X + T - 1 source numbers, each spread over a vector once and used by
// all its taps: with X = 8, V = 2, T = 3 that is 16 loads for 48 multiply-adds, so that the multiply-adds are the limit
// also where a processor loads only one whole vector a cycle. 16 accumulators, 6 weights and one number make 23 of the
// 32 registers of AVX-512; with 16 registers X = 8, V = 1, T = 3 takes 12.
#pragma once

#include <algorithm>

#include "vector.h"

namespace pathnet {
namespace PATHNET_ISA_NAMESPACE {
namespace {

constexpr bool kWide = kLanes == 16;
constexpr int kMostVectors = kWide ? 2 : 1;
constexpr int kMostPixels = kWide ? 16 : 8;
// Accumulated rows go through a buffer of this many pixels before what follows the convolution takes them.
constexpr int64_t kRowPixels = 64;

struct FloatProduct {
  using Element = float;
  static constexpr int kChannels = 1;  // of the source in one product
  using Weight = Vector;
  static Weight weights(const float* address) { return load(address); }
  static Weight spread(const float* address) { return splat(*address); }
  static Vector add(Vector sum, Weight a, Weight b) { return multiply_add(a, b, sum); }
  static float encode(float value) { return value; }
  static constexpr float value(float element) { return element; }
};

#if defined(__AVX512BF16__)
inline uint16_t to_bf16(float value) {
  uint32_t pattern;
  std::memcpy(&pattern, &value, sizeof(pattern));
  return uint16_t((pattern + 0x7fff + (pattern >> 16 & 1)) >> 16);
}

struct Bf16Product {
  using Element = uint16_t;
  static constexpr int kChannels = 2;
  using Weight = __m512bh;
  static Weight weights(const uint16_t* address) { return (__m512bh)_mm512_loadu_si512(address); }
  static Weight spread(const uint16_t* address) {
    int pair;
    std::memcpy(&pair, address, sizeof(pair));
    return (__m512bh)_mm512_set1_epi32(pair);
  }
  static Vector add(Vector sum, Weight a, Weight b) { return _mm512_dpbf16_ps(sum, a, b); }
  static uint16_t encode(float value) { return to_bf16(value); }
};
#endif

template <class Product>
struct TileJob {
  const typename Product::Element* source;  // the origin of the first target pixel
  const typename Product::Element* weights;
  const Pass* pass;
  int64_t pitch;     // elements from a source pixel to the one below
  int64_t channels;  // elements from a source pixel to the next
  int64_t steps;     // products that take all source channels
  float* sums;       // [X][V * kLanes]
};

template <class Product, int X, int V, int T>
void tile(const TileJob<Product>& job) {
  using Element = typename Product::Element;
  constexpr int kVector = kLanes * Product::kChannels;
  Vector sums[X][V];
#pragma GCC unroll 16
  for (int x = 0; x < X; ++x) {
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) sums[x][v] = splat(0.0f);
  }
  const Element* weights = job.weights;
  const int64_t next = T == 1 ? job.channels * job.pass->source_step : job.channels;
  for (const Run& run : job.pass->runs) {
    const Element* source = job.source + run.row * job.pitch + run.column * job.channels;
    for (int64_t k = 0; k < job.steps; ++k, weights += T * V * kVector, source += Product::kChannels) {
      typename Product::Weight own[T][V];
#pragma GCC unroll 3
      for (int t = 0; t < T; ++t) {
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) own[t][v] = Product::weights(weights + (t * V + v) * kVector);
      }
#pragma GCC unroll 18
      for (int x = 0; x < X + T - 1; ++x) {
        const typename Product::Weight number = Product::spread(source + x * next);
#pragma GCC unroll 3
        for (int t = 0; t < T; ++t) {
          if (x - t < 0 || x - t >= X) continue;
#pragma GCC unroll 2
          for (int v = 0; v < V; ++v) sums[x - t][v] = Product::add(sums[x - t][v], number, own[t][v]);
        }
      }
    }
  }
#pragma GCC unroll 16
  for (int x = 0; x < X; ++x) {
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) store(job.sums + (x * V + v) * kLanes, sums[x][v]);
  }
}

template <class Product, int V, int T>
void tiles(TileJob<Product> job, int64_t pixels) {
  const int64_t next = job.channels * job.pass->source_step;
  int64_t x = 0;
  const auto advance = [&](int64_t by) {
    x += by;
    job.source += by * next;
    job.sums += by * V * kLanes;
  };
  if constexpr (V == 1 && kMostPixels == 16) {
    for (; x + 16 <= pixels; advance(16)) tile<Product, 16, V, T>(job);
  }
  for (; x + 8 <= pixels; advance(8)) tile<Product, 8, V, T>(job);
  for (; x + 4 <= pixels; advance(4)) tile<Product, 4, V, T>(job);
  for (; x + 2 <= pixels; advance(2)) tile<Product, 2, V, T>(job);
  for (; x < pixels; advance(1)) tile<Product, 1, V, T>(job);
}

template <class Product, int V>
void tiles(const TileJob<Product>& job, int64_t pixels) {
  if (job.pass->taps == 3) return tiles<Product, V, 3>(job, pixels);
  if (job.pass->taps == 2) return tiles<Product, V, 2>(job, pixels);
  tiles<Product, V, 1>(job, pixels);
}

template <class Product>
struct VectorConvolver {
  using Element = typename Product::Element;
  static constexpr int kParts = 1;
  static constexpr bool kFloats = Product::kChannels == 1;

  static int64_t operand_channels(const Image& image) { return image.padded(); }

  static void put(Element* operand, int64_t, Vector value) {
    if constexpr (kFloats) {
      store(operand, value);
    } else {
#if defined(__AVX512BF16__)
      const __m256bh narrow = _mm512_cvtneps_pbh(value);
      std::memcpy(operand, &narrow, sizeof(narrow));
#endif
    }
  }

  static int64_t steps(const Convolution& convolution) {
    return (convolution.source.channels + Product::kChannels - 1) / Product::kChannels;
  }

  // Elements: every tap of every pass has the weights of all pairs of channels, target channels filled up.
  static int64_t packed_size(const Convolution& convolution) {
    int64_t taps = 0;
    for (const Pass& pass : convolution.passes) taps += int64_t(pass.runs.size()) * pass.taps;
    return taps * steps(convolution) * Product::kChannels * convolution.target.padded();
  }

  // [pass][some vectors of target channels][run][source channels of a product][tap][target channel][source channel]
  static void pack(const Convolution& convolution, Element* packed) {
    const int64_t vectors = convolution.target.padded() / kLanes;
    for (const Pass& pass : convolution.passes) {
      for (int64_t v = 0; v < vectors; v += count_at(v, vectors)) {
        for (const Run& run : pass.runs) {
          for (int64_t k = 0; k < steps(convolution); ++k) {
            for (int t = 0; t < pass.taps; ++t) {
              for (int64_t to = v * kLanes; to < (v + count_at(v, vectors)) * kLanes; ++to) {
                for (int64_t from = k * Product::kChannels; from < (k + 1) * Product::kChannels; ++from) {
                  const bool real = from < convolution.source.channels && to < convolution.target.channels;
                  *packed++ = Product::encode(real ? convolution.weight(from, to, run.kernel[t]) : 0.0f);
                }
              }
            }
          }
        }
      }
    }
  }

  // Calls then(sample, row, first column, step, count, channel, vectors, sums) for rows of target pixels: sums is
  // [count][vectors * kLanes], the convolution at `count` pixels from (row, first column) on, every step-th.
  template <class Then>
  static void run(const Convolution& convolution, const Element* packed, const Element* const* sources, int64_t samples,
                  Then& then) {
    alignas(64) float sums[kRowPixels * kMostVectors * kLanes];
    const Image& source = convolution.source;
    const int64_t channels = operand_channels(source), vectors = convolution.target.padded() / kLanes;
    for (const Pass& pass : convolution.passes) {
      TileJob<Product> job = {nullptr,  packed, &pass, source.pitch() * channels,
                              channels, steps(convolution), sums};
      for (int64_t v = 0; v < vectors;) {
        const int64_t count = count_at(v, vectors);
        for (int64_t sample = 0; sample < samples; ++sample) {
          for (int64_t i = 0; i < pass.rows; ++i) {
            for (int64_t j = 0; j < pass.columns; j += kRowPixels) {
              const int64_t pixels = std::min(kRowPixels, pass.columns - j);
              job.source = sources[sample] + source.pixel(i * pass.source_step, j * pass.source_step) * channels;
              if (count == kMostVectors) {
                tiles<Product, kMostVectors>(job, pixels);
              } else {
                tiles<Product, 1>(job, pixels);
              }
              then(sample, pass.first_row + i * pass.step, pass.first_column + j * pass.step, pass.step, pixels,
                   v * kLanes, int(count), sums);
            }
          }
        }
        v += count;
        job.weights += int64_t(pass.runs.size()) * pass.taps * job.steps * Product::kChannels * count * kLanes;
      }
      packed = job.weights;
    }
  }

 private:
  static int64_t count_at(int64_t vector, int64_t vectors) {
    return std::min<int64_t>(kMostVectors, vectors - vector);
  }
};

}  // namespace
}  // namespace PATHNET_ISA_NAMESPACE
}  // namespace pathnet
