// Epilogues, which a convolver calls with rows of its sums while they are in cache; and loops over whole images.
#pragma once

#include <algorithm>

#include "../conv/convolver.h"
#include "buffers.h"

namespace pathnet::cpu {
namespace PATHNET_ISA_NAMESPACE {
namespace {

// The places of a row's pixels, one after the other, in images with and without a border.
struct Pixels {
  Pixels(const Image& image, int64_t y, int64_t x, int64_t step)
      : bordered(image.pixel(y, x)), dense(y * image.width + x), step(step) {}

  void next() {
    bordered += step;
    dense += step;
  }

  int64_t bordered, dense, step;
};

// The gradient at a ReLU's input, for the next convolution of the backward pass.
template <class Convolver>
struct Masked {
  const Image& image;
  typename Convolver::Element* operands[kMostSamples];
  const uint8_t* bits[kMostSamples];

  void operator()(int64_t sample, int64_t y, int64_t x, int64_t step, int64_t count, int64_t channel, int vectors,
                  const float* sums) const {
    const int64_t channels = Convolver::operand_channels(image), plane = operand_plane<Convolver>(image);
    const int64_t pixel_bytes = image.groups() * 2;
    const uint8_t* const set = bits[sample];
    typename Convolver::Element* const operand = operands[sample];
    Pixels at(image, y, x, step);
    for (int64_t i = 0; i < count; ++i, at.next()) {
      for (int v = 0; v < vectors; ++v, sums += kLanes) {
        const int64_t first = channel + v * kLanes;
        const uint32_t kept = read_bits(set + at.dense * pixel_bytes, first);
        Convolver::put(operand + at.bordered * channels + first, plane, keep(load(sums), kept));
      }
    }
  }
};

// Adds up a block's branches, and finds the largest magnitude of the target. Old and target may be the same memory; a
// null old counts as zero.
// Backward: target = bits * coefficient * sums + old_coefficient * old; with behind_relu, `old` is masked by the bits
// as well. The operand may be null.
// Forward: target = coefficient * (sums + bias) + old_coefficient * old; with behind_relu, `old` is relu(old). A null
// bias counts as zero.
template <class Convolver, bool kBack>
struct Join {
  const Image& image;
  bool behind_relu;
  const float* bias;  // padded to the image's padded channels
  float coefficients[kMostSamples], old_coefficients[kMostSamples];
  float* targets[kMostSamples];
  const float* olds[kMostSamples];
  typename Convolver::Element* operands[kMostSamples];
  const uint8_t* bits[kMostSamples];
  Vector largest[kMostSamples];

  void operator()(int64_t sample, int64_t y, int64_t x, int64_t step, int64_t count, int64_t channel, int vectors,
                  const float* sums) {
    const int64_t padded = image.padded(), pixel_bytes = image.groups() * 2;
    const int64_t channels = Convolver::operand_channels(image), plane = operand_plane<Convolver>(image);
    const Vector c = splat(coefficients[sample]), a = splat(old_coefficients[sample]);
    const float* old = olds[sample];
    typename Convolver::Element* const operand = operands[sample];
    float* const target = targets[sample];
    const uint8_t* const set = bits[sample];
    const bool behind = behind_relu;
    Vector most = largest[sample];
    Pixels at(image, y, x, step);
    for (int64_t i = 0; i < count; ++i, at.next()) {
      for (int v = 0; v < vectors; ++v, sums += kLanes) {
        const int64_t first = channel + v * kLanes, place = at.bordered * padded + first;
        Vector value = load(sums);
        if constexpr (kBack) {
          const uint32_t kept = read_bits(set + at.dense * pixel_bytes, first);
          value = c * keep(value, kept);
          if (old) {
            const Vector before = load(old + place);
            value = multiply_add(a, behind ? keep(before, kept) : before, value);
          }
        } else {
          if (bias) value = value + load(bias + first);
          value = c * value;
          if (old) {
            const Vector before = load(old + place);
            value = multiply_add(a, behind ? maximum(splat(0.0f), before) : before, value);
          }
        }
        most = maximum(most, magnitude(value));
        store(target + place, value);
        if constexpr (kBack && !Convolver::kFloats) {
          if (operand) Convolver::put(operand + at.bordered * channels + first, plane, value);
        }
      }
    }
    largest[sample] = most;
  }
};

// max(least, scale * sums + shift), for the next convolution of the forward pass, and its ReLU bits, unless those are
// null.
template <class Convolver>
struct Activated {
  const Image& image;
  const float* scales;  // padded to the image's padded channels
  const float* shifts;
  float least;
  typename Convolver::Element* operands[kMostSamples];
  uint8_t* bits[kMostSamples];

