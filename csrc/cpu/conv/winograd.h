// 3x3 convolutions of stride 1 with 16 products for four results where direct ones take 36: the minimal filtering
// F(2x2, 3x3) of Winograd (1980), as Lavin and Gray (2016) apply it to convolutions. Its factors are 1 and 1/2, so
// that float32 stays as accurate as in a direct convolution, to a small factor.
//
// A patch of 4x4 source pixels gives 2x2 target pixels. Up to 16 patches go together: their 16
// transformed images are [position][patch][channel], each position is a matrix product of patches by channels with
// its weights, and the inverse transform gives rows of sums as in other convolvers. With 16 channels
// and 16 patches the transformed images and the products are 16 KB each, in the first level of cache; the weights of
// 64 channels (256 KB) come from the second, 8 bytes per cycle.
#pragma once

#include <algorithm>
#include <memory>

#include "fma.h"

namespace pathnet::cpu {
namespace PATHNET_ISA_NAMESPACE {
namespace {

// The product of transformed numbers: of floats, or of pairs of bf16 numbers at twice the rate where the processor
// has that product. Rounding to bf16 after the transform has 1.6 times the error of rounding before it.
struct FloatProduct {
  using Number = float;
  using Weight = Vector;
  static constexpr int kNumbers = 1;  // source channels in one product
  static void put(float* image, Vector value) { store(image, value); }
  static float encode(float weight) { return weight; }
  static Weight weights(const float* address) { return load(address); }
  static Weight spread(const float* number) { return splat(*number); }
  static Vector add(Vector sum, Weight number, Weight weights) { return multiply_add(number, weights, sum); }
};

#if defined(__AVX512BF16__)
struct Bf16Product {
  using Number = uint16_t;
  using Weight = __m512bh;
  static constexpr int kNumbers = 2;
  static void put(uint16_t* image, Vector value) {
    const __m256bh narrow = _mm512_cvtneps_pbh(value);
    std::memcpy(image, &narrow, sizeof(narrow));
  }
  static uint16_t encode(float weight) { return to_bf16(weight); }
  static Weight weights(const uint16_t* address) { return (__m512bh)_mm512_loadu_si512(address); }
  static Weight spread(const uint16_t* number) {
    int pair;
    std::memcpy(&pair, number, sizeof(pair));
    return (__m512bh)_mm512_set1_epi32(pair);
  }
  static Vector add(Vector sum, Weight number, Weight weights) { return _mm512_dpbf16_ps(sum, number, weights); }
};
#endif

// The patches of some samples, counted sample after sample and row after row.
struct PatchGrid {
  int64_t rows, columns;
  int64_t size() const { return rows * columns; }
  int64_t row(int64_t patch) const { return patch % size() / columns; }
  int64_t column(int64_t patch) const { return patch % columns; }
  // The end of a patch's row, or of the patches.
  int64_t end(int64_t patch, int64_t last) const { return std::min(last, patch + columns - column(patch)); }
};

template <class Product>
struct WinogradConvolver {
  using Element = float;
  using Number = typename Product::Number;
  using Direct = DirectConvolver;
  static constexpr int kParts = 1;
  static constexpr bool kFloats = true;
  static constexpr int kPositions = 16;
  static constexpr int kMostPatches = 16;

  static int64_t operand_channels(const Image& image) { return image.padded(); }
  static void put(float* operand, int64_t, Vector value) { store(operand, value); }

  static int64_t packed_size(const Convolution& convolution) {
    if (!serves(convolution)) return Direct::packed_size(convolution);
    return kPositions * steps(convolution) * Product::kNumbers * convolution.target.padded() *
           int64_t(sizeof(Number)) / int64_t(sizeof(float));
  }

