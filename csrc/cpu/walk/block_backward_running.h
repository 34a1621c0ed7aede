// One block's routed vector-Jacobian product for a few images at once, BN mode `running`: the step of all backward
// passes.
#pragma once

#include "walker.h"

namespace pathnet::cpu {
namespace PATHNET_ISA_NAMESPACE {
namespace {

// One image's gradient on its way through a block: target = a * skip^T(skip) + c * module^T(residual).
template <class Convolver>
struct BlockTask {
  using Element = typename Convolver::Element;

  const float* skip;            // not read where a is 0
  const Element* skip_operand;  // `skip` as a projection reads it
  const Element* residual;      // as convolutions read it; not read where c is 0
  float a, c;
  const uint8_t* bits;  // the sample's row of ReLU bits
  float* target;        // may be `skip` where that is an identity
  Element* operand;     // the target as convolutions read it; null for none
  float largest;        // largest magnitude of the target, a result too
};

template <class Convolver>
class BlockBackwardRunning {
 public:
  using Element = typename Convolver::Element;
  using Task = BlockTask<Convolver>;

  BlockBackwardRunning(const Network& network, const Packed<Convolver>& packed)
      : network_(network), packed_(packed), inners_(network, kMostSamples) {}

  // Runs the tasks [0, count), at most kMostSamples. In a block of several convolutions, no target is written before
  // every task's source has been read.
  void apply(int64_t b, Task* tasks, int64_t count) {
    const Block& block = network_.block(b);
    const Image &from = network_.ends[b + 1], &image = network_.ends[b];
    const bool identity = block.skips_by_identity(), padded = block.skips_by_padding();
    for (int64_t i = 0; i < count && padded; ++i) {
      pad(from, image, network_.padding(block), true, tasks[i].a, tasks[i].skip, tasks[i].target);
    }
    if (block.skip == kProjection) {
      through(
          block, tasks, count, [](const Task& task) { return task.a != 0.0f; },
          [&](const Element** sources, int64_t selected_count, Join<Convolver, true>& join, Task** selected) {
            for (int64_t i = 0; i < selected_count; ++i) {
              sources[i] = selected[i]->skip_operand;
              join.coefficients[i] = selected[i]->a;
            }
            convolve(block.projection_unit, sources, selected_count, join);
          });
    }
    through(
        block, tasks, count, [](const Task& task) { return task.c != 0.0f; },
        [&](const Element** sources, int64_t selected_count, Join<Convolver, true>& join, Task** selected) {
          for (int64_t i = 0; i < selected_count; ++i) {
            sources[i] = selected[i]->residual;
            join.coefficients[i] = selected[i]->c;
            // A padding or a projection has written a * skip^T already.
            join.old_coefficients[i] = identity ? selected[i]->a : 1.0f;
            const bool skipped = padded || selected[i]->a != 0.0f;
            join.olds[i] = !skipped ? nullptr : identity ? selected[i]->skip : selected[i]->target;
            join.operands[i] = selected[i]->operand;
          }
          residual(block, selected, sources, selected_count, join);
        });
    for (int64_t i = 0; i < count; ++i) {
      if (tasks[i].c != 0.0f) continue;
      Task& task = tasks[i];
      if (task.a == 0.0f) {
        pad(from, image, {1, 0}, true, 0.0f, nullptr, task.target);
      } else if (block.behind_relu()) {
        const uint8_t* bits = network_.bits(block.first_unit, task.bits);
        const int64_t pixel_bytes = image.groups() * 2;
        scaled_copy(image, identity ? task.skip : task.target, identity ? task.a : 1.0f, task.target,
                    [&](Vector value, int64_t pixel, int64_t channel) {
                      return keep(value, read_bits(bits + pixel * pixel_bytes, channel));
                    });
      } else if (identity) {
        scaled_copy(image, task.skip, task.a, task.target, [](Vector value, int64_t, int64_t) { return value; });
      }
      task.largest = largest_in(task.target, image.pixels() * image.padded());
      if constexpr (!Convolver::kFloats) {
        if (task.operand) encode<Convolver>(image, task.target, image, task.operand);
      }
    }
  }

 private:
  // Calls work(sources, count, join, tasks) for the tasks that take part; `join` adds up their branches.
  template <class TakesPart, class Work>
  void through(const Block& block, Task* tasks, int64_t count, const TakesPart& takes_part, const Work& work) {
    const int64_t b = &block - network_.plan.blocks;
    Join<Convolver, true> join = {network_.ends[b], block.behind_relu(), nullptr, {}, {}, {}, {}, {}, {}, {}};
    Task* selected[kMostSamples];
    int64_t selected_count = 0;
    for (int64_t i = 0; i < count; ++i) {
      if (!takes_part(tasks[i])) continue;
      join.targets[selected_count] = tasks[i].target;
      join.bits[selected_count] = network_.bits(block.first_unit, tasks[i].bits);
      join.largest[selected_count] = splat(0.0f);
      selected[selected_count++] = &tasks[i];
    }
    if (selected_count == 0) return;
    const Element* sources[kMostSamples];
    work(sources, selected_count, join, selected);
    for (int64_t i = 0; i < selected_count; ++i) selected[i]->largest = largest_lane(join.largest[i]);
  }

  void residual(const Block& block, Task* const* selected, const Element** sources, int64_t count,
                Join<Convolver, true>& join) {
    for (int64_t u = block.first_unit + block.unit_count - 1; u > block.first_unit; --u) {
      Masked<Convolver> masked = {network_.inputs[u], {}, {}};
      for (int64_t i = 0; i < count; ++i) {
        masked.operands[i] = inners_.inner(network_.input_shape[u], i, int(u % 2), network_.inputs[u]);
        masked.bits[i] = network_.bits(u, selected[i]->bits);
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

// Returns whether a largest magnitude has left the range in which gradients are kept, and sets the power of two that
// brings it back.
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
