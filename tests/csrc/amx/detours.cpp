#include "detours.h"

#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

#include "tiles.h"

namespace amx {
namespace {

[[noreturn]] void give_up(const char* reason) {
  dprintf(STDERR_FILENO, "AMX emulator: %s\n", reason);
  abort();
}

// A tile instruction of the program.
struct Place {
  uint64_t address;
  uint8_t bytes[16];
};

constexpr int kPlaces = 1 << 13;
Place places[kPlaces];
int place_count;
std::atomic_flag changing = ATOMIC_FLAG_INIT;  // locks the places, the detours and the program

}  // namespace
}  // namespace amx

// The code that a detour calls, with the number of its place on the stack, below the red zone of the interrupted
// function. It saves all registers: x87 to AVX-512 by xsavec, whose header must be zero before.
asm(R"(
.text
.type enter, @function
enter:
  pushfq
  push %r15; push %r14; push %r13; push %r12; push %r11; push %r10; push %r9; push %r8
  push %rdi; push %rsi; push %rbp; push %rsp; push %rbx; push %rdx; push %rcx; push %rax
  cld
  mov %rsp, %rbx
  sub $2560, %rsp
  and $-64, %rsp
  xor %edx, %edx
  mov %rdx, 512(%rsp); mov %rdx, 520(%rsp); mov %rdx, 528(%rsp); mov %rdx, 536(%rsp)
  mov %rdx, 544(%rsp); mov %rdx, 552(%rsp); mov %rdx, 560(%rsp); mov %rdx, 568(%rsp)
  mov $0xE7, %eax
  xsavec (%rsp)
  mov %rbx, %rdi
  call execute_place
  xor %edx, %edx
  mov $0xE7, %eax
  xrstor (%rsp)
  mov %rbx, %rsp
  pop %rax; pop %rcx; pop %rdx; pop %rbx; lea 8(%rsp), %rsp; pop %rbp; pop %rsi; pop %rdi
  pop %r8; pop %r9; pop %r10; pop %r11; pop %r12; pop %r13; pop %r14; pop %r15
  popfq
  ret
.size enter, . - enter
)");

extern "C" {
__attribute__((visibility("hidden"))) void enter();

struct Frame {
  amx::Registers registers;
  uint64_t into_detour, place;
  uint8_t red_zone[128];
};

__attribute__((visibility("hidden"))) void execute_place(Frame* frame) {
  constexpr int kRsp = 4;
  frame->registers.general[kRsp] = uint64_t(frame + 1);
  const amx::Place& place = amx::places[frame->place];
  amx::Instruction instruction;
  amx::decode(place.bytes, place.address, frame->registers, instruction);
  amx::execute(instruction);
}
}

namespace amx {
namespace {

constexpr int64_t kPage = 4096, kNear = int64_t(1) << 30;  // bytes; a jump reaches twice as far

// Returns executable memory close enough to the address for jumps both ways.
uint8_t* near(uint64_t address, int64_t bytes) {
  constexpr int64_t kRegion = 1 << 16;
  static uint8_t* region = nullptr;
  static int64_t left = 0;
  if (left < bytes || std::llabs(int64_t(uint64_t(region) - address)) > kNear) {
    region = nullptr;
    for (int64_t away = 16 * kRegion; region == nullptr && away < kNear; away += 16 * kRegion) {
      for (int64_t offset : {away, -away}) {
        const uint64_t wanted = (address & ~uint64_t(kRegion - 1)) + uint64_t(offset);
        if (region != nullptr || int64_t(wanted) <= 0) continue;
        void* mapped = mmap(reinterpret_cast<void*>(wanted), kRegion, PROT_READ | PROT_WRITE | PROT_EXEC,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
        if (mapped != MAP_FAILED) region = static_cast<uint8_t*>(mapped);
      }
    }
    if (region == nullptr) give_up("no memory near the program for detours");
    left = kRegion;
  }
  left -= bytes;
  return (region += bytes) - bytes;
}

void put(uint8_t*& at, std::initializer_list<uint8_t> code) {
  for (uint8_t byte : code) *at++ = byte;
}

template <class T>
void put_value(uint8_t*& at, T value) {
  std::memcpy(at, &value, sizeof value);
  at += sizeof value;
}

void put_jump(uint8_t*& at, uint64_t from, uint64_t to) {
  constexpr int kJump = 5;
  put(at, {0xE9});
  put_value(at, int32_t(int64_t(to - (from + kJump))));
}

// Writes the detour of a place: code that calls `enter` and jumps back to the next instruction.
const uint8_t* detour(int place, uint64_t end) {
  uint8_t* const start = near(end, 48);
  uint8_t* at = start;
  put(at, {0x48, 0x8D, 0x64, 0x24, 0x80});  // lea -128(%rsp), %rsp, which leaves the flags
  put(at, {0x68});                          // push $place
  put_value(at, int32_t(place));
  put(at, {0xFF, 0x15});  // call *13(%rip): the address that follows the next two instructions
  put_value(at, int32_t(13));
  put(at, {0x48, 0x8D, 0xA4, 0x24, 136, 0, 0, 0});  // lea 136(%rsp), %rsp
  put_jump(at, uint64_t(at), end);
  put_value(at, uint64_t(&enter));
  return start;
}

// Replaces an instruction by a jump, which is no longer than any tile instruction. Its page, or two, are replaced as
// a whole, so no other thread ever executes a part of the jump.
void replace(uint64_t address, const uint8_t* target) {
  const uint64_t first = address & ~uint64_t(kPage - 1),
                 bytes = ((address + 4) & ~uint64_t(kPage - 1)) + kPage - first;
  void* copy = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (copy == MAP_FAILED) give_up("no memory for a page of the program");
  std::memcpy(copy, reinterpret_cast<const void*>(first), bytes);
  uint8_t* at = static_cast<uint8_t*>(copy) + (address - first);
  put_jump(at, address, uint64_t(target));
  if (mprotect(copy, bytes, PROT_READ | PROT_EXEC) != 0 ||
      mremap(copy, bytes, bytes, MREMAP_MAYMOVE | MREMAP_FIXED, first) == MAP_FAILED) {
    give_up("a page of the program cannot be replaced");
  }
}

}  // namespace

bool take_over(uint64_t address) {
  bool replaced = false;
  while (changing.test_and_set(std::memory_order_acquire)) usleep(10);
  for (int i = 0; i < place_count; ++i) replaced = replaced || places[i].address == address;
  const auto* bytes = reinterpret_cast<const uint8_t*>(address);
  Instruction instruction;
  if (!replaced && decode(bytes, address, Registers{}, instruction)) {
    if (place_count == kPlaces) give_up("too many tile instructions");
    places[place_count].address = address;
    std::memcpy(places[place_count].bytes, bytes, instruction.end - address);
    replace(address, detour(place_count++, instruction.end));
    replaced = true;
  }
  changing.clear(std::memory_order_release);
  return replaced;
}

}  // namespace amx
