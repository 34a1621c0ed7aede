// Routings, visited depth first along the prefix tree of their coefficients in the order of the pass: those that
// agree on the first blocks run together until they part.
//
// At a fork the walker saves its state once, and restores it for every branch but the first. The branch with most
// routings comes last and frees the saved state, so there are never more states than log2(routings).
#pragma once

#include <algorithm>
#include <cstring>
#include <numeric>
#include <vector>

#include "../kernels.h"
#include "../layout.h"

namespace pathnet::cpu {
namespace PATHNET_ISA_NAMESPACE {
namespace {

class Routings {
 public:
  Routings(const float* routing, int64_t count, int64_t blocks, Direction direction, const Team& team)
      : routing_(routing), blocks_(blocks), direction_(direction), order_(count) {
    std::iota(order_.begin(), order_.end(), int64_t(0));
    std::sort(order_.begin(), order_.end(), [&](int64_t one, int64_t other) {
      team.check();  // For a million routings, sorting takes seconds.
      for (int64_t depth = 0; depth < blocks_; ++depth) {
        const uint64_t one_key = key(one, depth), other_key = key(other, depth);
        if (one_key != other_key) return one_key < other_key;
      }
      return one < other;
    });
  }

  int64_t count() const { return int64_t(order_.size()); }
  int64_t blocks() const { return blocks_; }
  int64_t block(int64_t depth) const { return direction_ == Direction::kForward ? depth : blocks_ - 1 - depth; }
  int64_t routing(int64_t position) const { return order_[position]; }

  // The coefficients (a, c) of the block at a depth of the tree.
  const float* coefficients(int64_t position, int64_t depth) const {
    return routing_ + (order_[position] * blocks_ + block(depth)) * 2;
  }

  // Returns whether the routings at two positions agree at a depth.
  bool agree(int64_t one, int64_t other, int64_t depth) const {
    return key(order_[one], depth) == key(order_[other], depth);
  }

 private:
  // A pattern of bits, since any order will do; both zeros have the same.
  uint64_t key(int64_t routing, int64_t depth) const {
    const float* coefficients = routing_ + (routing * blocks_ + block(depth)) * 2;
    const float canonical[2] = {coefficients[0] + 0.0f, coefficients[1] + 0.0f};
    uint64_t pattern;
    std::memcpy(&pattern, canonical, sizeof(pattern));
    return pattern;
  }

  const float* routing_;
  int64_t blocks_;
  Direction direction_;
  std::vector<int64_t> order_;
};

// A piece of work for a thread: a few samples along neighbouring routings.
struct Item {
  int64_t first_sample, samples, first, last;
  double cost;
};

// Returns items of about equal cost, several a thread, the costliest first. cost(block) is that of its residual
// module.
template <class Cost>
std::vector<Item> make_items(const Routings& routings, int64_t batch, const Team& team, const Cost& cost) {
  constexpr int64_t kItemsPerThread = 6;
  const int64_t item_count = kItemsPerThread * team.threads;
  int64_t group = std::min<int64_t>(kMostSamples, std::max<int64_t>(1, batch * routings.count() / item_count));
  const int64_t groups = (batch + group - 1) / group;
  const int64_t cuts = std::min(routings.count(), (item_count + groups - 1) / groups);
  // Sums of each routing's cost beyond the part that it shares with the one before.
  std::vector<double> costs(routings.count() + 1, 0.0);
  for (int64_t p = 0; p < routings.count(); ++p) {
    team.check();
    bool shared = p > 0;
    double added = 0.01;
    for (int64_t depth = 0; depth < routings.blocks(); ++depth) {
      shared = shared && routings.agree(p - 1, p, depth);
      if (!shared && routings.coefficients(p, depth)[1] != 0.0f) added += cost(routings.block(depth));
    }
    costs[p + 1] = costs[p] + added;
  }
  std::vector<Item> items;
  int64_t first = 0;
  for (int64_t cut = 1; cut <= cuts; ++cut) {
    const double end = costs.back() * double(cut) / double(cuts);
    int64_t last = first;
    while (last < routings.count() && (costs[last + 1] <= end * (1 + 1e-9) || cut == cuts)) ++last;
    if (last == first) continue;
    for (int64_t sample = 0; sample < batch; sample += group) {
      const int64_t samples = std::min(group, batch - sample);
      items.push_back({sample, samples, first, last, (costs[last] - costs[first]) * double(samples)});
    }
    first = last;
  }
  std::stable_sort(items.begin(), items.end(), [](const Item& a, const Item& b) { return a.cost > b.cost; });
  return items;
}

// Visits the routings [first, last) from a depth on. The walker has samples(); together(depth), the number of samples
// that fit in cache at a depth; step(depth, coefficients, first sample, last sample); save(slot); restore(slot); and
// finish(routing).
template <class Walker>
void descend(const Routings& routings, Walker& walker, const Team& team, int64_t first, int64_t last, int64_t depth,
             int slot) {
  while (depth < routings.blocks()) {
    const int64_t together = walker.together(depth);
    int64_t end = depth;
    while (end < routings.blocks() && routings.agree(first, last - 1, end) && walker.together(end) == together) ++end;
    if (end == depth) break;
    for (int64_t sample = 0; sample < walker.samples(); sample += together) {
      const int64_t stop = std::min(sample + together, walker.samples());
      for (int64_t d = depth; d < end; ++d) {
        team.check();
        walker.step(d, routings.coefficients(first, d), sample, stop);
      }
    }
    depth = end;
  }
  if (depth == routings.blocks()) {
    for (int64_t p = first; p < last; ++p) {
      team.check();
      walker.finish(routings.routing(p));
    }
    return;
  }
  std::vector<std::pair<int64_t, int64_t>> branches;
  for (int64_t begin = first, end; begin < last; begin = end) {
    for (end = begin + 1; end < last && routings.agree(begin, end, depth);) ++end;
    branches.push_back({begin, end});
  }
  std::stable_sort(branches.begin(), branches.end(),
                   [](const auto& a, const auto& b) { return a.second - a.first < b.second - b.first; });
  walker.save(slot);
  for (size_t i = 0; i < branches.size(); ++i) {
    if (i > 0) walker.restore(slot);
    const bool final = i + 1 == branches.size();
    descend(routings, walker, team, branches[i].first, branches[i].second, depth, final ? slot : slot + 1);
  }
}

}  // namespace
}  // namespace PATHNET_ISA_NAMESPACE
}  // namespace pathnet::cpu
