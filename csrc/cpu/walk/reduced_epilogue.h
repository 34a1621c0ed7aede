// The epilogue of a transposed convolution in BN mode `batch`: masks the gradient, and sums it for the BN before.
#pragma once

#include "epilogues.h"

namespace pathnet::cpu {
namespace PATHNET_ISA_NAMESPACE {
namespace {

// h = bits * (coefficient * convolution) + the previous h, where `add`; and the sums of h over the image.
struct ReducedEpilogue {
  // Pixels of the same sample that are fetched this far ahead.
  static constexpr int64_t kAhead = 64;

  const Image& image;
  float coefficient;
  bool add;
  const uint8_t* bits;
  const float* normalized;  // not read without sums
  float* h;
  // [padded channels] of this sample: sum(h) and sum(h x). Null if another convolution adds to h, or no BN follows.
  float *sums, *products;
  // Inputs of the next sample, fetched while this one computes; null for none.
  const float* ahead[2] = {nullptr, nullptr};

  void operator()(int64_t, int64_t y, int64_t x, int64_t step, int64_t count, int64_t channel, int vectors,
                  const float* values) const {
    for (int v = 0; v < vectors; ++v) {
      take(Pixels(image, y, x, step), count, channel + v * kLanes, values + v * kLanes, vectors * kLanes);
    }
  }

 private:
  void take(Pixels at, int64_t count, int64_t channel, const float* values, int64_t next) const {
    const int64_t padded = image.padded(), pixel_bytes = image.groups() * 2;
    const Vector c = splat(coefficient);
    Vector sum = splat(0.0f), product = splat(0.0f);
    for (int64_t i = 0; i < count; ++i, at.next()) {
      const int64_t place = at.dense * padded + channel;
      for (const float* next_sample : ahead) {
        if (next_sample) __builtin_prefetch(next_sample + place, 0, 2);
      }
      __builtin_prefetch(normalized + place + kAhead * padded, 0, 2);
      __builtin_prefetch(h + place + kAhead * padded, 1, 2);
      Vector value = keep(c * load(values + i * next), read_bits(bits + at.dense * pixel_bytes, channel));
      if (add) value = value + load(h + place);
      store(h + place, value);
      if (!sums) continue;
      sum = sum + value;
      product = multiply_add(value, load(normalized + place), product);
    }
    if (!sums) return;
    store(sums + channel, load(sums + channel) + sum);
    store(products + channel, load(products + channel) + product);
  }
};

}  // namespace
}  // namespace PATHNET_ISA_NAMESPACE
}  // namespace pathnet::cpu
