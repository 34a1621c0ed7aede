// Walks gradients back, BN mode `batch`: behind each transposed convolution lie BN's two reductions over the batch.
//
// With h the gradient at a BN's output (masked by the ReLU bits), x its normalized input and N the values of a
// channel, the gradient at its input is scale * (h - sum(h) / N - x * sum(h x) / N). A convolution writes h and each
// sample's two sums; the next one makes the gradient from h and x as it reads them. So a convolution reads its
// gradient once and writes one, and x is read twice: with the walks of a tile (see kTileBytes) side by side on each
// sample, from cache.
//
// Routings that agree from the walk's beginning on share that part of it: the walks of a tile are the nodes at one
// depth of their prefix tree.
#pragma once

#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "batch.h"

namespace pathnet {
namespace PATHNET_ISA_NAMESPACE {
namespace {

// Of the gradients of a tile of walks; memory does not grow with the number of routings.
constexpr int64_t kTileOfWalksBytes = int64_t(256) << 20;

// h = bits * (coefficient * sums) + the h that is there, where `add`; and its sums over the image.
struct Reduced {
  const Image& image;
  float coefficient;
  bool add;
  const uint8_t* bits;
  const float* normalized;
  float* h;
  double *sums, *products;  // [padded channels]; null where another convolution follows

  void operator()(int64_t, int64_t y, int64_t x, int64_t step, int64_t count, int64_t channel, int vectors,
                  const float* values) const {
    const int64_t padded = image.padded(), pixel_bytes = image.groups() * 2;
    const Vector c = splat(coefficient);
    for (int v = 0; v < vectors; ++v) {
      const int64_t own = channel + v * kLanes;
      Vector sum = splat(0.0f), product = splat(0.0f);
      Pixels at(image, y, x, step);
      for (int64_t i = 0; i < count; ++i, at.next()) {
        const int64_t place = at.dense * padded + own;
        Vector value =
            keep(c * load(values + (i * vectors + v) * kLanes), read_bits(bits + at.dense * pixel_bytes, own));
        if (add) value = value + load(h + place);
        store(h + place, value);
        if (!sums) continue;
        sum = sum + value;
        product = multiply_add(value, load(normalized + place), product);
      }
      if (!sums) continue;
      add_row(sums + own, sum);
      add_row(products + own, product);
    }
  }
};

template <class Convolver>
class BatchBackward {
 public:
  BatchBackward(const BatchBackwardWalk& job, const Team& team)
      : job_(job),
        team_(team),
        network_(make_network(job.plan, true, false)),
        packed_(network_, job.packed),
        starts_(normalized_starts(network_, job.batch)),
        routings_(job.routing, job.routings, job.plan.block_count, Direction::kBackward),
        benches_(network_, team.threads) {
    for (const auto* images : {&network_.ends, &network_.inputs}) {
      for (const Image& image : *images) {
        largest_ = std::max(largest_, image.dense());
        channels_ = std::max(channels_, image.padded());
      }
    }
  }

  void walk() {
    // Before and behind a block, and two inside it.
    const int64_t bytes = 4 * job_.batch * largest_ * int64_t(sizeof(float));
    const int64_t tile = std::max<int64_t>(1, kTileOfWalksBytes / bytes);
    for (int64_t first = 0; first < routings_.count(); first += tile) {
      walk_tile(first, std::min(first + tile, routings_.count()));
    }
  }

 private:
  using Element = typename Convolver::Element;
  using Batch = std::shared_ptr<std::vector<float>>;

  // The routings [first, last), which agree up to here, and their gradient.
  struct Node {
    int64_t first, last;
    Batch grad;
    int32_t exponent;
  };

  // A node's way through one block.
  struct Way {
    const Node* from;
    float a, c;
    Batch h, h_next, grad;
    std::vector<double> sums;    // [sample][two][channels]
    std::vector<float> means;    // [two][channels]: sum(h) / N and sum(h x) / N
    std::vector<float> largest;  // [sample]
  };