  void operator()(int64_t sample, int64_t y, int64_t x, int64_t step, int64_t count, int64_t channel, int vectors,
                  const float* sums) const {
    const int64_t channels = Convolver::operand_channels(image), plane = operand_plane<Convolver>(image);
    const int64_t pixel_bytes = image.groups() * 2;
    Pixels at(image, y, x, step);
    for (int64_t i = 0; i < count; ++i, at.next()) {
      for (int v = 0; v < vectors; ++v, sums += kLanes) {
        const int64_t first = channel + v * kLanes;
        const Vector value = multiply_add(load(scales + first), load(sums), load(shifts + first));
        if (bits[sample]) write_bits(bits[sample] + at.dense * pixel_bytes, first, positive(value));
        // In this order of arguments a NaN stays NaN.
        Convolver::put(operands[sample] + at.bordered * channels + first, plane, maximum(splat(least), value));
      }
    }
  }
};

// Calls an epilogue with every row of an image, all channels at once.
template <class Then>
void rows_of(const Image& image, const float* values, int64_t sample, Then& then) {
  for (int64_t y = 0; y < image.height; ++y) {
    then(sample, y, 0, 1, image.width, 0, int(image.padded() / kLanes), values + image.pixel(y, 0) * image.padded());
  }
}

// Copies [channels, height, width] into the inside of an image; to_planes copies back. Row by row, so that a line of
// the cache, which holds a pixel's channels, is fetched once for all of them.
inline void from_planes(const Image& image, const float* planes, float* values) {
  for (int64_t y = 0; y < image.height; ++y) {
    float* row = values + image.pixel(y, 0) * image.padded();
    for (int64_t c = 0; c < image.channels; ++c) {
      const float* plane = planes + (c * image.height + y) * image.width;
      for (int64_t x = 0; x < image.width; ++x) row[x * image.padded() + c] = plane[x];
    }
  }
}

inline void to_planes(const Image& image, const float* values, float* planes) {
  for (int64_t y = 0; y < image.height; ++y) {
    const float* row = values + image.pixel(y, 0) * image.padded();
    for (int64_t c = 0; c < image.channels; ++c) {
      float* plane = planes + (c * image.height + y) * image.width;
      for (int64_t x = 0; x < image.width; ++x) plane[x] = row[x * image.padded() + c];
    }
  }
}

// target = factor * change(source, pixel without border, channel), inside; both may be the same memory.
template <class Change>
void scaled_copy(const Image& image, const float* source, float factor, float* target, const Change& change) {
  const int64_t padded = image.padded();
  for (int64_t y = 0; y < image.height; ++y) {
    Pixels at(image, y, 0, 1);
    for (int64_t x = 0; x < image.width; ++x, at.next()) {
      for (int64_t c = 0; c < padded; c += kLanes) {
        const int64_t place = at.bordered * padded + c;
        store(target + place, splat(factor) * change(load(source + place), at.dense, c));
      }
    }
  }
}

// Multiplies the inside by two factors; the border stays zero even where a factor is not finite.
inline void scale_inside(const Image& image, float* values, float factor, float another) {
  for (int64_t y = 0; y < image.height; ++y) {
    float* row = values + image.pixel(y, 0) * image.padded();
    for (int64_t j = 0; j < image.width * image.padded(); j += kLanes) {
      store(row + j, load(row + j) * splat(factor) * splat(another));
    }
  }
}

inline float largest_in(const float* values, int64_t size) {
  Vector most = splat(0.0f);
  for (int64_t j = 0; j < size; j += kLanes) most = maximum(most, magnitude(load(values + j)));
  return largest_lane(most);
}

// Returns whether all values are zero. A maximum may miss a NaN; this does not.
inline bool all_zero(const float* values, int64_t size) {
  return std::all_of(values, values + size, [](float value) { return value == 0.0f; });
}

// Writes the inside of an image as the next convolution reads it, into a bordered image of the same sides.
template <class Convolver>
void encode(const Image& from, const float* values, const Image& to, typename Convolver::Element* operand) {
  const int64_t channels = Convolver::operand_channels(to), plane = operand_plane<Convolver>(to);
  for (int64_t y = 0; y < to.height; ++y) {
    const float* source = values + from.pixel(y, 0) * from.padded();
    typename Convolver::Element* row = operand + to.pixel(y, 0) * channels;
    for (int64_t x = 0; x < to.width; ++x, row += channels) {
      for (int64_t c = 0; c < to.padded(); c += kLanes, source += kLanes) {
        Convolver::put(row + c, plane, load(source));
      }
    }
  }
}

// The sum of squares of an image's inside, in an order that depends on the instruction set alone.
inline double sum_of_squares(const Image& image, const float* values) {
  double sums[kLanes] = {};
  for (int64_t y = 0; y < image.height; ++y) {
    const float* row = values + image.pixel(y, 0) * image.padded();
    for (int64_t j = 0; j < image.width * image.padded(); j += kLanes) {
      for (int lane = 0; lane < kLanes; ++lane) sums[lane] += double(row[j + lane]) * row[j + lane];
    }
  }
  double total = 0;
  for (double sum : sums) total += sum;
  return total;
}

}  // namespace
}  // namespace PATHNET_ISA_NAMESPACE
}  // namespace pathnet::cpu
