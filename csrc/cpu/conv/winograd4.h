// 3x3 convolutions of stride 1 with 36 products for sixteen results where direct ones take 144: the minimal filtering
// F(4x4, 3x3) of Winograd (1980), as Lavin and Gray (2016) apply it to convolutions; and the weight gradient by the
// same products. For training: its error is some ten times that of a direct convolution, 1e-6 of the result, where
// F(2x2, 3x3) has half the error and nearly twice the products.
//
// A patch of 6x6 source pixels gives 4x4 target pixels. Patches go together in chunks, whose transformed images are
// [position][patch][channel]; each position is a matrix product of patches by channels with its weights. The
// convolution is bilinear, so the weight gradient of a patch is, at each position, the outer product of the
// transformed patch and of the target's 4x4 tile under the transposed inverse transform: the input gradient and the
// weight gradient share one transform of the gradient, and their sums per position are transformed to 3x3 once for
// many samples.
//
// Multiply-adds and transforms, for a patch of 16 channels in vectors of 16 (and share of the multiply-adds' time at
// two a cycle): 576 multiply-adds; 120 operations, 24 loads and 36 stores to transform the source, 100, 36 and 16
// back (60 %); with 64 channels the same transforms serve four times the products (15 %). The weight gradient takes
// 576 multiply-adds more, and 80 operations, 16 loads and 36 stores to transform the tile (23 %).
#pragma once

#include <algorithm>

#include "../large.h"
#include "weight_gradient.h"
#include "winograd.h"
#include "winograd4_transforms.h"

namespace pathnet::cpu {
namespace PATHNET_ISA_NAMESPACE {
namespace {

struct Winograd4Convolver : Winograd4Transforms {
  using Element = float;
  using Fallback = WinogradConvolver<FloatProduct>;
  static constexpr int kParts = 1;
  static constexpr bool kFloats = true;
  static constexpr int kMostPatches = 16;
  static constexpr int kVectors = 2;
  static constexpr int64_t kLine = 16;  // floats of a line of the cache

  static int64_t operand_channels(const Image& image) { return image.padded(); }
  static void put(float* operand, int64_t, Vector value) { store(operand, value); }

  static int64_t packed_size(const Convolution& convolution) {
    if (!serves(convolution)) return Fallback::packed_size(convolution);
    return kPositions * convolution.source.padded() * convolution.target.padded();
  }

  // [one or two vectors of target channels][position][source channel][target channel]
  static void pack(const Convolution& convolution, float* packed) {
    if (!serves(convolution)) return Fallback::pack(convolution, packed);
    const std::vector<Run>& runs = convolution.passes[0].runs;
    const int64_t depth = convolution.source.padded(), vectors = convolution.target.padded() / kLanes;
    for (int64_t v = 0; v < vectors; v += together(v, vectors)) {
      const int64_t width = together(v, vectors) * kLanes;
      for (int64_t from = 0; from < depth; ++from) {
        for (int64_t n = 0; n < width; n += kLanes) {
          alignas(64) float kernel[9][kLanes] = {};
          for (int64_t lane = 0; lane < kLanes && from < convolution.source.channels; ++lane) {
            const int64_t to = v * kLanes + n + lane;
            if (to >= convolution.target.channels) break;
            for (int r = 0; r < 3; ++r) {
              for (int t = 0; t < 3; ++t) kernel[r * 3 + t][lane] = convolution.weight(from, to, runs[r].kernel[t]);
            }
          }
          transform_weights(kernel[0], packed + from * width + n, depth * width);
        }
      }
      packed += kPositions * depth * width;
    }
  }

  template <class Then>
  static void run(const Convolution& convolution, const float* packed, const float* const* sources, int64_t samples,
                  Then& then) {
    if (!serves(convolution)) return Fallback::run(convolution, packed, sources, samples, then);
    run_patches<false>(convolution, packed, sources, nullptr, samples, then, nullptr);
  }

  // Floats that `run_back` adds the weight gradient to.
  static int64_t gradient_size(const Convolution& convolution) {
    if (!serves(convolution)) return DirectWeightGradient::size(convolution);
    return kPositions * convolution.source.padded() * convolution.target.padded();
  }

