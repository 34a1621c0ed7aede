// The block that a refusal for lack of shared memory names.
#pragma once

#include "program.h"

namespace pathnet::cuda {

// Returns the block with the largest window.
inline int largest_block(const Program& program) {
  int largest = 0, bytes = 0;
  for (int b = 0; b < program.block_count; ++b) {
    const BlockForm& form = program.blocks()[b];
    for (const Conv* conv : {&form.units[0], &form.units[1], &form.projection}) {
      if (conv->window_plane <= bytes) continue;
      largest = b;
      bytes = conv->window_plane;
    }
  }
  return largest;
}

}  // namespace pathnet::cuda