  Batch batch_of(const Image& image) {
    // Recycled, since fresh memory costs as much as a convolution.
    Batch made;
    if (free_.empty()) {
      made = std::make_shared<std::vector<float>>(job_.batch * largest_);
    } else {
      made = free_.back();
      free_.pop_back();
    }
    (void)image;
    return made;
  }

  void recycle(Batch& batch) {
    if (batch && batch.use_count() == 1) free_.push_back(std::move(batch));
    batch.reset();
  }

  void walk_tile(int64_t first, int64_t last) {
    const int64_t blocks = network_.plan.block_count;
    const Image end = without_border(network_.ends.back());
    std::vector<Node> nodes = {{first, last, batch_of(end), job_.exponent}};
    std::vector<float> largest(job_.batch);
    for_each_sample(team_, job_.batch, 1, [&](int, int64_t s, int64_t) {
      float* own = nodes[0].grad->data() + s * end.dense();
      std::fill_n(own, end.dense(), 0.0f);
      from_planes(end, job_.grad + s * end.channels * end.height * end.width, own);
      largest[s] = largest_in(own, end.dense());
    });
    settle(nodes[0], largest, end);
    for (int64_t depth = 0; depth < blocks; ++depth) nodes = step(nodes, depth);
    for (Node& node : nodes) finish(node);
  }

  std::vector<Node> step(std::vector<Node>& nodes, int64_t depth) {
    const int64_t b = network_.plan.block_count - 1 - depth;
    const Block& block = network_.block(b);
    std::vector<Node> next;
    std::vector<Way> ways;
    std::vector<size_t> places;
    for (const Node& node : nodes) {
      for (int64_t begin = node.first, end; begin < node.last; begin = end) {
        for (end = begin + 1; end < node.last && routings_.agree(begin, end, depth);) ++end;
        const float* own = routings_.coefficients(begin, depth);
        next.push_back({begin, end, nullptr, node.exponent});
        if (block.skip == kIdentity && own[0] == 1.0f && own[1] == 0.0f) {
          next.back().grad = node.grad;
        } else {
          places.push_back(next.size() - 1);
          ways.push_back({&node, own[0], own[1], {}, {}, {}, {}, {}, {}});
        }
      }
    }
    if (!ways.empty()) {
      through(b, ways);
      for (size_t w = 0; w < ways.size(); ++w) {
        next[places[w]].grad = std::move(ways[w].grad);
        settle(next[places[w]], ways[w].largest, without_border(network_.ends[b]));
      }
    }
    for (Node& node : nodes) recycle(node.grad);
    return next;
  }

  void through(int64_t b, std::vector<Way>& ways) {
    const Block& block = network_.block(b);
    for (Way& way : ways) {
      way.grad = batch_of(network_.ends[b]);
      way.largest.resize(job_.batch);
      way.sums.resize(job_.batch * 2 * channels_);
      way.means.resize(2 * channels_);
    }
    for (int64_t u = block.first_unit + block.unit_count - 1; u >= block.first_unit; --u) convolve(b, u, ways);
    const Image from = without_border(network_.ends[b + 1]), to = without_border(network_.ends[b]);
    for_each_sample(team_, job_.batch, int64_t(ways.size()), [&](int, int64_t s, int64_t w) {
      Way& way = ways[w];
      float* own = way.grad->data() + s * to.dense();
      const float* grad = way.from->grad->data() + s * from.dense();
      if (block.skip == kIdentity) {
        for (int64_t j = 0; j < to.dense(); j += kLanes) {
          store(own + j, way.a == 0.0f ? splat(0.0f) : splat(way.a) * load(grad + j));
        }
      } else {
        pad(from, to, network_.stride(block), true, block.skip == kPad ? way.a : 0.0f, grad, own);
      }
      if (way.h) {
        const float c = block.skip == kProjection ? 1.0f : way.c;
        normalization_backward(block.first_unit, way, s, [&](int64_t j, Vector value) {
          store(own + j, multiply_add(splat(c), value, load(own + j)));
        });
      }
      way.largest[s] = largest_in(own, to.dense());
    });
    for (Way& way : ways) recycle(way.h);
  }

