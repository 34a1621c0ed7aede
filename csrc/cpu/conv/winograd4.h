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
// back (60 %); with 64 channels the same transforms serve four times the products (15 %).
#pragma once

#include <algorithm>
#include <memory>

#include "weight_gradient.h"
#include "winograd.h"

namespace pathnet::cpu {
namespace PATHNET_ISA_NAMESPACE {
namespace {

struct Winograd4Convolver {
  using Element = float;
  using Fallback = WinogradConvolver<FloatProduct>;
  static constexpr int kParts = 1;
  static constexpr bool kFloats = true;
  static constexpr int kSide = 6;
  static constexpr int kPositions = kSide * kSide;
  static constexpr int kTile = 4;
  static constexpr int kMostPatches = 16;
  static constexpr int kVectors = 2;

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

  // weights = the weight gradient, as [out][in][kernel * kernel].
  static void finish_gradient(const Convolution& convolution, const float* sums, float* weights) {
    if (!serves(convolution)) return DirectWeightGradient::finish(convolution, sums, weights);
    const std::vector<Run>& runs = convolution.passes[0].runs;
    const int64_t depth = convolution.source.padded(), vectors = convolution.target.padded() / kLanes;
    const int64_t to_count = convolution.target.channels;
    for (int64_t v = 0; v < vectors; v += together(v, vectors)) {
      const int64_t width = together(v, vectors) * kLanes;
      for (int64_t from = 0; from < convolution.source.channels; ++from) {
        for (int64_t n = 0; n < width; n += kLanes) {
          alignas(64) float kernel[9][kLanes];
          gradient_of_weights(sums + from * width + n, depth * width, kernel[0]);
          for (int64_t lane = 0; lane < kLanes; ++lane) {
            const int64_t to = v * kLanes + n + lane;
            if (to >= to_count) break;
            for (int r = 0; r < 3; ++r) {
              for (int t = 0; t < 3; ++t) {
                weights[(from * to_count + to) * 9 + runs[r].kernel[t]] = kernel[r * 3 + t][lane];
              }
            }
          }
        }
      }
      sums += kPositions * depth * width;
    }
  }

