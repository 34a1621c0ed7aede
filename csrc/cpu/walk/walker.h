// Shared by the passes: groups of samples, the distribution of work to threads, and the padding skip.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <vector>

#include "../conv/packed.h"
#include "buffers.h"
#include "epilogues.h"
#include "tree.h"

namespace pathnet::cpu {
namespace PATHNET_ISA_NAMESPACE {
namespace {

// A fourth of the second level of cache, of which the smaller processors of today have 1 MB: there a group of samples
// stays during the pass, next to the weights.
constexpr int64_t kGroupBytes = 256 * 1024;

// The number of samples whose gradients fit in cache together at a block.
template <class Convolver>
int64_t samples_together(const Network& network, int64_t block) {
  int64_t bytes = 0;
  for (const Image* image : {&network.ends[block], &network.ends[block + 1]}) {
    bytes = std::max<int64_t>(bytes, image->pixels() * image->padded() * sizeof(float) +
                                         operand_size<Convolver>(*image) * sizeof(typename Convolver::Element));
  }
  return std::clamp<int64_t>(kGroupBytes / bytes, 1, kMostSamples);
}

// Multiply-adds of a block's module, for one sample.
inline double operations(const Network& network, int64_t b) {
  double sum = 0;
  const Block& block = network.block(b);
  for (int64_t u = block.first_unit; u < block.module_end(); ++u) {
    const Unit& unit = network.unit(u);
    sum += double(unit.weight_size()) * double(unit.out_height * unit.out_width);
  }
  return sum;
}

// Clamp minimum of a unit's activation: 0, or -inf if it has no ReLU.
inline float least(const Unit& unit) { return unit.bits_offset < 0 ? -INFINITY : 0.0f; }

// Calls work(worker, take, count) on every thread; take() returns the next of `count` items, or one beyond the last.
template <class Work>
void take_in_turn(const Team& team, int64_t count, const Work& work) {
  std::atomic<int64_t> next{0};
  const auto take = [&] {
    team.check();
    return next.fetch_add(1, std::memory_order_relaxed);
  };
  team.run([&](int worker) { work(worker, take, count); });
}

// Runs all samples along all routings, with one walker per thread, which make() returns.
template <class Job, class Make>
void walk_items(const Job& job, const Team& team, const Network& network, Direction direction, const Make& make) {
  const Routings routings(job.routing, job.routings, job.plan.block_count, direction, team);
  const std::vector<Item> items =
      make_items(routings, job.batch, team, [&](int64_t block) { return operations(network, block); });
  take_in_turn(team, int64_t(items.size()), [&](int, const auto& next, int64_t count) {
    const FlushDenormals flush(direction == Direction::kBackward);
    auto walker = make();
    for (int64_t i; (i = next()) < count;) {
      walker.begin(items[i]);
      descend(routings, walker, team, items[i].first, items[i].last, 0, 0);
    }
  });
}

// target = coefficient * the padding skip of source, or the transposed one; `positive`: of the source's ReLU. Writes
// all of the target's inside. With coefficient 0 it does not read the source, and the shapes may be those of any
// skip.
inline void pad(const Image& source, const Image& target, const Padding& padding, bool transposed, float coefficient,
                const float* from, float* to, bool positive = false) {
  for (int64_t y = 0; y < target.height; ++y) {
    std::fill_n(to + target.pixel(y, 0) * target.padded(), target.width * target.padded(), 0.0f);
  }
  if (coefficient == 0.0f) return;
  const Image& small = transposed ? source : target;
  const int64_t stride = padding.stride;
  // Of the block's input. On the way back the added channels are dropped.
  const int64_t channels = transposed ? target.channels : source.channels;
  from += transposed ? padding.before : 0;
  to += transposed ? 0 : padding.before;
  for (int64_t y = 0; y < small.height; ++y) {
    for (int64_t x = 0; x < small.width; ++x) {
      const int64_t from_pixel = transposed ? source.pixel(y, x) : source.pixel(y * stride, x * stride);
      const int64_t to_pixel = transposed ? target.pixel(y * stride, x * stride) : target.pixel(y, x);
      for (int64_t c = 0; c < channels; ++c) {
        float value = from[from_pixel * source.padded() + c];
        if (positive && value < 0.0f) value = 0.0f;
        to[to_pixel * target.padded() + c] = coefficient * value;
      }
    }
  }
}

// The exponent of the larger of two gradients times their coefficients, one of which is not zero.
inline int32_t larger_exponent(float a, int32_t skip, float c, int32_t residual) {
  if (a == 0.0f) return residual + std::ilogb(c);
  if (c == 0.0f) return skip + std::ilogb(a);
  return std::max(skip + std::ilogb(a), residual + std::ilogb(c));
}

inline float times_power(float coefficient, int64_t power) {
  return std::ldexp(coefficient, int(std::clamp<int64_t>(power, -1000, 1000)));
}

}  // namespace
}  // namespace PATHNET_ISA_NAMESPACE
}  // namespace pathnet::cpu
