// The tiles of a thread, and what instructions do to them.
#pragma once

#include <cstdint>

#include "instruction.h"

namespace amx {

constexpr int kTiles = 8, kRows = 16, kRowBytes = 64;

// Executes an instruction on the calling thread's tiles and counts it. Where hardware would answer with a fault that
// gives no reason (a tile that is not configured, shapes that do not match), it ends the process with one line that
// does.
void execute(const Instruction& instruction);

// Returns the number of executed instructions of a kind, in all threads.
uint64_t executed(Kind kind);

}  // namespace amx