  // [one or two vectors of target channels][position][product][target channel][source channel of the product]
  static void pack(const Convolution& convolution, float* packed) {
    if (!serves(convolution)) return Direct::pack(convolution, packed);
    const std::vector<Run>& runs = convolution.passes[0].runs;
    const int64_t depth = steps(convolution) * Product::kNumbers, vectors = convolution.target.padded() / kLanes;
    Number* numbers = reinterpret_cast<Number*>(packed);
    for (int64_t v = 0; v < vectors; v += count_at(v, vectors)) {
      const int64_t width = count_at(v, vectors) * kLanes;
      for (int64_t from = 0; from < depth; ++from) {
        for (int64_t n = 0; n < width; ++n) {
          const int64_t to = v * kLanes + n;
          const bool real = from < convolution.source.channels && to < convolution.target.channels;
          double kernel[3][3] = {}, half[4][3], column[4];
          for (int r = 0; r < 3 && real; ++r) {
            for (int t = 0; t < 3; ++t) kernel[r][t] = convolution.weight(from, to, runs[r].kernel[t]);
          }
          for (int t = 0; t < 3; ++t) {
            transform_weights(kernel[0][t], kernel[1][t], kernel[2][t], column);
            for (int r = 0; r < 4; ++r) half[r][t] = column[r];
          }
          for (int r = 0; r < 4; ++r) {
            transform_weights(half[r][0], half[r][1], half[r][2], column);
            for (int t = 0; t < 4; ++t) {
              const int64_t step = (r * 4 + t) * depth / Product::kNumbers + from / Product::kNumbers;
              numbers[(step * width + n) * Product::kNumbers + from % Product::kNumbers] =
                  Product::encode(float(column[t]));
            }
          }
        }
      }
      numbers += kPositions * depth * width;
    }
  }

  template <class Then>
  static void run(const Convolution& convolution, const float* packed, const float* const* sources, int64_t samples,
                  Then& then) {
    if (!serves(convolution)) return Direct::run(convolution, packed, sources, samples, then);
    const Image &source = convolution.source, &target = convolution.target;
    const Pass& pass = convolution.passes[0];
    const int64_t channels = source.padded(), vectors = target.padded() / kLanes;
    const int64_t depth = steps(convolution) * Product::kNumbers;
    const PatchGrid grid = {target.height / 2, target.width / 2};
    // Transformed images of 16 KB up to 32 channels, and as many bytes of products.
    const int64_t most = std::clamp<int64_t>(256 / channels, 8, kMostPatches);
    const std::unique_ptr<Number[]> transformed(new Number[kPositions * most * channels]);
    alignas(64) float products[kPositions * kMostPatches * kMostVectors * kLanes];
    alignas(64) float sums[2][2 * kMostPatches * kMostVectors * kLanes];
    const int64_t all = samples * grid.size();
    for (int64_t first = 0; first < all; first += most) {
      const int64_t patches = std::min(most, all - first);
      for (int64_t p = 0, end; p < patches; p = end) {
        const int64_t patch = first + p;
        end = grid.end(patch, first + patches) - first;
        const int64_t row = 2 * grid.row(patch) + pass.runs[0].row,
                      column = 2 * grid.column(patch) + pass.runs[0].column;
        transform_source(sources[patch / grid.size()] + source.pixel(row, column) * channels,
                         source.pitch() * channels, channels, end - p, patches * channels,
                         transformed.get() + p * channels);
      }
      const Number* weights = reinterpret_cast<const Number*>(packed);
      for (int64_t v = 0; v < vectors;) {
        const int64_t count = count_at(v, vectors), width = count * kLanes;
        for (int position = 0; position < kPositions; ++position, weights += depth * width) {
          multiply(transformed.get() + position * patches * channels, weights, patches, channels, steps(convolution),
                   count, products + position * patches * width);
        }
        for (int64_t p = 0; p < patches * count; ++p) {
          const int64_t place = (p / count * 2) * width + p % count * kLanes;
          transform_back(products + p * kLanes, patches * width, sums[0] + place, sums[1] + place, width);
        }
        for (int64_t p = 0, end; p < patches; p = end) {
          const int64_t patch = first + p;
          end = grid.end(patch, first + patches) - first;
          for (int r = 0; r < 2; ++r) {
            then(patch / grid.size(), 2 * grid.row(patch) + r, 2 * grid.column(patch), 1, 2 * (end - p), v * kLanes,
                 int(count), sums[r] + p * 2 * width);
          }
        }
        v += count;
      }
    }
  }

 private:
  static int64_t steps(const Convolution& convolution) {
    return (convolution.source.channels + Product::kNumbers - 1) / Product::kNumbers;
  }

  // Whether the taps are 3x3 neighbours, and 2x2 pixels fill the target.
  static bool serves(const Convolution& convolution) {
    if (convolution.passes.size() != 1) return false;
    const Pass& pass = convolution.passes[0];
    return pass.taps == 3 && pass.runs.size() == 3 && pass.step == 1 && pass.source_step == 1 && pass.rows % 2 == 0 &&
           pass.columns % 2 == 0;
  }

  static void transform_weights(double a, double b, double c, double* out) {
    out[0] = a;
    out[1] = (a + b + c) / 2;
    out[2] = (a - b + c) / 2;
    out[3] = c;
  }

  static void transform_column(const Vector* d, Vector* out) {
    out[0] = d[0] - d[2];
    out[1] = d[1] + d[2];
    out[2] = d[2] - d[1];
    out[3] = d[1] - d[3];
  }

