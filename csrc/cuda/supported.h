// The forms of blocks that the whole-path kernels can run.
#pragma once

#include "program.h"

namespace pathnet::cuda {

// Returns `value` rounded up to a multiple of `multiple`.
inline int round_up(int64_t value, int64_t multiple) { return int((value + multiple - 1) / multiple * multiple); }

// Returns the image with its channels padded to a multiple of 16.
inline Image padded(int64_t channels, int64_t height, int64_t width) {
  return {int32_t(round_up(channels, kReduced)), int32_t(height), int32_t(width)};
}

// Throws std::invalid_argument, naming the block and the reason, if the kernels cannot run the plan's block `index`.
void check_supported(const Plan& plan, int64_t index);

}  // namespace pathnet::cuda
