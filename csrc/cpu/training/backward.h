// The gradients of a block's input and parameters.
//
// From the last unit to the first, the whole batch goes through one transposed convolution, which also gives the
// weight gradient. A thread takes a slot of neighbouring samples: it computes the gradient at the convolution's
// output (of the gradient behind it, and through a BN of that unit's input) and the activations at the convolution's
// input as bordered and dense images in cache, convolves, masks the sums by the ReLU, which it computes anew, and
// sums up what the BN before needs. Weight gradients add up within a slot sample after sample, and over the slots in
// their order. How many samples make a slot depends on the shapes alone, so all results are bit-equal for any number
// of threads.
//
// Bytes of a basic block with an identity skip, in passes over an activation of the batch. The last unit reads the
// gradient and the inner input and writes the gradient there; the first unit reads both and its own input and writes
// the gradient behind its BN; the end reads that, the input and the gradient again, and writes: eleven passes, with
// the six of the forward pass seventeen. Two of them would go if blocks ran together: one that measures its output
// for the next, and one that finishes the gradient that it reads. 128 images of 32x32 pixels and 16 channels are 8.4
// MB in float32, half of it in bf16: the block moves 143 MB, and those of ResNet-110 behind each halving of the sides
// half as many, 4.5 GB in a step.
//
// Operations: 302 million multiply-adds for each of the three products of a unit, at all three widths; a quarter of
// that by F(4x4, 3x3), 453 million for the block. At 16 channels, for 16 pixels: 1728 multiply-adds of vectors of 16
// and 520 operations of transforms a unit, and for the block 51 operations a vector of its activations for BN, ReLU
// and addition; at 32 channels half, and at 64 a quarter, of both for as many multiply-adds.
//
// The bound: at two operations a cycle on vectors of 16 the block takes 22, 18 and 16 million cycles of one core at
// 16, 32 and 64 channels. So memory bounds a step where a core gets less than 6.5, 4.0 and 2.2 bytes a cycle from it,
// and arithmetic elsewhere.
#pragma once

#include "reduction.h"

namespace pathnet::cpu {
namespace PATHNET_ISA_NAMESPACE {
namespace {

template <class Convolver, class Stored>
class BackwardTraining : TrainingPass<Convolver, Stored> {
 public:
  BackwardTraining(const TrainingBackward& job, const Team& team)
      : Pass(job.block, job.x, job.inner, true, team), job_(job), benches_(team.threads) {
    for (int64_t u = 0; u < block_.units(); ++u) {
      const float* mean = job.statistics + u * 2 * block_.widest;
      norms_.emplace_back(block_.norms[u], mean, mean + block_.widest, input(u));
    }
    for (Bench& bench : benches_) bench.gradients.resize(block_.weights.size());
    int64_t most = 0;
    for (int64_t u = 1; u < block_.units(); ++u) most = std::max(most, block_.input_size(u));
    for (int64_t i = 0; i < std::min<int64_t>(2, block_.units() - 1); ++i) {
      between_[i] = make_large((most * int64_t(sizeof(Stored)) + 3) / 4);
    }
  }

