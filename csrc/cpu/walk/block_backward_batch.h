// One block's routed vector-Jacobian product for several gradients of the batch at once, BN mode `batch`.
//
// A convolution writes h, the gradient at the output of the BN before it, and each sample's two sums; the next one
// computes its operand from h and x as it reads them. So a convolution reads its gradient once and writes one, and x
// is read twice. While a sample is convolved, the inputs of the next one are fetched from memory: without it this
// mode takes 8 % longer in float32 and 17 % in bf16, on an AMD EPYC.
//
// In a closed block the gradient at its output is itself the one at the output of a BN, its h; so it is finished and
// summed up over the batch before the last convolution reads it. Before the first convolution there is no BN: its
// result is added to the gradient through the skip, and masked with it.
#pragma once

#include <algorithm>
#include <vector>

#include "gradient_finisher.h"
#include "reduced_epilogue.h"

namespace pathnet::cpu {
namespace PATHNET_ISA_NAMESPACE {
namespace {

template <class Convolver>
class BlockBackwardBatch {
 public:
  BlockBackwardBatch(BackwardContext<Convolver>& context, const BatchNormBackward<Convolver>& norms,
                     GradientFinisher<Convolver>& finisher)
      : context_(context), norms_(norms), finisher_(finisher) {}

  // Runs block b: `targets` are the gradients at its input, with the sources at its output and coefficients. It
  // leaves them unfinished.
  void walk(int64_t b, const std::vector<SharedGradient>& targets) {
    const Block& block = network().block(b);
    // A projection's gradient is added to the module's with the last sums. Other skips wait until the target is
    // finished, by when its sources are back in range.
    if (block.skip == kProjection) align(targets);
    if (network().plan.closed(block)) begin_closed(block, targets);
    for (int64_t u = block.module_end() - 1; u >= block.first_unit; --u) convolve(b, u, targets);
    if (block.skip != kProjection) align(targets);
    for (const SharedGradient& target : targets) target->from.reset();
  }

 private:
  using Element = typename Convolver::Element;
  using Group = std::vector<BatchGradient*>;

  const Network& network() const { return context_.network; }

  // Gives the gradients through the skip and through the module one power of two: the larger of theirs.
  static void align(const std::vector<SharedGradient>& targets) {
    for (const SharedGradient& target : targets) {
      const int32_t skip = target->a != 0.0f ? target->skip_from->exponent : 0;
      const int32_t residual = target->c != 0.0f ? target->from->exponent : 0;
      const bool neither = target->a == 0.0f && target->c == 0.0f;
      target->exponent = neither ? target->from->exponent : larger_exponent(target->a, skip, target->c, residual);
      target->a = times_power(target->a, int64_t(skip) - target->exponent);
      target->c = times_power(target->c, int64_t(residual) - target->exponent);
    }
  }

  void begin_closed(const Block& block, const std::vector<SharedGradient>& targets) {
    Group modules, projections;
    for (const SharedGradient& target : targets) {
      if (target->c != 0.0f) modules.push_back(target.get());
      if (target->a != 0.0f && block.skip == kProjection) projections.push_back(target.get());
    }
    begin_branches(block.module_end(), modules, &BatchGradient::from, &BatchGradient::means);
    begin_branches(block.projection_end(), projections, &BatchGradient::skip_from, &BatchGradient::skip_means);
    for (BatchGradient* target : modules) target->h = target->from->values;
  }

  // Computes the means at the BN of row u, which ends a branch; h is the gradient at the branch's output.
  void begin_branches(int64_t u, const Group& targets, SharedGradient BatchGradient::* source,
                      std::vector<float> BatchGradient::* means) {
    for (BatchGradient* target : targets) clear_sums(*target);
    context_.for_each(int64_t(targets.size()), [&](int, int64_t s, int64_t t) {
      const float* h = (targets[t]->*source)->values.get() + s * network().inputs[u].dense();
      norms_.add_sums(u, h, s, sums_of(*targets[t], s));
    });
    for (BatchGradient* target : targets) target->*means = norms_.means_of(u, target->sums);
  }

  void clear_sums(BatchGradient& target) const {
    target.sums.assign(context_.walk.batch * 2 * context_.channels, 0.0f);
  }

  float* sums_of(BatchGradient& target, int64_t s) const { return target.sums.data() + s * 2 * context_.channels; }

