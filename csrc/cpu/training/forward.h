// The forward pass of a block in training.
//
// Each unit runs over the whole batch, since BN needs its statistics: a thread normalises a group of samples into
// bordered images, convolves them, and measures the results while they are in cache. With batch statistics a basic
// block whose skip is an identity reads its input three times (to measure, for the first unit, for the addition) and
// writes the inner one and the output once, reading the inner one once: six passes over an activation of the batch.
#pragma once

#include "pass.h"

namespace pathnet::cpu {
namespace PATHNET_ISA_NAMESPACE {
namespace {

// target = factor * sums + old_factor * old, a null old counting as zero. Targets and olds are dense, and may be the
// same memory.
template <class Stored>
struct TrainingJoin {
  const Image& image;
  float factor, old_factor;
  Stored* targets[kMostSamples];
  const Stored* olds[kMostSamples];
  Ahead ahead;

  void operator()(int64_t sample, int64_t y, int64_t x, int64_t step, int64_t count, int64_t channel, int vectors,
                  const float* sums) {
    const int64_t next = step * image.channels;
    for (int v = 0; v < vectors; ++v, channel += kLanes) {
      const int64_t place = (y * image.width + x) * image.channels + channel;
      Stored* target = targets[sample] + place;
      const Stored* old = olds[sample] ? olds[sample] + place : nullptr;
      const float* vector = sums + v * kLanes;
      const Vector scale = splat(factor), old_scale = splat(old_factor);
      for_lanes(image.channels - channel, [&](auto lanes) {
        for (int64_t i = 0; i < count; ++i) {
          Vector value = scale * load(vector + i * vectors * kLanes);
          if (old) value = multiply_add(old_scale, load_some(old + i * next, lanes), value);
          store_some(target + i * next, value, lanes);
          ahead.fetch();
        }
      });
    }
  }
};

template <class Convolver, class Stored>
class ForwardTraining : TrainingPass<Convolver, Stored> {
 public:
  ForwardTraining(const TrainingForward& job, const Team& team)
      : Pass(job.block, job.x, job.inner, false, team),
        job_(job),
        operands_(team.threads * job.block.units()),
        statistics_(job.block.by_batch() ? job.block.batch : 0, job.block.widest) {}

  void run() {
    if (block_.by_batch()) {
      const Image image = input(0);
      for_each_sample(team_, block_.batch, 1, [&](int, int64_t s, int64_t) {
        measure(image, inputs(0) + s * size(image), statistics_.at(s));
      });
    }
    for (int64_t u = 0; u < block_.units(); ++u) run_unit(u);
  }

 private:
  using Pass = TrainingPass<Convolver, Stored>;
  using Pass::behind;
  using Pass::block_;
  using Pass::convolutions_;
  using Pass::input;
  using Pass::inputs;
  using Pass::last;
  using Pass::output;
  using Pass::samples_together;
  using Pass::size;
  using Pass::skip;
  using Pass::team_;
  using typename Pass::Element;

  static constexpr int64_t kMostSlots = 32;

  Stored* outputs(int64_t u) const {
    if (last(u)) return static_cast<Stored*>(job_.output);
    return static_cast<Stored*>(job_.inner) + block_.inner_start(u + 1);
  }

  void run_unit(int64_t u) {
    const TrainingNorm norm = normalization(u);
    const Slots slots(block_.batch, samples_together(u), kMostSlots);
    take_in_turn(team_, slots.count, [&](int worker, const auto& next, int64_t count) {
      for (int64_t slot; (slot = next()) < count;) {
        slots.for_each_group(slot, team_, [&](int64_t first, int64_t samples, int64_t after) {
          run_group(worker, u, norm, first, samples, after);
        });
      }
    });
  }

