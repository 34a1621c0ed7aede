// The transforms of F(4x4, 3x3), of vectors of channels: each is a product by a small matrix from both sides, of the
// columns first and then of the rows.
#pragma once

#include "../isa/vector.h"

namespace pathnet::cpu {
namespace PATHNET_ISA_NAMESPACE {
namespace {

struct Winograd4Transforms {
  static constexpr int kSide = 6;
  static constexpr int kPositions = kSide * kSide;
  static constexpr int kTile = 4;

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

  static void gradient_of_weights(const float* sums, int64_t plane, Vector (*kernel)[3]) {
    Vector half[kSide][3];  // [column][row]
    for (int t = 0; t < kSide; ++t) {
      Vector column[kSide];
      for (int r = 0; r < kSide; ++r) column[r] = load(sums + (r * kSide + t) * plane);
      gradient_column(column, half[t]);
    }
    for (int r = 0; r < 3; ++r) {
      Vector row[kSide];
      for (int t = 0; t < kSide; ++t) row[t] = half[t][r];
      gradient_column(row, kernel[r]);
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

 private:
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
};

}  // namespace
}  // namespace PATHNET_ISA_NAMESPACE
}  // namespace pathnet::cpu