  // Transforms all channels of neighbouring patches of a row, each of which shares two columns with the next.
  // `plane`: elements from one position's images to the next position's.
  static void transform_source(const float* corner, int64_t pitch, int64_t channels, int64_t patches, int64_t plane,
                               Number* out) {
    const auto transform_half = [&](const float* column, Vector* half) {
      const Vector rows[4] = {load(column), load(column + pitch), load(column + 2 * pitch), load(column + 3 * pitch)};
      transform_column(rows, half);
    };
    for (int64_t c = 0; c < channels; c += kLanes) {
      const float* column = corner + c;
      Vector half[4][4];  // [column][row]
      transform_half(column, half[2]);
      transform_half(column + channels, half[3]);
      for (int64_t p = 0; p < patches; ++p, column += 2 * channels) {
#pragma GCC unroll 4
        for (int y = 0; y < 4; ++y) {
          half[0][y] = half[2][y];
          half[1][y] = half[3][y];
        }
        transform_half(column + 2 * channels, half[2]);
        transform_half(column + 3 * channels, half[3]);
        Number* image = out + p * channels + c;
#pragma GCC unroll 4
        for (int y = 0; y < 4; ++y) {
          const Vector row[4] = {half[0][y], half[1][y], half[2][y], half[3][y]};
          Vector full[4];
          transform_column(row, full);
#pragma GCC unroll 4
          for (int x = 0; x < 4; ++x) Product::put(image + (y * 4 + x) * plane, full[x]);
        }
      }
    }
  }

  // Transforms one vector of a patch's 16 products back to 2x2 sums, two of each row.
  static void transform_back(const float* products, int64_t plane, float* upper, float* lower, int64_t next) {
    Vector top[4], bottom[4];
#pragma GCC unroll 4
    for (int x = 0; x < 4; ++x) {
      const float* column = products + x * plane;
      const Vector a = load(column), b = load(column + 4 * plane);
      const Vector c = load(column + 8 * plane), d = load(column + 12 * plane);
      top[x] = a + b + c;
      bottom[x] = b - c - d;
    }
    store(upper, top[0] + top[1] + top[2]);
    store(upper + next, top[1] - top[2] - top[3]);
    store(lower, bottom[0] + bottom[1] + bottom[2]);
    store(lower + next, bottom[1] - bottom[2] - bottom[3]);
  }

  // products [patches][count * kLanes] = images [patches][channels] times weights [steps][count * kLanes]
  static void multiply(const Number* images, const Number* weights, int64_t patches, int64_t channels, int64_t steps,
                       int64_t count, float* products) {
    int64_t p = 0;
    const auto multiply_all = [&](auto vectors) {
      constexpr int V = decltype(vectors)::value;
      const auto take = [&](auto pixels) {
        constexpr int X = decltype(pixels)::value;
        for (; p + X <= patches; p += X) {
          multiply_tile<X, V>(images + p * channels, weights, channels, steps, products + p * V * kLanes);
        }
      };
      if constexpr (V == 1 && kMostPixels == 16) take(std::integral_constant<int, 16>());
      take(std::integral_constant<int, 8>());
      take(std::integral_constant<int, 4>());
      take(std::integral_constant<int, 1>());
    };
    if (count == kMostVectors) return multiply_all(std::integral_constant<int, kMostVectors>());
    multiply_all(std::integral_constant<int, 1>());
  }

  template <int X, int V>
  static void multiply_tile(const Number* images, const Number* weights, int64_t channels, int64_t steps,
                            float* products) {
    Vector sums[X][V];
#pragma GCC unroll 16
    for (int x = 0; x < X; ++x) {
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) sums[x][v] = splat(0.0f);
    }
    constexpr int kVector = kLanes * Product::kNumbers;
    for (int64_t k = 0; k < steps; ++k, weights += V * kVector) {
      typename Product::Weight step_weights[V];
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) step_weights[v] = Product::weights(weights + v * kVector);
#pragma GCC unroll 16
      for (int x = 0; x < X; ++x) {
        const typename Product::Weight number = Product::spread(images + x * channels + k * Product::kNumbers);
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) sums[x][v] = Product::add(sums[x][v], number, step_weights[v]);
      }
    }
#pragma GCC unroll 16
    for (int x = 0; x < X; ++x) {
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) store(products + (x * V + v) * kLanes, sums[x][v]);
    }
  }
};

}  // namespace
}  // namespace PATHNET_ISA_NAMESPACE
}  // namespace pathnet::cpu
