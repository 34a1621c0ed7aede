// Walks gradients back, BN mode `batch`: behind each transposed convolution lie BN's two reductions over the batch.
//
// With h the gradient at a BN's output (masked by the ReLU bits), x its normalized input and N the values of a
// channel, the gradient at its input is scale * (h - sum(h) / N - x * sum(h x) / N). A convolution writes h and each
// sample's two sums; the next one makes the gradient from h and x as it reads them. So a convolution reads its
// gradient once and writes one, and x is read twice. While a sample is convolved, what the next one will read is
// fetched from memory: without it this mode takes 8 % longer in float32 and 17 % in bf16, on an AMD EPYC.
//
// Routings that agree from the walk's beginning on share that part of it: the walks of a tile are the nodes at one
// depth of their prefix tree.
//
// The sums by length are the same walk, of coefficients in place of routings: what comes through a block's skip and
// what comes through its module are then two gradients, of G_k and of G_{k-1}. From the highest on, a tile of them at
// a time is walked through the block and finished, so that what is held are n + 1 gradients and what a tile takes.
//
// In a closed block the gradient at its output is itself the one at the output of a BN, its h; so it is finished and
// summed up over the batch before the last convolution reads it. Before the first convolution there is no BN: what it
// writes is added to what comes through the skip, and masked with it.
#pragma once

#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "batch.h"
#include "large.h"

namespace pathnet::cpu {
namespace PATHNET_ISA_NAMESPACE {
namespace {

// Of the gradients of a tile of walks; memory does not grow with the number of routings.
constexpr int64_t kTileOfWalksBytes = int64_t(256) << 20;

// h = bits * (coefficient * sums) + the h that is there, where `add`; and its sums over the image.
struct Reduced {
  // Pixels of the same sample that are fetched before their turn.
  static constexpr int64_t kAhead = 64;