  void run_group(int worker, int64_t u, const TrainingNorm& norm, int64_t first, int64_t count, int64_t after) {
    const Image source = input(u), target = behind(u);
    const bool joins = last(u) && block_.a != 0.0f, adds_input = joins && skip() == kIdentity;
    const Element* operands[kMostSamples];
    TrainingJoin<Stored> join = {target, last(u) ? block_.c : 1.0f, adds_input ? block_.a : 1.0f, {}, {}, {}};
    join.ahead.add(inputs(u) + (first + count) * size(source), after * size(source) * sizeof(Stored));
    if (adds_input) join.ahead.add(inputs(0) + (first + count) * size(target), after * size(target) * sizeof(Stored));
    for (int64_t s = 0; s < count; ++s) {
      operands[s] = activate(worker, u, norm, inputs(u) + (first + s) * size(source), s);
      join.targets[s] = outputs(u) + (first + s) * size(target);
      if (!joins) continue;
      join.olds[s] = adds_input ? inputs(0) + (first + s) * size(target) : join.targets[s];
      if (skip() == kPad) pad_sample(first + s, join.targets[s]);
    }
    if (u == 0 && block_.projects()) {
      const int64_t projection = block_.units();
      const Image end = output();
      TrainingJoin<Stored> aside = {end, block_.a, 1.0f, {}, {}, {}};
      for (int64_t s = 0; s < count; ++s) {
        aside.targets[s] = static_cast<Stored*>(job_.output) + (first + s) * size(end);
      }
      Convolver::run(convolutions_[projection], convolutions_.packed(projection), operands, count, aside);
    }
    Convolver::run(convolutions_[u], convolutions_.packed(u), operands, count, join);
    if (last(u) || !block_.by_batch()) return;
    for (int64_t s = 0; s < count; ++s) measure(target, join.targets[s], statistics_.at(first + s));
  }

  TrainingNorm normalization(int64_t u) const {
    const Image image = input(u);
    float *mean = job_.statistics + u * 2 * block_.widest, *variance = mean + block_.widest;
    const NormParameters& norm = block_.norms[u];
    if (block_.by_batch()) {
      for (int64_t c = 0; c < image.channels; ++c) {
        const Moments moments = statistics_.merged(c, image.height * image.width);
        mean[c] = float(moments.mean);
        variance[c] = float(moments.variance);
      }
    } else {
      std::copy_n(norm.mean, image.channels, mean);
      std::copy_n(norm.variance, image.channels, variance);
    }
    return TrainingNorm(norm, mean, variance, image);
  }

  const Element* activate(int worker, int64_t u, const TrainingNorm& norm, const Stored* values, int64_t s) {
    const Image& image = convolutions_.network().inputs[u];
    Element* operand = operands_[worker * block_.units() + u].get(s, operand_size<Convolver>(image));
    const int64_t channels = Convolver::operand_channels(image), plane = operand_plane<Convolver>(image);
    for (int64_t c = 0; c < image.channels; c += kLanes) {
      const TrainingNorm::Lanes map = norm.at(c);
      for_lanes(image.channels - c, [&](auto lanes) {
        for (int64_t y = 0; y < image.height; ++y) {
          const Stored* row = values + y * image.width * image.channels + c;
          Element* to = operand + image.pixel(y, 0) * channels + c;
          for (int64_t i = 0; i < image.width; ++i) {
            const Vector value = map.scaled(map.normalized(load_some(row + i * image.channels, lanes)));
            // In this order of arguments a NaN stays NaN.
            Convolver::put(to + i * channels, plane, maximum(splat(0.0f), value));
          }
        }
      });
    }
    return operand;
  }

  // target = a * the padding skip.
  void pad_sample(int64_t s, Stored* target) const {
    const Image from = input(0), to = output();
    const Padding padding = convolutions_.network().padding(block_.plan.blocks[0]);
    const Stored* source = inputs(0) + s * size(from);
    for (int64_t y = 0; y < to.height; ++y) {
      for (int64_t i = 0; i < to.width; ++i, target += to.channels) {
        std::fill_n(target, to.channels, Stored());
        const Stored* pixel = source + (y * padding.stride * from.width + i * padding.stride) * from.channels;
        for (int64_t c = 0; c < from.channels; c += kLanes) {
          const int64_t lanes = from.channels - c;
          store_some(target + padding.before + c, splat(block_.a) * load_some(pixel + c, lanes), lanes);
        }
      }
    }
  }

  const TrainingForward& job_;
  std::vector<GroupImages<Element>> operands_;  // [threads, units]
  SampleMoments statistics_;
};

template <class Convolver, class Stored>
void train_forward(const TrainingForward& job, const Team& team) {
  ForwardTraining<Convolver, Stored>(job, team).run();
}

}  // namespace
}  // namespace PATHNET_ISA_NAMESPACE
}  // namespace pathnet::cpu