  // One unit of the block's module, for all ways that take it.
  void convolve(int64_t b, int64_t u, std::vector<Way>& ways) {
    const Block& block = network_.block(b);
    const bool last = u == block.first_unit + block.unit_count - 1, first = u == block.first_unit;
    std::vector<Way*> own;
    for (Way& way : ways) {
      if (way.c == 0.0f && !(first && block.skip == kProjection && way.a != 0.0f)) continue;
      own.push_back(&way);
      way.h_next = batch_of(network_.inputs[u]);
      std::fill(way.sums.begin(), way.sums.end(), 0.0);
    }
    if (own.empty()) return;
    const Image image = without_border(network_.inputs[u]);
    for_each_sample(team_, job_.batch, int64_t(own.size()), [&](int worker, int64_t s, int64_t w) {
      Way& way = *own[w];
      double* sums = way.sums.data() + s * 2 * channels_;
      Reduced reduced = {image,
                         first && block.skip == kProjection ? way.c : 1.0f,
                         false,
                         job_.plan.relu_bits + s * network_.plan.bits_stride + network_.unit(u).bits_offset,
                         job_.normalized + starts_[u] + s * image.dense(),
                         way.h_next->data() + s * image.dense(),
                         sums,
                         sums + channels_};
      if (first && block.skip == kProjection && way.a != 0.0f) {
        Reduced skip = reduced;
        skip.coefficient = way.a;
        if (way.c != 0.0f) skip.sums = nullptr;
        const Element* operand = bordered(worker, b, way, s);
        Convolver::run(network_.convolutions[block.projection_unit], packed_[block.projection_unit], &operand, 1,
                       skip);
        reduced.add = true;
      }
      if (way.c == 0.0f) return;
      const Element* operand = last ? bordered(worker, b, way, s) : normalized(worker, u + 1, way, s);
      Convolver::run(network_.convolutions[u], packed_[u], &operand, 1, reduced);
    });
    const double count = double(job_.batch * image.height * image.width);
    for (Way* way : own) {
      for (int64_t i = 0; i < 2 * channels_; ++i) {
        double sum = 0;
        for (int64_t s = 0; s < job_.batch; ++s) sum += way->sums[s * 2 * channels_ + i];
        way->means[i] = float(sum / count);
      }
      recycle(way->h);
      std::swap(way->h, way->h_next);
    }
  }

  // The gradient at the block's output, as convolutions read it.
  const Element* bordered(int worker, int64_t b, const Way& way, int64_t s) {
    const Image& image = network_.ends[b + 1];
    Element* operand = benches_[worker].inner(network_.end_shape[b + 1], 0, 0, image);
    const float* grad = way.from->grad->data() + s * image.dense();
    encode(image, operand, [&](int64_t j) { return load(grad + j); });
    return operand;
  }

  // The gradient at the input of unit u's BN, as the convolution before it reads it.
  const Element* normalized(int worker, int64_t u, const Way& way, int64_t s) {
    const Image& image = network_.inputs[u];
    Element* operand = benches_[worker].inner(network_.input_shape[u], 0, 1, image);
    const int64_t channels = Convolver::operand_channels(image), plane = operand_plane<Convolver>(image);
    const int64_t padded = image.padded();
    int64_t pixel = 0, x = 0, y = 0;
    (void)pixel;
    normalization_backward(u, way, s, [&](int64_t j, Vector value) {
      const int64_t at = j / padded;
      y = at / image.width;
      x = at % image.width;
      Convolver::put(operand + image.pixel(y, x) * channels + j % padded, plane, value);
    });
    return operand;
  }

