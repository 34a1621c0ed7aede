// Jumps from the program's tile instructions to the emulator.
#pragma once

#include <cstdint>

namespace amx {

// Replaces the tile instruction at an address by a jump to a detour that executes it. Returns false if there is
// neither a tile instruction nor a jump that replaced one, for another thread's signal.
bool take_over(uint64_t address);

}  // namespace amx
