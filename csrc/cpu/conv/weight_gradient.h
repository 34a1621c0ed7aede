// The weight gradient of a convolution, for any kernel, stride and padding, by fused multiply-add.
//
// It is written for the transposed convolution, whose source is the gradient at the convolution's output and whose
// target is the convolution's input: each tap of each pass adds, over all target pixels, the outer product of the
// activations there and of the gradient at the source pixel that the tap reads. A tile keeps F source channels times
// V vectors of target channels in registers for all pixels of a sample: V loads and F spread numbers for F * V
// multiply-adds, 10 loads for 16 of them on AVX-512, 6 for 8 with 16 registers.
#pragma once

#include <algorithm>

#include "fma.h"

namespace pathnet::cpu {
namespace PATHNET_ISA_NAMESPACE {
namespace {

struct DirectWeightGradient {
  static constexpr int kMostFrom = kWide ? 8 : 4;
  static constexpr int kMostTo = 2;

  // Floats that `add` adds to: [tap of a run of a pass][source channel][target channel].
  static int64_t size(const Convolution& convolution) {
    return taps(convolution) * convolution.source.padded() * convolution.target.padded();
  }

  // Adds samples' weight gradients. gradients: bordered, like the convolution's source; activations: dense, like its
  // target without border, channels zero-padded.
  static void add(const Convolution& convolution, const float* const* gradients, const float* const* activations,
                  int64_t samples, float* sums) {
    const Image &source = convolution.source, &target = convolution.target;
    const int64_t vectors = target.padded() / kLanes;
    for (const Pass& pass : convolution.passes) {
      for (const Run& run : pass.runs) {
        for (int t = 0; t < pass.taps; ++t, sums += source.padded() * target.padded()) {
          const int64_t first = source.pixel(run.row, run.column + t) * source.padded();
          for (int64_t s = 0; s < samples; ++s) {
            for (int64_t from = 0; from < source.padded(); from += kMostFrom) {
              for (int64_t v = 0; v < vectors; v += kMostTo) {
                const Tile tile = {source,
                                   target,
                                   pass,
                                   gradients[s] + first + from,
                                   activations[s] + v * kLanes,
                                   sums + from * target.padded() + v * kLanes};
                if (vectors - v >= kMostTo) {
                  add_tile<kMostTo>(tile);
                } else {
                  add_tile<1>(tile);
                }
              }
            }
          }
        }
      }
    }
  }

  // weights = the sums, as [out][in][kernel * kernel].
  static void finish(const Convolution& convolution, const float* sums, float* weights) {
    const int64_t from_count = convolution.source.channels, to_count = convolution.target.channels;
    const int64_t padded = convolution.target.padded(), plane = convolution.source.padded() * padded;
    std::fill_n(weights, from_count * to_count * convolution.positions, 0.0f);
    for (const Pass& pass : convolution.passes) {
      for (const Run& run : pass.runs) {
        for (int t = 0; t < pass.taps; ++t, sums += plane) {
          for (int64_t from = 0; from < from_count; ++from) {
            float* row = weights + from * to_count * convolution.positions + run.kernel[t];
            for (int64_t to = 0; to < to_count; ++to) row[to * convolution.positions] = sums[from * padded + to];
          }
        }
      }
    }
  }

 private:
  struct Tile {
    const Image &source, &target;
    const Pass& pass;
    const float *gradient, *activation;
    float* sums;
  };

  static int64_t taps(const Convolution& convolution) {
    int64_t count = 0;
    for (const Pass& pass : convolution.passes) count += int64_t(pass.runs.size()) * pass.taps;
    return count;
  }

  template <int V>
  static void add_tile(const Tile& tile) {
    constexpr int F = kMostFrom;
    const int64_t padded = tile.target.padded();
    Vector sums[F][V];
#pragma GCC unroll 8
    for (int f = 0; f < F; ++f) {
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) sums[f][v] = load(tile.sums + f * padded + v * kLanes);
    }
    const Pass& pass = tile.pass;
    const int64_t next_gradient = pass.source_step * tile.source.padded(), next_activation = pass.step * padded;
    for (int64_t i = 0; i < pass.rows; ++i) {
      const float* gradient = tile.gradient + i * pass.source_step * tile.source.pitch() * tile.source.padded();
      const float* activation =
          tile.activation + ((pass.first_row + i * pass.step) * tile.target.width + pass.first_column) * padded;
      for (int64_t j = 0; j < pass.columns; ++j, gradient += next_gradient, activation += next_activation) {
        Vector values[V];
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) values[v] = load(activation + v * kLanes);
#pragma GCC unroll 8
        for (int f = 0; f < F; ++f) {
          const Vector number = splat(gradient[f]);
#pragma GCC unroll 2
          for (int v = 0; v < V; ++v) sums[f][v] = multiply_add(number, values[v], sums[f][v]);
        }
      }
    }
#pragma GCC unroll 8
    for (int f = 0; f < F; ++f) {
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) store(tile.sums + f * padded + v * kLanes, sums[f][v]);
    }
  }
};

}  // namespace
}  // namespace PATHNET_ISA_NAMESPACE
}  // namespace pathnet::cpu