  template <class Value>
  void encode(const Image& image, Element* operand, const Value& value) {
    const int64_t channels = Convolver::operand_channels(image), plane = operand_plane<Convolver>(image);
    int64_t j = 0;
    for (int64_t y = 0; y < image.height; ++y) {
      Element* row = operand + image.pixel(y, 0) * channels;
      for (int64_t x = 0; x < image.width; ++x, row += channels) {
        for (int64_t c = 0; c < image.padded(); c += kLanes, j += kLanes) Convolver::put(row + c, plane, value(j));
      }
    }
  }

  // Calls then(element, gradient at the input of unit u's BN) from h and its sums.
  template <class Then>
  void normalization_backward(int64_t u, const Way& way, int64_t s, const Then& then) {
    const Image& image = network_.inputs[u];
    const int64_t padded = image.padded();
    const float* h = way.h->data() + s * image.dense();
    const float* x = job_.normalized + starts_[u] + s * image.dense();
    const float* scales = job_.plan.scales + network_.unit(u).scale_offset;
    std::vector<float> own(padded);
    std::copy_n(scales, image.channels, own.data());
    for (int64_t j = 0; j < image.dense(); j += padded) {
      for (int64_t c = 0; c < padded; c += kLanes) {
        const Vector mean = load(way.means.data() + c), slope = load(way.means.data() + channels_ + c);
        const Vector centred = load(h + j + c) - mean;
        then(j + c, load(own.data() + c) * (centred - load(x + j + c) * slope));
      }
    }
  }

  static float largest_in(const float* values, int64_t size) {
    Vector most = splat(0.0f);
    for (int64_t j = 0; j < size; j += kLanes) most = maximum(most, magnitude(load(values + j)));
    return largest_lane(most);
  }

  // Brings a gradient back whose largest element has left the range.
  void settle(Node& node, const std::vector<float>& largest, const Image& image) {
    constexpr float kLeast = 0x1p-20f, kMost = 0x1p20f;
    float most = 0.0f;
    for (float own : largest) most = std::max(most, own);
    if (!(most > 0.0f) || !std::isfinite(most) || (most >= kLeast && most <= kMost)) return;
    int power;
    std::frexp(most, &power);
    node.exponent += power;
    const Vector half = splat(std::ldexp(1.0f, -power / 2)), rest = splat(std::ldexp(1.0f, -power - (-power / 2)));
    for_each_sample(team_, job_.batch, 1, [&](int, int64_t s, int64_t) {
      float* own = node.grad->data() + s * image.dense();
      for (int64_t j = 0; j < image.dense(); j += kLanes) store(own + j, load(own + j) * half * rest);
    });
  }

  void finish(const Node& node) {
    const Image image = without_border(network_.ends[0]);
    const int64_t size = image.channels * image.height * image.width;
    for_each_sample(team_, job_.batch, 1, [&](int, int64_t s, int64_t) {
      const float* own = node.grad->data() + s * image.dense();
      const double norm = std::ldexp(std::sqrt(sum_of_squares(image, own)), node.exponent);
      for (int64_t p = node.first; p < node.last; ++p) {
        const int64_t routing = routings_.routing(p);
        job_.norms[routing * job_.batch + s] = norm;
        if (job_.grad_input) to_planes(image, own, job_.grad_input + (routing * job_.batch + s) * size);
      }
    });
    if (job_.exponent_input == nullptr) return;
    for (int64_t p = node.first; p < node.last; ++p) job_.exponent_input[routings_.routing(p)] = node.exponent;
  }

  const BatchBackwardWalk& job_;
  const Team& team_;
  const Network network_;
  const Packed<Convolver> packed_;
  const std::vector<int64_t> starts_;
  const Routings routings_;
  Benches<Convolver> benches_;
  std::vector<Batch> free_;
  int64_t largest_ = 0, channels_ = 0;
};

template <class Convolver>
void walk_batch_backward(const BatchBackwardWalk& job, const Team& team) {
  BatchBackward<Convolver>(job, team).walk();
}

}  // namespace
}  // namespace PATHNET_ISA_NAMESPACE
}  // namespace pathnet
