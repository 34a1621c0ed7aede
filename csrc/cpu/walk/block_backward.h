// One block's routed Jacobian for a few images at once, BN mode `running`: the step that walks back are made of.
#pragma once

#include "walker.h"

namespace pathnet::cpu {
namespace PATHNET_ISA_NAMESPACE {
namespace {

// One image's way through a block, from its output to its input: target = a * skip^T(skip) + c * module^T(residual).
template <class Convolver>
struct Way {
  using Element = typename Convolver::Element;

  const float* skip;            // not read where a is 0
  const Element* skip_operand;  // the same as a projection reads it
  const Element* residual;      // as convolutions read it; not read where c is 0
  float a, c;
  const uint8_t* bits;  // the sample's row of ReLU bits
  float* target;        // may be `skip` where that is an identity
  Element* operand;     // the target as convolutions read it; null where that is not wanted
  float largest;        // of the target, found here
};

template <class Convolver>
class BlockBackward {
 public:
  using Element = typename Convolver::Element;
  using Own = Way<Convolver>;

  BlockBackward(const Network& network, const Packed<Convolver>& packed)
      : network_(network), packed_(packed), inners_(network, kMostSamples) {}

  // Ways [0, count), at most kMostSamples. All modules' first convolutions have read their sources before a target is
  // written, where a block has more than one.
  void apply(int64_t b, Own* ways, int64_t count) {
    const Block& block = network_.block(b);
    const Image &from = network_.ends[b + 1], &image = network_.ends[b];
    const bool identity = block.skips_by_identity(), padded = block.skips_by_padding();
    for (int64_t i = 0; i < count && padded; ++i) {
      pad(from, image, network_.stride(block), true, ways[i].a, ways[i].skip, ways[i].target);
    }
    if (block.skip == kProjection) {
      through(
          block, ways, count, [](const Own& way) { return way.a != 0.0f; },
          [&](const Element** sources, int64_t some, Join<Convolver, true>& join, Own** own) {
            for (int64_t i = 0; i < some; ++i) {
              sources[i] = own[i]->skip_operand;
              join.coefficients[i] = own[i]->a;
            }
            convolve(block.projection_unit, sources, some, join);
          });
    }
    through(
        block, ways, count, [](const Own& way) { return way.c != 0.0f; },
        [&](const Element** sources, int64_t some, Join<Convolver, true>& join, Own** own) {
          for (int64_t i = 0; i < some; ++i) {
            sources[i] = own[i]->residual;
            join.coefficients[i] = own[i]->c;
            // What a skip that is none has written is taken as it is.
            join.old_coefficients[i] = identity ? own[i]->a : 1.0f;
            const bool skipped = padded || own[i]->a != 0.0f;
            join.olds[i] = !skipped ? nullptr : identity ? own[i]->skip : own[i]->target;
            join.operands[i] = own[i]->operand;
          }
          residual(block, own, sources, some, join);
        });
    for (int64_t i = 0; i < count; ++i) {
      if (ways[i].c != 0.0f) continue;
      Own& way = ways[i];
      if (way.a == 0.0f) {
        pad(from, image, 1, true, 0.0f, nullptr, way.target);
      } else if (block.behind_relu()) {
        const uint8_t* bits = network_.bits(block.first_unit, way.bits);
        const int64_t pixel_bytes = image.groups() * 2;
        scaled_copy(image, identity ? way.skip : way.target, identity ? way.a : 1.0f, way.target,
                    [&](Vector value, int64_t pixel, int64_t channel) {
                      return keep(value, read_bits(bits + pixel * pixel_bytes, channel));
                    });
      } else if (identity) {
        scaled_copy(image, way.skip, way.a, way.target, [](Vector value, int64_t, int64_t) { return value; });
      }
      way.largest = largest_in(way.target, image.pixels() * image.padded());
      if constexpr (!Convolver::kFloats) {
        if (way.operand) encode<Convolver>(image, way.target, image, way.operand);
      }
    }
  }

 private:
  // Those of the ways that are asked for, and what joins their results.
  template <class Asked, class Work>
  void through(const Block& block, Own* ways, int64_t count, const Asked& asked, const Work& work) {
    const int64_t b = &block - network_.plan.blocks;
    Join<Convolver, true> join = {network_.ends[b], block.behind_relu(), nullptr, {}, {}, {}, {}, {}, {}, {}};
    Own* own[kMostSamples];
    int64_t some = 0;
    for (int64_t i = 0; i < count; ++i) {
      if (!asked(ways[i])) continue;
      join.targets[some] = ways[i].target;
      join.bits[some] = network_.bits(block.first_unit, ways[i].bits);
      join.largest[some] = splat(0.0f);
      own[some++] = &ways[i];
    }
    if (some == 0) return;
    const Element* sources[kMostSamples];
    work(sources, some, join, own);
    for (int64_t i = 0; i < some; ++i) own[i]->largest = largest_lane(join.largest[i]);
  }

  void residual(const Block& block, Own* const* own, const Element** sources, int64_t count,
                Join<Convolver, true>& join) {
    for (int64_t u = block.first_unit + block.unit_count - 1; u > block.first_unit; --u) {
      Masked<Convolver> masked = {network_.inputs[u], {}, {}};
      for (int64_t i = 0; i < count; ++i) {
        masked.operands[i] = inners_.inner(network_.input_shape[u], i, int(u % 2), network_.inputs[u]);
        masked.bits[i] = network_.bits(u, own[i]->bits);
      }
      convolve(u, sources, count, masked);
      std::copy_n(masked.operands, count, sources);
    }
    convolve(block.first_unit, sources, count, join);
  }

  template <class Then>
  void convolve(int64_t unit, const Element* const* sources, int64_t count, Then& then) {
    Convolver::run(network_.convolutions[unit], packed_[unit], sources, count, then);
  }

  const Network& network_;
  const Packed<Convolver>& packed_;
  Buffers<Convolver> inners_;
};

// Whether a largest magnitude has left the range in which gradients are kept, and the power that brings it back.
inline bool out_of_range(float largest, int* power) {
  constexpr float kLeast = 0x1p-20f, kMost = 0x1p20f;
  if (!(largest > 0.0f) || !std::isfinite(largest) || (largest >= kLeast && largest <= kMost)) return false;
  std::frexp(largest, power);
  return true;
}

// In two factors, since 2^power can leave the range of float32 where the result does not.
inline void times_power(const Image& image, float* values, int power) {
  scale_inside(image, values, std::ldexp(1.0f, power / 2), std::ldexp(1.0f, power - power / 2));
}

}  // namespace
}  // namespace PATHNET_ISA_NAMESPACE
}  // namespace pathnet::cpu
