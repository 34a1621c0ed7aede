// Direct convolutions, by fused multiply-add.
//
// A tile keeps X pixels times V vectors of target channels in registers. For every source channel it takes T vectors
// of weights (V of each) for T neighbouring taps, and X + T - 1 source numbers, each spread over a vector once and
// used by all its taps: with X = 8, V = 2, T = 3 that is 16 loads for 48 multiply-adds, so the multiply-adds are
// the limit also where a processor loads only one whole vector a cycle. 16 accumulators, 6 weights and one number
// make 23 of the 32 registers of AVX-512; with 16 registers X = 8, V = 1, T = 3 takes 12.
#pragma once

#include <algorithm>

#include "../isa/vector.h"

namespace pathnet::cpu {
namespace PATHNET_ISA_NAMESPACE {
namespace {

constexpr bool kWide = kLanes == 16;
constexpr int kMostVectors = kWide ? 2 : 1;
constexpr int kMostPixels = kWide ? 16 : 8;
// Sums go through a buffer of this many pixels of a row before the epilogue takes them.
constexpr int64_t kRowPixels = 64;

struct TileJob {
  const float* source;  // the origin of the first target pixel
  const float* weights;
  const Pass* pass;
  int64_t pitch;  // elements from a source pixel to the one below
  int64_t next;   // elements from a source pixel to the next one
  int64_t channels;
  float* sums;  // [X][V * kLanes]
};

template <int X, int V, int T>
void tile(const TileJob& job) {
  Vector sums[X][V];
#pragma GCC unroll 16
  for (int x = 0; x < X; ++x) {
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) sums[x][v] = splat(0.0f);
  }
  const float* weights = job.weights;
  const int64_t next = T == 1 ? job.next * job.pass->source_step : job.next;
  for (const Run& run : job.pass->runs) {
    const float* source = job.source + run.row * job.pitch + run.column * job.next;
    for (int64_t k = 0; k < job.channels; ++k, weights += T * V * kLanes, ++source) {
      Vector tap_weights[T][V];
#pragma GCC unroll 3
      for (int t = 0; t < T; ++t) {
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) tap_weights[t][v] = load(weights + (t * V + v) * kLanes);
      }
#pragma GCC unroll 18
      for (int x = 0; x < X + T - 1; ++x) {
        const Vector number = splat(source[x * next]);
#pragma GCC unroll 3
        for (int t = 0; t < T; ++t) {
          if (x - t < 0 || x - t >= X) continue;
#pragma GCC unroll 2
          for (int v = 0; v < V; ++v) sums[x - t][v] = multiply_add(number, tap_weights[t][v], sums[x - t][v]);
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

template <int V, int T>
void tiles(TileJob job, int64_t pixels) {
  const int64_t next = job.next * job.pass->source_step;
  int64_t x = 0;
  const auto advance = [&](int64_t by) {
    x += by;
    job.source += by * next;
    job.sums += by * V * kLanes;
  };
  if constexpr (V == 1 && kMostPixels == 16) {
    for (; x + 16 <= pixels; advance(16)) tile<16, V, T>(job);
  }
  for (; x + 8 <= pixels; advance(8)) tile<8, V, T>(job);
  for (; x + 4 <= pixels; advance(4)) tile<4, V, T>(job);
  for (; x + 2 <= pixels; advance(2)) tile<2, V, T>(job);
  for (; x < pixels; advance(1)) tile<1, V, T>(job);
}

template <int V>
void tiles(const TileJob& job, int64_t pixels) {
  if (job.pass->taps == 3) return tiles<V, 3>(job, pixels);
  if (job.pass->taps == 2) return tiles<V, 2>(job, pixels);
  tiles<V, 1>(job, pixels);
}

// The number of vectors of target channels that go together from `vector` on.
inline int64_t count_at(int64_t vector, int64_t vectors) { return std::min<int64_t>(kMostVectors, vectors - vector); }

struct DirectConvolver {
  using Element = float;
  static constexpr int kParts = 1;
  static constexpr bool kFloats = true;

  static int64_t operand_channels(const Image& image) { return image.padded(); }
  static void put(float* operand, int64_t, Vector value) { store(operand, value); }

  // In elements: every tap of every pass has the weights of all pairs of channels, target channels padded.
  static int64_t packed_size(const Convolution& convolution) {
    int64_t taps = 0;
    for (const Pass& pass : convolution.passes) taps += int64_t(pass.runs.size()) * pass.taps;
    return taps * convolution.source.channels * convolution.target.padded();
  }

  // [pass][one or two vectors of target channels][run][source channel][tap][target channel]
  static void pack(const Convolution& convolution, float* packed) {
    const int64_t vectors = convolution.target.padded() / kLanes;
    for (const Pass& pass : convolution.passes) {
      for (int64_t v = 0; v < vectors; v += count_at(v, vectors)) {
        for (const Run& run : pass.runs) {
          for (int64_t from = 0; from < convolution.source.channels; ++from) {
            for (int t = 0; t < pass.taps; ++t) {
              for (int64_t to = v * kLanes; to < (v + count_at(v, vectors)) * kLanes; ++to) {
                *packed++ = to < convolution.target.channels ? convolution.weight(from, to, run.kernel[t]) : 0.0f;
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
  static void run(const Convolution& convolution, const float* packed, const float* const* sources, int64_t samples,
                  Then& then) {
    alignas(64) float sums[kRowPixels * kMostVectors * kLanes];
    const Image& source = convolution.source;
    const int64_t next = source.padded(), vectors = convolution.target.padded() / kLanes;
    for (const Pass& pass : convolution.passes) {
      TileJob job = {nullptr, packed, &pass, source.pitch() * next, next, source.channels, sums};
      for (int64_t v = 0; v < vectors;) {
        const int64_t count = count_at(v, vectors);
        for (int64_t sample = 0; sample < samples; ++sample) {
          for (int64_t i = 0; i < pass.rows; ++i) {
            for (int64_t j = 0; j < pass.columns; j += kRowPixels) {
              const int64_t pixels = std::min(kRowPixels, pass.columns - j);
              job.source = sources[sample] + source.pixel(i * pass.source_step, j * pass.source_step) * next;
              if (count == kMostVectors) {
                tiles<kMostVectors>(job, pixels);
              } else {
                tiles<1>(job, pixels);
              }
              then(sample, pass.first_row + i * pass.step, pass.first_column + j * pass.step, pass.step, pixels,
                   v * kLanes, int(count), sums);
            }
          }
        }
        v += count;
        job.weights += int64_t(pass.runs.size()) * pass.taps * source.channels * count * kLanes;
      }
      packed = job.weights;
    }
  }
};

}  // namespace
}  // namespace PATHNET_ISA_NAMESPACE
}  // namespace pathnet::cpu