  // A transposed convolution of gradients, as `run`; and adds the weight gradient to `sums`, see
  // DirectWeightGradient.
  template <class Then>
  static void run_back(const Convolution& convolution, const float* packed, const float* const* gradients,
                       const float* const* activations, int64_t samples, Then& then, float* sums) {
    if (!serves(convolution)) {
      Fallback::run(convolution, packed, gradients, samples, then);
      return DirectWeightGradient::add(convolution, gradients, activations, samples, sums);
    }
    run_patches<true>(convolution, packed, gradients, activations, samples, then, sums);
  }

  // grads = the weight gradient, see DirectWeightGradient.
  static void finish_gradient(const Convolution& convolution, const float* sums, float* grads) {
    if (!serves(convolution)) return DirectWeightGradient::finish(convolution, sums, grads);
    const std::vector<Run>& runs = convolution.passes[0].runs;
    const int64_t depth = convolution.source.padded(), channels = convolution.target.padded();
    const int64_t vectors = channels / kLanes, plane = depth * channels;
    for (int64_t v = 0; v < vectors; v += together(v, vectors)) {
      const int64_t width = together(v, vectors) * kLanes;
      for (int64_t from = 0; from < depth; ++from) {
        for (int64_t n = 0; n < width; n += kLanes) {
          Vector kernel[3][3];
          gradient_of_weights(sums + from * width + n, depth * width, kernel);
          float* place = grads + from * channels + v * kLanes + n;
          for (int r = 0; r < 3; ++r) {
            for (int t = 0; t < 3; ++t) store(place + runs[r].kernel[t] * plane, kernel[r][t]);
          }
        }
      }
      sums += kPositions * depth * width;
    }
  }

 private:
  static int64_t together(int64_t vector, int64_t vectors) { return std::min<int64_t>(kVectors, vectors - vector); }

  // Whether the taps are 3x3 neighbours, and 4x4 pixels fill the target.
  static bool serves(const Convolution& convolution) {
    if (convolution.passes.size() != 1) return false;
    const Pass& pass = convolution.passes[0];
    return pass.taps == 3 && pass.runs.size() == 3 && pass.step == 1 && pass.source_step == 1 &&
           pass.rows % kTile == 0 && pass.columns % kTile == 0;
  }

  template <bool kBack, class Then>
  static void run_patches(const Convolution& convolution, const float* packed, const float* const* sources,
                          const float* const* activations, int64_t samples, Then& then, float* gradient) {
    const Image &source = convolution.source, &target = convolution.target;
    const Run& corner = convolution.passes[0].runs[0];
    const int64_t depth = source.padded(), vectors = target.padded() / kLanes, channels = target.padded();
    const PatchGrid grid = {target.height / kTile, target.width / kTile};
    const int64_t all = samples * grid.size(), most = std::min<int64_t>(kMostPatches, all);
    // From one position's images to the next: a line more than those, as powers of two apart they would share a few
    // sets of the cache.
    const int64_t plane = most * depth + kLine, tile_plane = most * channels + kLine;
    const Large memory = make_large(kPositions * (plane + (kBack ? tile_plane : 0)));
    float* const transformed = memory.get();
    float* const tiles = transformed + kPositions * plane;
    alignas(64) float products[kPositions * (kMostPatches * kVectors * kLanes + kLine)];
    alignas(64) float sums[kTile][kTile * kMostPatches * kVectors * kLanes];
    for (int64_t first = 0; first < all; first += most) {
      const int64_t last = std::min(all, first + most), patches = last - first;
      for (int64_t p = first, end; p < last; p = end) {
        end = grid.end(p, last);
        const int64_t row = kTile * grid.row(p), column = kTile * grid.column(p), sample = p / grid.size();
        transform_source(sources[sample] + source.pixel(row + corner.row, column + corner.column) * depth,
                         source.pitch() * depth, depth, end - p, plane, transformed + (p - first) * depth);
        if constexpr (kBack) {
          transform_tiles(activations[sample] + (row * target.width + column) * channels, target.width * channels,
                          channels, end - p, tile_plane, tiles + (p - first) * channels);
        }
      }
      const float* weights = packed;
      float* totals = gradient;
      for (int64_t v = 0; v < vectors;) {
        const int64_t count = together(v, vectors), width = count * kLanes;
        for (int position = 0; position < kPositions; ++position, weights += depth * width) {
          const float* images = transformed + position * plane;
          multiply(images, weights, patches, depth, count, products + position * (most * width + kLine));
          if constexpr (kBack) {
            add_outer(images, tiles + position * tile_plane + v * kLanes, patches, depth, channels, count, totals);
            totals += depth * width;
          }
        }
        for (int64_t p = 0; p < patches * count; ++p) {
          transform_back(products + p * kLanes, most * width + kLine,
                         sums[0] + p / count * kTile * width + p % count * kLanes, sizeof(sums[0]) / sizeof(float),
                         width);
        }
        for (int64_t p = first, end; p < last; p = end) {
          end = grid.end(p, last);
          for (int r = 0; r < kTile; ++r) {
            then(p / grid.size(), kTile * grid.row(p) + r, kTile * grid.column(p), 1, kTile * (end - p), v * kLanes,
                 int(count), sums[r] + (p - first) * kTile * width);
          }
        }
        v += count;
      }
    }
  }

