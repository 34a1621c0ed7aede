// A network packed for one kind of pass: the single tensor of bytes that the cpu ops read.
//
//   header | blocks | units | scales, shifts, addends (forward only) | zeros | weights | seal
//
// Every call compares the header's checksum, which covers everything before the weights. The weights take megabytes,
// so they are summed up only when they are packed. That sum is part of the header, and the header's checksum stands
// once more after the weights as the seal. A plan that was cut short, or put together from two plans, is therefore
// refused; bytes that change within the weights afterwards go unnoticed.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "../plan.h"
#include "kernels.h"

namespace pathnet::cpu {

// The numbers are those of pathnet/engines/cpu/ops.py.
enum class WalkKind : int32_t { kBackwardRunning, kBackwardBatch, kForwardRunning, kForwardBatch };
constexpr int64_t kWalkKinds = 4;

constexpr bool is_forward(WalkKind kind) { return kind >= WalkKind::kForwardRunning; }
constexpr bool is_batch(WalkKind kind) { return kind == WalkKind::kBackwardBatch || kind == WalkKind::kForwardBatch; }
constexpr Direction direction_of(WalkKind kind) {
  return is_forward(kind) ? Direction::kForward : Direction::kBackward;
}

// In BN mode `running` the convolutions' biases, unit after unit, or none; in mode `batch` the summand of the
// variance of each unit's BN.
struct Addends {
  const float* values;  // null for none
  int64_t count;
};

// The input of pack_plan. The plan has weights and scales.
struct PlanParts {
  Plan plan;
  int64_t scale_count;
  const float* shifts;  // [scale_count]
  Addends addends;
  WalkKind kind;
  bool bf16;
};

// A packed plan, ready for a pass. The tables are copies, since the tensor may begin between two int64.
struct UnpackedPlan {
  std::vector<Block> blocks;
  std::vector<Unit> units;
  Plan plan;  // scales: null on the way back
  Kernels kernels;
  const uint8_t* weights;
  int64_t scale_count;
  const float* shifts;   // null on the way back
  const float* addends;  // null for none, and on the way back
};

// Packs for the selected instruction set, into as many zeros as are requested of `allocate`; check is as a team's.
void pack_plan(const PlanParts& parts, const std::function<uint8_t*(int64_t)>& allocate,
               const std::function<void()>& check);

// Throws std::runtime_error where the bytes are not a whole plan, or are one for another kind of pass or instruction
// set.
UnpackedPlan unpack_plan(const uint8_t* bytes, int64_t size, WalkKind kind);

}  // namespace pathnet::cpu