 private:
  // The patches, counted sample after sample and row after row.
  struct Grid {
    int64_t rows, columns;
    int64_t size() const { return rows * columns; }
    int64_t row(int64_t patch) const { return patch % size() / columns; }
    int64_t column(int64_t patch) const { return patch % columns; }
    // The end of a patch's row, or of the chunk.
    int64_t end(int64_t patch, int64_t last) const { return std::min(last, patch + columns - column(patch)); }
  };

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
    const Grid grid = {target.height / kTile, target.width / kTile};
    const int64_t all = samples * grid.size(), most = std::min<int64_t>(kMostPatches, all);
    const std::unique_ptr<float[]> memory(new float[kPositions * most * (depth + (kBack ? channels : 0)) + 16]);
    float* const transformed = aligned(memory.get());
    float* const tiles = transformed + kPositions * most * depth;
    alignas(64) float products[kPositions * kMostPatches * kVectors * kLanes];
    alignas(64) float sums[kTile][kTile * kMostPatches * kVectors * kLanes];
    for (int64_t first = 0; first < all; first += most) {
      const int64_t last = std::min(all, first + most), patches = last - first;
      for (int64_t p = first, end; p < last; p = end) {
        end = grid.end(p, last);
        const int64_t row = kTile * grid.row(p), column = kTile * grid.column(p), sample = p / grid.size();
        transform_source(sources[sample] + source.pixel(row + corner.row, column + corner.column) * depth,
                         source.pitch() * depth, depth, end - p, patches * depth, transformed + (p - first) * depth);
        if constexpr (kBack) {
          transform_tiles(activations[sample] + (row * target.width + column) * channels, target.width * channels,
                          channels, end - p, patches * channels, tiles + (p - first) * channels);
        }
      }
      const float* weights = packed;
      float* totals = gradient;
      for (int64_t v = 0; v < vectors;) {
        const int64_t count = together(v, vectors), width = count * kLanes;
        for (int position = 0; position < kPositions; ++position, weights += depth * width) {
          const float* images = transformed + position * patches * depth;
          multiply(images, weights, patches, depth, count, products + position * patches * width);
          if constexpr (kBack) {
            add_outer(images, tiles + position * patches * channels + v * kLanes, patches, depth, channels, count,
                      totals);
            totals += depth * width;
          }
        }
        for (int64_t p = 0; p < patches * count; ++p) {
          transform_back(products + p * kLanes, patches * width,
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

  static float* aligned(float* memory) {
    return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(memory) + 63) / 64 * 64);
  }

  static Vector times(float factor, Vector value) { return splat(factor) * value; }

  static void transform_column(const Vector* d, Vector* out) {
    const Vector near = d[4] - d[2], odd = d[3] - d[1];
    const Vector even4 = multiply_add(splat(-4.0f), d[2], d[4]), odd4 = multiply_add(splat(-4.0f), d[1], d[3]);
    out[0] = multiply_add(splat(4.0f), d[0] - d[2], near);
    out[1] = even4 + odd4;
    out[2] = even4 - odd4;
    out[3] = multiply_add(splat(2.0f), odd, near);
    out[4] = multiply_add(splat(-2.0f), odd, near);
    out[5] = multiply_add(splat(-4.0f), odd, d[5] - d[3]);
  }

  // The transposed inverse transform, of four numbers to six.
  static void spread_column(const Vector* a, Vector* out) {
    const Vector even = a[0] + a[2], odd = a[1] + a[3];
    const Vector even4 = multiply_add(splat(4.0f), a[2], a[0]), odd4 = multiply_add(splat(4.0f), a[3], a[1]);
    out[0] = a[0];
    out[1] = even + odd;
    out[2] = even - odd;
    out[3] = multiply_add(splat(2.0f), odd4, even4);
    out[4] = multiply_add(splat(-2.0f), odd4, even4);
    out[5] = a[3];
  }

  static void inverse_column(const Vector* m, Vector* out) {
    const Vector even = m[1] + m[2], odd = m[1] - m[2], even2 = m[3] + m[4], odd2 = m[3] - m[4];
    out[0] = m[0] + even + even2;
    out[1] = multiply_add(splat(2.0f), odd2, odd);
    out[2] = multiply_add(splat(4.0f), even2, even);
    out[3] = multiply_add(splat(8.0f), odd2, odd + m[5]);
  }

  static void weights_column(const Vector* w, Vector* out) {
    const Vector even = w[0] + w[2], far = multiply_add(splat(1.0f / 6), w[2], times(1.0f / 24, w[0]));
    out[0] = times(0.25f, w[0]);
    out[1] = times(-1.0f / 6, even + w[1]);
    out[2] = times(-1.0f / 6, even - w[1]);
    out[3] = multiply_add(splat(1.0f / 12), w[1], far);
    out[4] = multiply_add(splat(-1.0f / 12), w[1], far);
    out[5] = w[2];
  }

  static void gradient_column(const Vector* u, Vector* out) {
    const Vector even = u[1] + u[2], odd = u[2] - u[1], even2 = u[3] + u[4], odd2 = u[3] - u[4];
    const Vector sixth = times(-1.0f / 6, even);
    out[0] = multiply_add(splat(1.0f / 24), even2, multiply_add(splat(0.25f), u[0], sixth));
    out[1] = multiply_add(splat(1.0f / 12), odd2, times(1.0f / 6, odd));
    out[2] = multiply_add(splat(1.0f / 6), even2, sixth + u[5]);
  }

  // kernel [9][kLanes], to positions `plane` apart.
  static void transform_weights(const float* kernel, float* out, int64_t plane) {
    Vector half[3][kSide];  // [column][row]
    for (int t = 0; t < 3; ++t) {
      const Vector column[3] = {load(kernel + t * kLanes), load(kernel + (3 + t) * kLanes),
                                load(kernel + (6 + t) * kLanes)};
      weights_column(column, half[t]);
    }
    for (int r = 0; r < kSide; ++r) {
      const Vector row[3] = {half[0][r], half[1][r], half[2][r]};
      Vector full[kSide];
      weights_column(row, full);
      for (int t = 0; t < kSide; ++t) store(out + (r * kSide + t) * plane, full[t]);
    }
  }

  static void gradient_of_weights(const float* sums, int64_t plane, float* kernel) {
    Vector half[kSide][3];  // [column][row]
    for (int t = 0; t < kSide; ++t) {
      Vector column[kSide];
      for (int r = 0; r < kSide; ++r) column[r] = load(sums + (r * kSide + t) * plane);
      gradient_column(column, half[t]);
    }
    for (int r = 0; r < 3; ++r) {
      Vector row[kSide], full[3];
      for (int t = 0; t < kSide; ++t) row[t] = half[t][r];
      gradient_column(row, full);
      for (int t = 0; t < 3; ++t) store(kernel + (r * 3 + t) * kLanes, full[t]);
    }
  }

  // Transforms all channels of neighbouring patches of a row, each of which shares two columns with the next.
  // `plane`: elements from one position's images to the next position's.
  static void transform_source(const float* corner, int64_t pitch, int64_t channels, int64_t patches, int64_t plane,
                               float* out) {
    const auto transform_half = [&](const float* column, Vector* half) {
      Vector rows[kSide];
#pragma GCC unroll 6
      for (int r = 0; r < kSide; ++r) rows[r] = load(column + r * pitch);
      transform_column(rows, half);
    };
    for (int64_t c = 0; c < channels; c += kLanes) {
      const float* column = corner + c;
      Vector half[kSide][kSide];  // [column][row]
      transform_half(column, half[4]);
      transform_half(column + channels, half[5]);
      for (int64_t p = 0; p < patches; ++p, column += kTile * channels) {
#pragma GCC unroll 6
        for (int r = 0; r < kSide; ++r) {
          half[0][r] = half[4][r];
          half[1][r] = half[5][r];
        }
#pragma GCC unroll 4
        for (int t = 2; t < kSide; ++t) transform_half(column + t * channels, half[t]);
        float* image = out + p * channels + c;
#pragma GCC unroll 6
        for (int r = 0; r < kSide; ++r) {
          const Vector row[kSide] = {half[0][r], half[1][r], half[2][r], half[3][r], half[4][r], half[5][r]};
          Vector full[kSide];
          transform_column(row, full);
#pragma GCC unroll 6
          for (int t = 0; t < kSide; ++t) store(image + (r * kSide + t) * plane, full[t]);
        }
      }
    }
  }

  // The same of the 4x4 tiles of a dense image.
  static void transform_tiles(const float* corner, int64_t pitch, int64_t channels, int64_t patches, int64_t plane,
                              float* out) {
    for (int64_t c = 0; c < channels; c += kLanes) {
      for (int64_t p = 0; p < patches; ++p) {
        const float* pixel = corner + p * kTile * channels + c;
        Vector half[kTile][kSide];  // [column][row]
#pragma GCC unroll 4
        for (int t = 0; t < kTile; ++t) {
          const float* column = pixel + t * channels;
          const Vector rows[kTile] = {load(column), load(column + pitch), load(column + 2 * pitch),
                                      load(column + 3 * pitch)};
          spread_column(rows, half[t]);
        }
        float* image = out + p * channels + c;
#pragma GCC unroll 6
        for (int r = 0; r < kSide; ++r) {
          const Vector row[kTile] = {half[0][r], half[1][r], half[2][r], half[3][r]};
          Vector full[kSide];
          spread_column(row, full);
#pragma GCC unroll 6
          for (int t = 0; t < kSide; ++t) store(image + (r * kSide + t) * plane, full[t]);
        }
      }
    }
  }

  // Transforms one vector of a patch's 36 products back to 4x4 sums, whose rows are `rows` apart.
  static void transform_back(const float* products, int64_t plane, float* sums, int64_t rows, int64_t next) {
    Vector half[kSide][kTile];  // [column][row]
#pragma GCC unroll 6
    for (int t = 0; t < kSide; ++t) {
      Vector column[kSide];
#pragma GCC unroll 6
      for (int r = 0; r < kSide; ++r) column[r] = load(products + (r * kSide + t) * plane);
      inverse_column(column, half[t]);
    }
#pragma GCC unroll 4
    for (int r = 0; r < kTile; ++r) {
      const Vector row[kSide] = {half[0][r], half[1][r], half[2][r], half[3][r], half[4][r], half[5][r]};
      Vector full[kTile];
      inverse_column(row, full);
#pragma GCC unroll 4
      for (int t = 0; t < kTile; ++t) store(sums + r * rows + t * next, full[t]);
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