  // products [patches][count * kLanes] = images [patches][depth] times weights [depth][count * kLanes]
  static void multiply(const float* images, const float* weights, int64_t patches, int64_t depth, int64_t count,
                       float* products) {
    int64_t p = 0;
    const auto multiply_all = [&](auto vectors) {
      constexpr int V = decltype(vectors)::value;
      const auto take = [&](auto pixels) {
        constexpr int X = decltype(pixels)::value;
        for (; p + X <= patches; p += X) {
          multiply_tile<X, V>(images + p * depth, weights, depth, products + p * V * kLanes);
        }
      };
      if constexpr (kWide) {
        if constexpr (V == 1) take(std::integral_constant<int, 16>());
        take(std::integral_constant<int, 8>());
      } else {
        take(std::integral_constant<int, V == 1 ? 8 : 6>());
      }
      take(std::integral_constant<int, 4>());
      take(std::integral_constant<int, 2>());
      take(std::integral_constant<int, 1>());
    };
    if (count == kVectors) return multiply_all(std::integral_constant<int, kVectors>());
    multiply_all(std::integral_constant<int, 1>());
  }

  template <int X, int V>
  static void multiply_tile(const float* images, const float* weights, int64_t depth, float* products) {
    Vector sums[X][V];
#pragma GCC unroll 16
    for (int x = 0; x < X; ++x) {
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) sums[x][v] = splat(0.0f);
    }
    for (int64_t k = 0; k < depth; ++k, weights += V * kLanes) {
      Vector step_weights[V];
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) step_weights[v] = load(weights + v * kLanes);
#pragma GCC unroll 16
      for (int x = 0; x < X; ++x) {
        const Vector number = splat(images[x * depth + k]);
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) sums[x][v] = multiply_add(number, step_weights[v], sums[x][v]);
      }
    }
#pragma GCC unroll 16
    for (int x = 0; x < X; ++x) {
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) store(products + (x * V + v) * kLanes, sums[x][v]);
    }
  }

  // sums [depth][count * kLanes] += images^T times tiles, which are [patches][depth] and [patches][channels]
  static void add_outer(const float* images, const float* tiles, int64_t patches, int64_t depth, int64_t channels,
                        int64_t count, float* sums) {
    if (count == kVectors) {
      constexpr int F = kWide ? 8 : 4;
      for (int64_t from = 0; from < depth; from += F) {
        add_outer_tile<F, kVectors>(images + from, tiles, patches, depth, channels, sums + from * kVectors * kLanes);
      }
    } else {
      constexpr int F = kWide ? 16 : 8;
      for (int64_t from = 0; from < depth; from += F) {
        add_outer_tile<F, 1>(images + from, tiles, patches, depth, channels, sums + from * kLanes);
      }
    }
  }

  template <int F, int V>
  static void add_outer_tile(const float* images, const float* tiles, int64_t patches, int64_t depth,
                             int64_t channels, float* sums) {
    Vector totals[F][V];
#pragma GCC unroll 16
    for (int f = 0; f < F; ++f) {
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) totals[f][v] = load(sums + (f * V + v) * kLanes);
    }
    for (int64_t p = 0; p < patches; ++p, images += depth, tiles += channels) {
      Vector values[V];
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) values[v] = load(tiles + v * kLanes);
#pragma GCC unroll 16
      for (int f = 0; f < F; ++f) {
        const Vector number = splat(images[f]);
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) totals[f][v] = multiply_add(number, values[v], totals[f][v]);
      }
    }
#pragma GCC unroll 16
    for (int f = 0; f < F; ++f) {
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) store(sums + (f * V + v) * kLanes, totals[f][v]);
    }
  }
};

}  // namespace
}  // namespace PATHNET_ISA_NAMESPACE
}  // namespace pathnet::cpu