  void run() {
    for (int64_t u = block_.units() - 1; u >= 0; --u) run_unit(u);
    finish();
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

  // The images of one thread.
  struct Bench {
    std::vector<GroupImages<Element>> gradients;  // at the output of each convolution
    GroupImages<float> activations[2];            // of the first unit, and of later ones
  };

  static constexpr int64_t kMostSlots = 16;
  // Of the weight gradients that wait for their sum over the slots.
  static constexpr int64_t kMostFloats = int64_t(1) << 23;

  const Stored* grad() const { return static_cast<const Stored*>(job_.grad); }
  // The gradient at the output of unit u's BN.
  Stored* norm_grads(int64_t u) const {
    return u == 0 ? static_cast<Stored*>(job_.x_grad) : reinterpret_cast<Stored*>(between_[(u - 1) % 2].get());
  }
  // Those that run with unit u.
  std::vector<int64_t> convolutions_of(int64_t u) const {
    if (u == 0 && block_.projects()) return {0, block_.units()};
    return {u};
  }

  void run_unit(int64_t u) {
    const std::vector<int64_t> convolutions = convolutions_of(u);
    int64_t weights = 0, floats = 0;
    for (int64_t i : convolutions) {
      weights = std::max(weights, weight_count(i));
      floats += Convolver::gradient_size(convolutions_[i]);
    }
    const Slots slots(block_.batch, samples_together(u), std::clamp<int64_t>(kMostFloats / weights, 1, kMostSlots));
    std::vector<Large> slot_grads;
    for (int64_t i : convolutions) slot_grads.push_back(make_large(slots.count * weight_count(i)));
    sums_.assign(block_.batch * 2 * input(u).padded(), 0.0f);
    take_in_turn(team_, slots.count, [&](int worker, const auto& next, int64_t count) {
      const Large memory = make_large(floats);
      for (int64_t slot; (slot = next()) < count;) {
        float* sums = memory.get();
        std::fill_n(sums, floats, 0.0f);
        slots.for_each_group(slot, team_, [&](int64_t first, int64_t samples, int64_t after) {
          run_group(benches_[worker], u, first, samples, ahead(u, first + samples, after), sums);
        });
        for (size_t k = 0; k < convolutions.size(); ++k) {
          const Convolution& convolution = convolutions_[convolutions[k]];
          Convolver::finish_gradient(convolution, sums, slot_grads[k].get() + slot * weight_count(convolutions[k]));
          sums += Convolver::gradient_size(convolution);
        }
      }
    });
    for (size_t k = 0; k < convolutions.size(); ++k) {
      const int64_t i = convolutions[k];
      add_slots(convolutions_[i], slot_grads[k].get(), slots.count, team_, job_.weight_grads[i]);
    }
    means_ = means(u);
  }

  int64_t weight_count(int64_t i) const {
    const Convolution& convolution = convolutions_[i];
    return convolution.positions * convolution.source.padded() * convolution.target.padded();
  }

  // What unit u reads of samples.
  Ahead ahead(int64_t u, int64_t first, int64_t count) const {
    Ahead ahead;
    const auto add = [&](const Stored* values, const Image& image) {
      ahead.add(values + first * size(image), count * size(image) * int64_t(sizeof(Stored)));
    };
    add(inputs(u), input(u));
    if (last(u)) {
      add(grad(), output());
    } else {
      add(norm_grads(u + 1), input(u + 1));
      add(inputs(u + 1), input(u + 1));
    }
    return ahead;
  }

  void run_group(Bench& bench, int64_t u, int64_t first, int64_t count, const Ahead& ahead, float* sums) {
    const Image target = input(u);
    const float* activations[kMostSamples];
    const Element* gradients[kMostSamples];
    TrainingReduction<Stored> reduction = {target, norms_[u], false, true, {}, {}, {}, ahead};
    for (int64_t s = 0; s < count; ++s) {
      const int64_t sample = first + s;
      activations[s] = activate(bench, u, sample, s);
      reduction.inputs[s] = inputs(u) + sample * size(target);
      reduction.targets[s] = norm_grads(u) + sample * size(target);
      reduction.sums[s] = sums_.data() + sample * 2 * target.padded();
    }
    if (u == 0 && block_.projects()) {
      const int64_t projection = block_.units();
      for (int64_t s = 0; s < count; ++s) gradients[s] = from_output(bench, projection, block_.a, first + s, s);
      TrainingReduction<Stored> aside = reduction;
      aside.sums_up = false;
      aside.ahead = Ahead();
      float* aside_sums = sums + Convolver::gradient_size(convolutions_[u]);
      Convolver::run_back(convolutions_[projection], convolutions_.packed(projection), gradients, activations, count,
                          aside, aside_sums);
      reduction.add = true;
    }
    for (int64_t s = 0; s < count; ++s) {
      gradients[s] = last(u) ? from_output(bench, u, block_.c, first + s, s) : through_norm(bench, u, first + s, s);
    }
    Convolver::run_back(convolutions_[u], convolutions_.packed(u), gradients, activations, count, reduction, sums);
  }

  // relu(BN(input)) of unit u, dense.
  const float* activate(Bench& bench, int64_t u, int64_t sample, int64_t s) {
    const Image image = input(u);
    float* target = bench.activations[u > 0].get(s, most_dense(u > 0));
    const Stored* values = inputs(u) + sample * size(image);
    const int64_t pixels = image.height * image.width;
    for (int64_t c = 0; c < image.padded(); c += kLanes) {
      if (c >= image.channels) {
        for (int64_t i = 0; i < pixels; ++i) store(target + i * image.padded() + c, splat(0.0f));
        continue;
      }
      const TrainingNorm::Lanes map = norms_[u].at(c);
      for_lanes(image.channels - c, [&](auto lanes) {
        for (int64_t i = 0; i < pixels; ++i) {
          const Vector value = map.scaled(map.normalized(load_some(values + i * image.channels + c, lanes)));
          store(target + i * image.padded() + c, maximum(splat(0.0f), value));
        }
      });
    }
    return target;
  }

  int64_t most_dense(bool later) const {
    int64_t most = 0;
    for (int64_t u = later ? 1 : 0; u < (later ? block_.units() : 1); ++u) most = std::max(most, input(u).dense());
    return most;
  }

  // factor * the block's gradient, as convolution i reads it.
  const Element* from_output(Bench& bench, int64_t i, float factor, int64_t sample, int64_t s) {
    const Image& image = convolutions_[i].source;
    const Stored* values = grad() + sample * size(image);
    const Vector scale = splat(factor);
    return bordered(bench, i, s, [&](int64_t channel) {
      return [=](int64_t place, auto lanes) { return scale * load_some(values + channel + place, lanes); };
    });
  }

  // The gradient at the input of unit u + 1's BN, as unit u's convolution reads it.
  const Element* through_norm(Bench& bench, int64_t u, int64_t sample, int64_t s) {
    const Image image = input(u + 1);
    const Stored *h = norm_grads(u + 1) + sample * size(image), *values = inputs(u + 1) + sample * size(image);
    return bordered(bench, u, s, [&](int64_t channel) {
      return [=, backward = norm_backward(u + 1, channel)](int64_t place, auto lanes) {
        return backward(load_some(h + channel + place, lanes), load_some(values + channel + place, lanes));
      };
    });
  }

  // Of kLanes channels.
  NormBackward norm_backward(int64_t u, int64_t channel) const {
    const TrainingNorm::Lanes map = norms_[u].at(channel);
    if (!block_.by_batch()) return {map, splat(0.0f), splat(0.0f)};
    return {map, load(means_.h.data() + channel), load(means_.hx.data() + channel)};
  }

  // A bordered image, of the values that of(channel)(place from there, lanes) returns.
  template <class Of>
  const Element* bordered(Bench& bench, int64_t i, int64_t s, const Of& of) {
    const Image& image = convolutions_[i].source;
    Element* operand = bench.gradients[i].get(s, operand_size<Convolver>(image));
    const int64_t channels = Convolver::operand_channels(image), plane = operand_plane<Convolver>(image);
    for (int64_t c = 0; c < image.channels; c += kLanes) {
      const auto value = of(c);
      for_lanes(image.channels - c, [&](auto lanes) {
        for (int64_t y = 0; y < image.height; ++y) {
          Element* row = operand + image.pixel(y, 0) * channels + c;
          for (int64_t j = 0; j < image.width; ++j) {
            Convolver::put(row + j * channels, plane, value((y * image.width + j) * image.channels, lanes));
          }
        }
      });
    }
    return operand;
  }

  // Writes the gradients of unit u's BN, and returns the means that the gradient of its input takes.
  NormMeans means(int64_t u) {
    const Image image = input(u);
    const int64_t padded = image.padded();
    const double count = double(block_.batch * image.height * image.width);
    NormMeans means = {std::vector<float>(padded), std::vector<float>(padded)};
    for (int64_t c = 0; c < image.channels; ++c) {
      double h = 0, hx = 0;
      for (int64_t s = 0; s < block_.batch; ++s) {
        h += sums_[s * 2 * padded + c];
        hx += sums_[(s * 2 + 1) * padded + c];
      }
      job_.bias_grads[u][c] = float(h);
      job_.gain_grads[u][c] = float(hx);
      means.h[c] = float(h / count);
      means.hx[c] = float(hx / count);
    }
    return means;
  }

  // The input's gradient, in place of h: through the first unit's BN, and through the skip unless that is a
  // projection.
  void finish() {
    const Image image = input(0), end = output();
    const bool identity = skip() == kIdentity && block_.a != 0.0f, pads = skip() == kPad && block_.a != 0.0f;
    for_each_sample(team_, block_.batch, 1, [&](int, int64_t sample, int64_t) {
      Stored* target = norm_grads(0) + sample * size(image);
      const Stored *values = inputs(0) + sample * size(image), *output_grad = grad() + sample * size(end);
      const int64_t all_pixels = size(image);
      for (int64_t c = 0; c < image.channels; c += kLanes) {
        const NormBackward backward = norm_backward(0, c);
        for_lanes(image.channels - c, [&](auto lanes) {
          for (int64_t place = c; place < all_pixels; place += image.channels) {
            Vector value = backward(load_some(target + place, lanes), load_some(values + place, lanes));
            if (identity) value = multiply_add(splat(block_.a), load_some(output_grad + place, lanes), value);
            store_some(target + place, value, lanes);
          }
        });
      }
      if (pads) add_padding(output_grad, target);
    });
  }

  // target += a * the transposed padding skip of a sample's gradient.
  void add_padding(const Stored* gradient, Stored* target) const {
    const Image from = output(), to = input(0);
    const Padding padding = convolutions_.network().padding(block_.plan.blocks[0]);
    for (int64_t y = 0; y < from.height; ++y) {
      for (int64_t i = 0; i < from.width; ++i, gradient += from.channels) {
        Stored* pixel = target + (y * padding.stride * to.width + i * padding.stride) * to.channels;
        for (int64_t c = 0; c < to.channels; c += kLanes) {
          const int64_t lanes = to.channels - c;
          const Vector value = load_some(gradient + padding.before + c, lanes);
          store_some(pixel + c, multiply_add(splat(block_.a), value, load_some(pixel + c, lanes)), lanes);
        }
      }
    }
  }

  const TrainingBackward& job_;
  std::vector<TrainingNorm> norms_;
  std::vector<Bench> benches_;
  Large between_[2];
  std::vector<float> sums_;  // of the unit at work: [batch, two, padded channels]
  NormMeans means_;          // of the unit behind the one at work
};

template <class Convolver, class Stored>
void train_backward(const TrainingBackward& job, const Team& team) {
  BackwardTraining<Convolver, Stored>(job, team).run();
}

}  // namespace
}  // namespace PATHNET_ISA_NAMESPACE
}  // namespace pathnet::cpu