  const Image& image;
  float coefficient;
  bool add;
  const uint8_t* bits;
  const float* normalized;  // not read without sums
  float* h;
  float *sums, *products;  // [padded channels], of this sample; null where another convolution or no BN follows
  // What the next sample will read, fetched while this one computes; null for nothing.
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
      for (const float* own : ahead) {
        if (own) __builtin_prefetch(own + place, 0, 2);
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

template <class Convolver>
class BatchBackward {
 public:
  BatchBackward(const BackwardBatchWalk& job, const Team& team)
      : job_(job),
        team_(team),
        network_(make_network(job.plan, true, false)),
        packed_(network_, job.packed),
        starts_(normalized_starts(network_, job.batch)),
        routings_(job.routing, job.routings, job.plan.block_count, Direction::kBackward, team),
        benches_(network_, team.threads) {
    for (const auto* images : {&network_.ends, &network_.inputs}) {
      for (const Image& image : *images) {
        largest_ = std::max(largest_, image.dense());
        channels_ = std::max(channels_, image.padded());
      }
    }
  }

  void walk_routings() {
    // Before and behind a block, and two inside it.
    const int64_t bytes = 4 * job_.batch * largest_ * int64_t(sizeof(float));
    const int64_t tile = std::max<int64_t>(1, kTileOfWalksBytes / bytes);
    for (int64_t first = 0; first < routings_.count(); first += tile) {
      walk_tile(first, std::min(first + tile, routings_.count()));
    }
  }

  void walk_sums() {
    // Twice inside a block, and a third while one unit follows another.
    const int64_t bytes = 3 * job_.batch * largest_ * int64_t(sizeof(float));
    const int64_t tile = std::max<int64_t>(1, kTileOfWalksBytes / bytes);
    std::vector<Shared> sums = {start()};
    for (int64_t b = network_.plan.block_count - 1; b >= 0; --b) sums = step_sums(std::move(sums), b, tile);
    std::vector<Node> nodes;
    for (int64_t k = 0; k < int64_t(sums.size()); ++k) nodes.push_back({k, k + 1, sums[k]});
    finish(nodes, [](int64_t k) { return k; });
  }

 private:
  using Element = typename Convolver::Element;
  using Batch = std::shared_ptr<float>;

  // The batch's gradient at a block's input. It is unfinished until somebody reads it: what it is made of is known
  // with the block's last sums, and whoever reads a sample first makes it then, while it goes through the cache
  // anyway.
  struct Gradient {
    Batch values;
    int32_t exponent;
    std::vector<float> largest;  // of each sample
    bool zero = false;           // once it is finished
    // Until it is finished: values = a * skip(skip_from) + c * (what BN makes of h and its sums), h of `from`.
    bool finished = false;
    int64_t block = 0;  // whose input it is at
    std::shared_ptr<Gradient> from, skip_from;
    float a = 0.0f, c = 0.0f;
    Batch h, h_next;
    std::vector<float> sums;        // [sample][two][channels]
    std::vector<float> means;       // [two][channels]: sum(h) / N and sum(h x) / N
    std::vector<float> skip_means;  // the same behind a projection that a BN ends, whose h is the gradient itself
  };
  using Shared = std::shared_ptr<Gradient>;

  // The routings [first, last), which agree up to here.
  struct Node {
    int64_t first, last;
    Shared gradient;
  };

  Batch batch_of() {
    if (free_.empty()) {
      stock_.push_back(make_large(job_.batch * largest_));
      free_.push_back(stock_.back().get());
    }
    float* own = free_.back();
    free_.pop_back();
    return Batch(own, [this](float* values) { free_.push_back(values); });
  }

  // Every other step goes through the samples backwards, and finds the last of the step before in cache.
  template <class Work>
  void for_each(int64_t width, const Work& work) {
    backwards_ = !backwards_;
    for_each_sample(team_, job_.batch, width, [&](int worker, int64_t s, int64_t w) {
      const FlushDenormals flush;
      work(worker, backwards_ ? job_.batch - 1 - s : s, w);
    });
  }

  Shared start() {
    const Image end = without_border(network_.ends.back());
    const Shared start = std::make_shared<Gradient>();
    start->values = batch_of();
    start->exponent = job_.exponent;
    start->block = network_.plan.block_count;
    start->largest.resize(job_.batch);
    for_each(1, [&](int, int64_t s, int64_t) {
      float* own = start->values.get() + s * end.dense();
      std::fill_n(own, end.dense(), 0.0f);
      from_planes(end, job_.grad + s * end.channels * end.height * end.width, own);
      start->largest[s] = largest_in(own, end.dense());
    });
    conclude(*start);
    return start;
  }

  void walk_tile(int64_t first, int64_t last) {
    std::vector<Node> nodes = {{first, last, start()}};
    for (int64_t depth = 0; depth < network_.plan.block_count; ++depth) nodes = step(nodes, depth);
    finish(nodes, [&](int64_t position) { return routings_.routing(position); });
  }

  std::vector<Node> step(const std::vector<Node>& nodes, int64_t depth) {
    const int64_t b = network_.plan.block_count - 1 - depth;
    const Block& block = network_.block(b);
    std::vector<Node> next;
    std::vector<Shared> ways;
    bool unfinished = false;
    for (const Node& node : nodes) {
      for (int64_t begin = node.first, end; begin < node.last; begin = end) {
        for (end = begin + 1; end < node.last && routings_.agree(begin, end, depth);) ++end;
        const float* own = routings_.coefficients(begin, depth);
        if (block.skip == kIdentity && own[0] == 1.0f && own[1] == 0.0f) {
          next.push_back({begin, end, node.gradient});
          continue;
        }
        ways.push_back(std::make_shared<Gradient>());
        next.push_back({begin, end, ways.back()});
        Gradient& way = *ways.back();
        way.from = way.skip_from = node.gradient;
        way.block = b;
        way.a = own[0];
        way.c = own[1];
        unfinished = unfinished || block.skip != kIdentity || way.c == 0.0f || network_.plan.closed(block);
      }
    }
    if (ways.empty()) return next;
    // An identity block's last convolution finishes what it reads; everything else needs it before.
    if (unfinished) {
      std::vector<Shared> sources;
      for (const Shared& way : ways) sources.push_back(way->from);
      finish_all(sources);
    }
    walk_block(b, ways);
    return next;
  }

  // From the coefficients at a block's output to those at its input, one more.
  std::vector<Shared> step_sums(std::vector<Shared> sums, int64_t b, int64_t tile) {
    const float a = job_.routing[2 * b], c = job_.routing[2 * b + 1];
    const int64_t top = int64_t(sums.size());
    std::vector<Shared> next(top + 1);
    for (int64_t last = top; last >= 0; last -= tile) {
      std::vector<Shared> ways;
      for (int64_t k = last; k > last - tile && k >= 0; --k) {
        next[k] = std::make_shared<Gradient>();
        Gradient& way = *next[k];
        way.block = b;
        way.a = k < top && !sums[k]->zero ? a : 0.0f;
        way.c = k > 0 && !sums[k - 1]->zero ? c : 0.0f;
        way.from = sums[std::max<int64_t>(k - 1, 0)];
        way.skip_from = k < top ? std::move(sums[k]) : way.from;
        ways.push_back(next[k]);
      }
      walk_block(b, ways);
      finish_all(ways);
    }
    return next;
  }

  void walk_block(int64_t b, const std::vector<Shared>& ways) {
    const Block& block = network_.block(b);
    // A projection's share is added to the module's with the last sums; others wait until the gradient is finished,
    // by when those that it comes from have been brought back into range.
    if (block.skip == kProjection) align(ways);
    if (network_.plan.closed(block)) begin_closed(block, ways);
    for (int64_t u = block.first_unit + block.unit_count - 1; u >= block.first_unit; --u) convolve(b, u, ways);
    if (block.skip != kProjection) align(ways);
    for (const Shared& way : ways) way->from.reset();
  }

  void begin_closed(const Block& block, const std::vector<Shared>& ways) {
    std::vector<Gradient*> modules, projections;
    for (const Shared& way : ways) {
      if (way->c != 0.0f) modules.push_back(way.get());
      if (way->a != 0.0f && block.skip == kProjection) projections.push_back(way.get());
    }
    begin_branches(block.module_end(), modules, &Gradient::from, &Gradient::means);
    begin_branches(block.projection_end(), projections, &Gradient::skip_from, &Gradient::skip_means);
    for (Gradient* way : modules) way->h = way->from->values;
  }

  // The means at the BN of row u, which ends a branch; h is the gradient that the branch is given.
  void begin_branches(int64_t u, const std::vector<Gradient*>& ways, Shared Gradient::* given,
                      std::vector<float> Gradient::* means) {
    for (Gradient* way : ways) way->sums.assign(job_.batch * 2 * channels_, 0.0f);
    for_each(int64_t(ways.size()), [&](int, int64_t s, int64_t w) {
      const Image& image = network_.inputs[u];
      const float* h = (ways[w]->*given)->values.get() + s * image.dense();
      const float* x = job_.normalized + starts_[u] + s * image.dense();
      float* sums = ways[w]->sums.data() + s * 2 * channels_;
      for (int64_t row = 0; row < image.dense(); row += image.width * image.padded()) {
        for (int64_t c = 0; c < image.padded(); c += kLanes) {
          Vector sum = splat(0.0f), product = splat(0.0f);
          for (int64_t j = row + c; j < row + image.width * image.padded(); j += image.padded()) {
            sum = sum + load(h + j);
            product = multiply_add(load(h + j), load(x + j), product);
          }
          store(sums + c, load(sums + c) + sum);
          store(sums + channels_ + c, load(sums + channels_ + c) + product);
        }
      }
    });
    for (Gradient* way : ways) (way->*means) = means_of(u, way->sums);
  }

  std::vector<float> means_of(int64_t u, const std::vector<float>& sums) const {
    const double count = double(job_.batch * network_.inputs[u].height * network_.inputs[u].width);
    std::vector<float> means(2 * channels_);
    for (int64_t i = 0; i < 2 * channels_; ++i) {
      double sum = 0;
      for (int64_t s = 0; s < job_.batch; ++s) sum += sums[s * 2 * channels_ + i];
      means[i] = float(sum / count);
    }
    return means;
  }

  // One power of two for what comes through the skip and through the module: the larger of the two.
  static void align(const std::vector<Shared>& ways) {
    for (const Shared& way : ways) {
      const int32_t skip = way->a != 0.0f ? way->skip_from->exponent : 0;
      const int32_t residual = way->c != 0.0f ? way->from->exponent : 0;
      const bool neither = way->a == 0.0f && way->c == 0.0f;
      way->exponent = neither ? way->from->exponent : larger_exponent(way->a, skip, way->c, residual);
      way->a = times_power(way->a, int64_t(skip) - way->exponent);
      way->c = times_power(way->c, int64_t(residual) - way->exponent);
    }
  }

  // Those of the gradients that are not yet, each once.
  void finish_all(const std::vector<Shared>& gradients) {
    std::vector<Shared> own;
    for (const Shared& gradient : gradients) {
      if (!gradient->finished && std::find(own.begin(), own.end(), gradient) == own.end()) own.push_back(gradient);
    }
    for (const Shared& gradient : own) make_room(*gradient);
    for_each(int64_t(own.size()), [&](int, int64_t s, int64_t g) { finish_sample(*own[g], s); });
    for (const Shared& gradient : own) conclude(*gradient);
  }

  // One unit of the block's module, for all ways that take it.
  void convolve(int64_t b, int64_t u, const std::vector<Shared>& ways) {
    const Block& block = network_.block(b);
    const bool last = u == block.first_unit + block.unit_count - 1, first = u == block.first_unit;
    // Ways from one gradient go together where they read it, so that one thread finishes it.
    std::vector<std::vector<Gradient*>> groups;
    for (const Shared& way : ways) {
      if (way->c == 0.0f && !(first && block.skip == kProjection && way->a != 0.0f)) continue;
      if (last && !way->from->finished) make_room(*way->from);
      way->h_next = batch_of();
      way->sums.assign(job_.batch * 2 * channels_, 0.0f);
      if (!groups.empty() && last && groups.back()[0]->from == way->from) {
        groups.back().push_back(way.get());
      } else {
        groups.push_back({way.get()});
      }
    }
    if (groups.empty()) return;
    const auto take = [&](const std::vector<std::vector<Gradient*>>& some) {
      for_each(int64_t(some.size()), [&](int worker, int64_t s, int64_t g) {
        Gradient& source = *some[g][0]->from;
        if (last && !source.finished) finish_sample(source, s);
        for (Gradient* way : some[g]) {
          team_.check();
          convolve_sample(worker, b, u, *way, s);
        }
      });
    };
    take(groups);
    if (last) {
      // What was made of a gradient before it was brought back into range is made again: it happens every few dozen
      // blocks, and so two modules never have to fit into float32 at once.
      std::vector<std::vector<Gradient*>> again;
      for (const auto& group : groups) {
        if (!group[0]->from->finished && conclude(*group[0]->from)) again.push_back(group);
      }
      for (const auto& group : again) {
        for (Gradient* way : group) std::fill(way->sums.begin(), way->sums.end(), 0.0f);
      }
      take(again);
    }
    for (const auto& group : groups) {
      for (Gradient* way : group) {
        way->means = means_of(u, way->sums);
        way->h = std::move(way->h_next);
      }
    }
  }

  void convolve_sample(int worker, int64_t b, int64_t u, Gradient& way, int64_t s) {
    const Block& block = network_.block(b);
    const bool last = u == block.first_unit + block.unit_count - 1;
    const bool joins = u == block.first_unit && block.skip == kProjection, closed = network_.plan.closed(block);
    const bool normalizes = network_.unit(u).scale_offset >= 0;
    const Image image = without_border(network_.inputs[u]);
    float* sums = way.sums.data() + s * 2 * channels_;
    Reduced reduced = {image,
                       joins ? way.c : 1.0f,
                       false,
                       bits(u, s),
                       job_.normalized + starts_[u] + s * image.dense(),
                       way.h_next.get() + s * image.dense(),
                       normalizes ? sums : nullptr,
                       sums + channels_};
    const bool whole = last && !closed;  // whether what is read is a gradient, and no h
    look_ahead(u, whole ? *way.from : way, whole, s, reduced);
    if (joins && way.a != 0.0f) {
      Reduced skip = reduced;
      skip.coefficient = way.a;
      if (way.c != 0.0f) skip.sums = nullptr;
      const Element* operand =
          closed ? normalized(worker, block.projection_end(), way.skip_from->values.get(), way.skip_means, s)
                 : bordered(worker, b, *way.skip_from, s);
      Convolver::run(network_.convolutions[block.projection_unit], packed_[block.projection_unit], &operand, 1, skip);
      reduced.add = true;
    }
    if (way.c == 0.0f) return;
    const Element* operand =
        whole ? bordered(worker, b, *way.from, s) : normalized(worker, u + 1, way.h.get(), way.means, s);
    Convolver::run(network_.convolutions[u], packed_[u], &operand, 1, reduced);
  }

  // What `normalized`, or `finish_sample`, will read of the next sample: h and what BN made of its input.
  void look_ahead(int64_t u, const Gradient& source, bool whole, int64_t s, Reduced& reduced) {
    const int64_t next = backwards_ ? s - 1 : s + 1;
    if (next < 0 || next >= job_.batch || !source.h) return;
    const int64_t unit = whole ? network_.block(source.block).first_unit : u + 1;
    const int64_t size = network_.inputs[unit].dense();
    if (size < reduced.image.dense()) return;
    reduced.ahead[0] = source.h.get() + next * size;
    reduced.ahead[1] = job_.normalized + starts_[unit] + next * size;
  }

  // A gradient at the block's output, as convolutions read it.
  const Element* bordered(int worker, int64_t b, const Gradient& gradient, int64_t s) {
    const Image& image = network_.ends[b + 1];
    Element* operand = benches_[worker].inner(network_.end_shape[b + 1], 0, 0, image);
    encode<Convolver>(without_border(image), gradient.values.get() + s * image.dense(), image, operand);
    return operand;
  }

  const uint8_t* bits(int64_t u, int64_t s) const {
    return network_.bits(u, job_.plan.relu_bits + s * network_.plan.bits_stride);
  }

  // The gradient at the input of unit u's BN, as the convolution before it reads it; of the whole batch's h.
  const Element* normalized(int worker, int64_t u, const float* h, const std::vector<float>& means, int64_t s) {
    const Image& image = network_.inputs[u];
    Element* operand = benches_[worker].inner(network_.input_shape[u], 0, 1, image);
    const int64_t channels = Convolver::operand_channels(image), plane = operand_plane<Convolver>(image);
    normalization_backward(u, h, means, s, [&](int64_t, int64_t pixel, int64_t channel, Vector value) {
      Convolver::put(operand + pixel * channels + channel, plane, value);
    });
    return operand;
  }

  // Calls then(element, bordered pixel, channel, gradient at the input of unit u's BN), from h and its means.
  template <class Then>
  void normalization_backward(int64_t u, const float* h, const std::vector<float>& means, int64_t s,
                              const Then& then) {
    const Image& image = network_.inputs[u];
    const int64_t padded = image.padded();
    h += s * image.dense();
    const float* x = job_.normalized + starts_[u] + s * image.dense();
    const float* scales = job_.plan.scales + network_.unit(u).scale_offset;
    // The inner loop is over pixels, whose channels have their factors in registers.
    alignas(64) float factors[kLanes];
    for (int64_t y = 0; y < image.height; ++y) {
      for (int64_t c = 0; c < padded; c += kLanes) {
        std::fill_n(factors, kLanes, 0.0f);
        std::copy_n(scales + c, std::min<int64_t>(kLanes, std::max<int64_t>(0, image.channels - c)), factors);
        const Vector scale = load(factors);
        const Vector mean = load(means.data() + c), slope = load(means.data() + channels_ + c);
        const int64_t first = image.pixel(y, 0);
        for (int64_t i = 0; i < image.width; ++i) {
          const int64_t j = (y * image.width + i) * padded + c;
          const Vector centred = load(h + j) - mean;
          then(j, first + i, c, scale * (centred - load(x + j) * slope));
        }
      }
    }
  }

  // For the values, before the first sample is finished: in place of those before the block, where nobody else wants
  // them.
  void make_room(Gradient& gradient) {
    if (gradient.values) return;
    const bool alone = gradient.skip_from.use_count() == 1 && network_.block(gradient.block).skips_by_identity();
    gradient.values = alone ? gradient.skip_from->values : batch_of();
    gradient.largest.resize(job_.batch);
  }

  void finish_sample(Gradient& gradient, int64_t s) {
    const int64_t b = gradient.block;
    const Block& block = network_.block(b);
    const Image from = without_border(network_.ends[b + 1]), to = without_border(network_.ends[b]);
    float* own = gradient.values.get() + s * to.dense();
    const float* source = gradient.skip_from->values.get() + s * from.dense();
    // A projection's gradient and the module's are added up with their factors in h.
    const Vector a = splat(gradient.a), c = splat(block.skip == kProjection ? 1.0f : gradient.c);
    Vector most = splat(0.0f);
    const auto put = [&](int64_t j, Vector value) {
      most = maximum(most, magnitude(value));
      store(own + j, value);
    };
    // What the skip gives stands in `old`; an identity's is the source itself.
    const float* old = source;
    Vector old_factor = a;
    if (!block.skips_by_identity()) {
      pad(from, to, network_.stride(block), true, block.skips_by_padding() ? gradient.a : 0.0f, source, own);
      old = own;
      old_factor = splat(1.0f);
    } else if (gradient.a == 0.0f) {
      std::fill_n(own, to.dense(), 0.0f);
      old = own;
    }
    if (network_.plan.closed(block)) {
      const float* h = gradient.h ? gradient.h.get() + s * to.dense() : nullptr;
      const uint8_t* mask = bits(block.first_unit, s);
      for (int64_t j = 0; j < to.dense(); j += to.padded(), mask += to.groups() * 2) {
        for (int64_t channel = 0; channel < to.padded(); channel += kLanes) {
          Vector value = old_factor * load(old + j + channel);
          if (h) value = multiply_add(c, load(h + j + channel), value);
          put(j + channel, keep(value, read_bits(mask, channel)));
        }
      }
    } else if (gradient.h) {
      normalization_backward(block.first_unit, gradient.h.get(), gradient.means, s,
                             [&](int64_t j, int64_t, int64_t, Vector value) {
                               put(j, multiply_add(old_factor, load(old + j), c * value));
                             });
    } else {
      for (int64_t j = 0; j < to.dense(); j += kLanes) put(j, old_factor * load(old + j));
    }
    gradient.largest[s] = largest_lane(most);
  }

  // After the last sample: whether the gradient had left the range, into which a power of two brings it back.
  bool conclude(Gradient& gradient) {
    constexpr float kLeast = 0x1p-30f, kMost = 0x1p30f;
    gradient.finished = true;
    gradient.skip_from.reset();
    gradient.h.reset();
    float most = 0.0f;
    for (float own : gradient.largest) most = std::max(most, own);
    gradient.zero = most == 0.0f && all_zero(gradient.values.get(),
                                             job_.batch * without_border(network_.ends[gradient.block]).dense());
    if (!(most > 0.0f) || !std::isfinite(most) || (most >= kLeast && most <= kMost)) return false;
    int power;
    std::frexp(most, &power);
    gradient.exponent += power;
    // In two factors, since 2^-power can leave the range of float32 where the result does not.
    const Vector half = splat(std::ldexp(1.0f, -power / 2)), rest = splat(std::ldexp(1.0f, -power - (-power / 2)));
    const int64_t size = network_.ends[gradient.block].dense();
    for_each(1, [&](int, int64_t s, int64_t) {
      float* own = gradient.values.get() + s * size;
      for (int64_t j = 0; j < size; j += kLanes) store(own + j, load(own + j) * half * rest);
    });
    return true;
  }

  // place(position) of a node is where its result goes.
  template <class Place>
  void finish(const std::vector<Node>& nodes, const Place& place) {
    const Image image = without_border(network_.ends[0]);
    const int64_t size = image.channels * image.height * image.width;
    std::vector<Shared> gradients;
    for (const Node& node : nodes) gradients.push_back(node.gradient);
    finish_all(gradients);
    for_each(int64_t(nodes.size()), [&](int, int64_t s, int64_t n) {
      const Gradient& gradient = *nodes[n].gradient;
      const float* own = gradient.values.get() + s * image.dense();
      const double norm = std::ldexp(std::sqrt(sum_of_squares(image, own)), gradient.exponent);
      for (int64_t p = nodes[n].first; p < nodes[n].last; ++p) {
        const int64_t result = place(p) * job_.batch + s;
        job_.norms[result] = norm;
        if (job_.grad_input) to_planes(image, own, job_.grad_input + result * size);
      }
    });
    if (job_.exponent_input == nullptr) return;
    for (const Node& node : nodes) {
      for (int64_t p = node.first; p < node.last; ++p) {
        job_.exponent_input[place(p)] = node.gradient->exponent;
      }
    }
  }

  const BackwardBatchWalk& job_;
  const Team& team_;
  const Network network_;
  const Packed<Convolver> packed_;
  const std::vector<int64_t> starts_;
  const Routings routings_;
  Benches<Convolver> benches_;
  // Recycled, since fresh memory costs as much as a convolution; declared before whatever gives back to it.
  std::vector<Large> stock_;
  std::vector<float*> free_;
  int64_t largest_ = 0, channels_ = 0;
  bool backwards_ = false;
};

template <class Convolver>
void walk_backward_batch(const BackwardBatchWalk& job, const Team& team) {
  BatchBackward<Convolver>(job, team).walk_routings();
}

template <class Convolver>
void walk_sums_by_length_batch(const BackwardBatchWalk& job, const Team& team) {
  BatchBackward<Convolver>(job, team).walk_sums();
}

}  // namespace
}  // namespace PATHNET_ISA_NAMESPACE
}  // namespace pathnet::cpu
