// The forms of blocks that the whole-path kernels can run.
#pragma once

#include "program.h"

namespace pathnet::cuda {

// Throws std::invalid_argument, naming the block and the reason, if the kernels cannot run the plan's block `index`.
void check_supported(const Plan& plan, int64_t index);

}  // namespace pathnet::cuda
