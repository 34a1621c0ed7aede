// Tile instructions and their decoding.
#pragma once

#include <cstdint>

namespace amx {

enum Kind {
  kLdtilecfg,
  kSttilecfg,
  kTilerelease,
  kTilezero,
  kTileloadd,
  kTileloaddt1,
  kTilestored,
  kTdpbf16ps,
  kKinds
};
inline constexpr const char* kNames[kKinds] = {"ldtilecfg", "sttilecfg",   "tilerelease", "tilezero",
                                               "tileloadd", "tileloaddt1", "tilestored",  "tdpbf16ps"};

struct Instruction {
  Kind kind;
  int tile, source1, source2;
  uint8_t* memory;  // base and displacement
  int64_t index;    // scaled: an offset for a configuration, the stride between rows for a tile
  uint64_t end;     // address of the next instruction
};

// The general registers and flags, in the order in which `enter` of detours.cpp pushes them.
struct Registers {
  uint64_t general[16], flags;
};

// Decodes the bytes of an instruction that the program has at `address`. Returns false if it is no tile instruction.
// Reads no byte after the instruction, since the next page may be unmapped.
bool decode(const uint8_t* bytes, uint64_t address, const Registers& registers, Instruction& instruction);

}  // namespace amx
