#include "instruction.h"

#include <cstring>

#include "tiles.h"

namespace amx {
namespace {

class Decoder {
 public:
  Decoder(const uint8_t* bytes, uint64_t address, const Registers& registers)
      : registers_(registers), at_(bytes), offset_(address - uint64_t(bytes)) {}

  bool decode(Instruction& instruction) {
    if (byte() != 0xC4) return false;
    const uint8_t second = byte();
    if ((second & 0x1F) != 2) return false;  // the map 0F38
    const uint8_t third = byte();
    if (third & 0x84) return false;  // W and L
    high_reg_ = ~second >> 4 & 8;
    high_index_ = ~second >> 3 & 8;
    high_base_ = ~second >> 2 & 8;
    vvvv_ = ~third >> 3 & 15;
    const int prefix = third & 3;
    const uint8_t opcode = byte();
    modrm_ = byte();
    if (opcode == 0x49) return configuration(prefix, instruction);
    if (opcode == 0x4B) return transfer(prefix, instruction);
    return opcode == 0x5C && product(prefix, instruction);
  }

 private:
  enum { kNone, k66, kF3, kF2 };

  uint8_t byte() { return *at_++; }
  int mod() const { return modrm_ >> 6; }
  int reg() const { return modrm_ >> 3 & 7; }
  int rm() const { return modrm_ & 7; }

  bool configuration(int prefix, Instruction& to) {
    if (vvvv_ != 0) return false;
    if (mod() == 3) {
      to.kind = prefix == kF2 ? kTilezero : kTilerelease;
      to.tile = reg();
      to.end = uint64_t(at_) + offset_;
      return rm() == 0 && (prefix == kF2 ? high_reg_ == 0 : prefix == kNone && reg() == 0);
    }
    to.kind = prefix == k66 ? kSttilecfg : kLdtilecfg;
    return (prefix == kNone || prefix == k66) && reg() == 0 && memory(to);
  }

  bool transfer(int prefix, Instruction& to) {
    constexpr int kNeedsSib = 4;
    if (vvvv_ != 0 || prefix == kNone || mod() == 3 || rm() != kNeedsSib || high_reg_ != 0) return false;
    to.kind = prefix == k66 ? kTileloaddt1 : prefix == kF2 ? kTileloadd : kTilestored;
    to.tile = reg();
    return memory(to);
  }

  bool product(int prefix, Instruction& to) {
    if (prefix != kF3 || mod() != 3 || high_reg_ != 0 || high_base_ != 0 || vvvv_ >= kTiles) return false;
    to.kind = kTdpbf16ps;
    to.tile = reg();
    to.source1 = rm();
    to.source2 = vvvv_;
    to.end = uint64_t(at_) + offset_;
    return true;
  }

  bool memory(Instruction& to) {
    uint64_t address = 0;
    bool has_base = true, relative = false;
    int base = rm();
    to.index = 0;
    if (base == 4) {
      const uint8_t sib = byte();
      const int index = (sib >> 3 & 7) | high_index_;
      if (index != 4) to.index = int64_t(uint64_t(general(index)) << (sib >> 6));
      base = sib & 7;
      has_base = base != 5 || mod() != 0;
    } else if (base == 5 && mod() == 0) {
      has_base = false;
      relative = true;
    }
    if (has_base) address = general(base | high_base_);
    if (mod() == 1) {
      address += int8_t(byte());
    } else if (mod() == 2 || !has_base) {
      int32_t displacement;
      std::memcpy(&displacement, at_, sizeof displacement);
      at_ += sizeof displacement;
      address += int64_t(displacement);
    }
    to.end = uint64_t(at_) + offset_;
    if (relative) address += to.end;
    to.memory = reinterpret_cast<uint8_t*>(address);
    return true;
  }

  uint64_t general(int number) const { return registers_.general[number]; }

  const Registers& registers_;
  const uint8_t* at_;
  uint64_t offset_;
  uint8_t modrm_ = 0;
  int high_reg_ = 0, high_index_ = 0, high_base_ = 0, vvvv_ = 0;
};

}  // namespace

bool decode(const uint8_t* bytes, uint64_t address, const Registers& registers, Instruction& instruction) {
  return Decoder(bytes, address, registers).decode(instruction);
}

}  // namespace amx