  // One unit of the block's module, for all targets that it reaches.
  void convolve(int64_t b, int64_t u, const std::vector<SharedGradient>& targets) {
    const Block& block = network().block(b);
    const bool last = u == block.module_end() - 1, first = u == block.first_unit;
    // The last unit's targets of one source go together: one thread then finishes the source.
    std::vector<Group> groups;
    for (const SharedGradient& target : targets) {
      if (target->c == 0.0f && !(first && block.skip == kProjection && target->a != 0.0f)) continue;
      if (last && !target->from->finished) finisher_.make_room(*target->from);
      target->h_next = context_.pool.get();
      clear_sums(*target);
      if (!groups.empty() && last && groups.back()[0]->from == target->from) {
        groups.back().push_back(target.get());
      } else {
        groups.push_back({target.get()});
      }
    }
    if (groups.empty()) return;
    convolve_groups(b, u, last, groups);
    if (last) {
      // If the source had left the range, recompute from the rescaled source. This happens every few dozen blocks.
      // The factors of two modules together then never have to fit into float32's range.
      std::vector<Group> again;
      for (const Group& group : groups) {
        if (!group[0]->from->finished && finisher_.conclude(*group[0]->from)) again.push_back(group);
      }
      for (const Group& group : again) {
        for (BatchGradient* target : group) std::fill(target->sums.begin(), target->sums.end(), 0.0f);
      }
      convolve_groups(b, u, last, again);
    }
    for (const Group& group : groups) {
      for (BatchGradient* target : group) {
        target->means = norms_.means_of(u, target->sums);
        target->h = std::move(target->h_next);
      }
    }
  }

  void convolve_groups(int64_t b, int64_t u, bool last, const std::vector<Group>& groups) {
    context_.for_each(int64_t(groups.size()), [&](int worker, int64_t s, int64_t g) {
      BatchGradient& source = *groups[g][0]->from;
      if (last && !source.finished) finisher_.finish_sample(source, s);
      for (BatchGradient* target : groups[g]) {
        context_.team.check();
        convolve_sample(worker, b, u, *target, s);
      }
    });
  }

  void convolve_sample(int worker, int64_t b, int64_t u, BatchGradient& target, int64_t s) {
    const Block& block = network().block(b);
    const bool last = u == block.module_end() - 1, closed = network().plan.closed(block);
    const bool joins = u == block.first_unit && block.skip == kProjection;
    const bool normalizes = network().unit(u).scale_offset >= 0;
    const Image image = without_border(network().inputs[u]);
    float* sums = sums_of(target, s);
    ReducedEpilogue epilogue = {image,
                                joins ? target.c : 1.0f,
                                false,
                                context_.bits(u, s),
                                context_.normalized(u, s),
                                target.h_next.get() + s * image.dense(),
                                normalizes ? sums : nullptr,
                                sums + context_.channels};
    const bool reads_gradient = last && !closed;  // and otherwise h
    look_ahead(u, reads_gradient ? *target.from : target, reads_gradient, s, epilogue);
    if (joins && target.a != 0.0f) {
      ReducedEpilogue skip = epilogue;
      skip.coefficient = target.a;
      if (target.c != 0.0f) skip.sums = nullptr;
      const Element* operand = closed ? norms_.operand(worker, block.projection_end(), target.skip_from->values.get(),
                                                       target.skip_means, s)
                                      : bordered(worker, b, *target.skip_from, s);
      Convolver::run(network().convolutions[block.projection_unit], context_.packed[block.projection_unit], &operand,
                     1, skip);
      epilogue.add = true;
    }
    if (target.c == 0.0f) return;
    const Element* operand = reads_gradient ? bordered(worker, b, *target.from, s)
                                            : norms_.operand(worker, u + 1, target.h.get(), target.means, s);
    Convolver::run(network().convolutions[u], context_.packed[u], &operand, 1, epilogue);
  }

  // Has the epilogue fetch h and the normalised inputs that the next sample's operand is computed from.
  void look_ahead(int64_t u, const BatchGradient& source, bool reads_gradient, int64_t s,
                  ReducedEpilogue& epilogue) const {
    const int64_t next = context_.next(s);
    if (next < 0 || next >= context_.walk.batch || !source.h) return;
    const int64_t unit = reads_gradient ? network().block(source.block).first_unit : u + 1;
    const int64_t size = network().inputs[unit].dense();
    if (size < epilogue.image.dense()) return;
    epilogue.ahead[0] = source.h.get() + next * size;
    epilogue.ahead[1] = context_.normalized(unit, next);
  }

  // A gradient at the block's output, as convolutions read it.
  const Element* bordered(int worker, int64_t b, const BatchGradient& gradient, int64_t s) {
    const Image& image = network().ends[b + 1];
    Element* operand = context_.benches[worker].inner(network().end_shape[b + 1], 0, 0, image);
    encode<Convolver>(without_border(image), gradient.values.get() + s * image.dense(), image, operand);
    return operand;
  }

  BackwardContext<Convolver>& context_;
  const BatchNormBackward<Convolver>& norms_;
  GradientFinisher<Convolver>& finisher_;
};

}  // namespace
}  // namespace PATHNET_ISA_NAMESPACE
}  // namespace pathnet::cpu
