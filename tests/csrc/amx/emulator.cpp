// AMX in software, for tests on processors without it: preloaded (LD_PRELOAD), it decodes and executes every tile
// instruction that the processor refuses with SIGILL, and lets the program go on behind it.
//
// A signal takes ten microseconds, fifty times longer than what it is about, so that each place in the program costs
// one at most: from then on there is a jump to a detour that calls the emulator.
//
// Each thread has its own eight tiles and configuration. What the hardware would answer with a fault that names no
// reason (a tile that is not configured, shapes that do not fit) ends the process with one line that does.
#include <dlfcn.h>
#include <immintrin.h>
#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <atomic>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

namespace {

constexpr int kTiles = 8, kRows = 16, kRowBytes = 64;

struct Config {  // the 64 bytes of ldtilecfg
  uint8_t palette, start_row, reserved[14];
  uint16_t colsb[16];  // bytes of a row; those beyond the eighth are reserved, as of the rows
  uint8_t rows[16];
};
static_assert(sizeof(Config) == 64);

struct Tile {
  alignas(64) uint8_t row[kRows][kRowBytes];
};

struct State {
  Config config;
  Tile tiles[kTiles];
};

// initial-exec, since the other models allocate at a thread's first use, which here lies inside a signal handler.
__attribute__((tls_model("initial-exec"))) thread_local State state;

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
constexpr const char* kNames[kKinds] = {"ldtilecfg", "sttilecfg",   "tilerelease", "tilezero",
                                        "tileloadd", "tileloaddt1", "tilestored",  "tdpbf16ps"};
std::atomic<uint64_t> counts[kKinds];

struct Instruction {
  Kind kind;
  int tile, source1, source2;
  uint8_t* memory;  // base and displacement
  int64_t index;    // scaled: an offset of the configuration, but from row to row of a tile
  uint64_t end;     // where the next instruction starts
};

struct Registers {  // as `enter` pushes them
  uint64_t general[16], flags;
};

// Comes at the program's own tile instruction, never in the middle of a library's call, so that stdio is safe here.
[[noreturn]] __attribute__((format(printf, 2, 3))) void contradiction(Kind kind, const char* format, ...) {
  char reason[160], line[256];
  va_list values;
  va_start(values, format);
  vsnprintf(reason, sizeof reason, format, values);
  va_end(values);
  const int length = snprintf(line, sizeof line, "AMX emulator: %s: %s\n", kNames[kind], reason);
  if (write(STDERR_FILENO, line, length) < 0) _exit(1);
  abort();
}

// Of the bytes of an instruction and the address at which the program has it. Reads no byte that the instruction does
// not have, as the page behind it may not be there.
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

void need_tile(Kind kind, int tile) {
  if (state.config.palette == 0) contradiction(kind, "no tiles are configured");
  if (state.config.rows[tile] == 0) contradiction(kind, "tmm%d is not configured", tile);
}

void check_config(const Config& config) {
  if (config.palette != 1) contradiction(kLdtilecfg, "palette %d, of 0 and 1", config.palette);
  if (config.start_row != 0) contradiction(kLdtilecfg, "a start row, %d, is not emulated", config.start_row);
  for (uint8_t value : config.reserved) {
    if (value != 0) contradiction(kLdtilecfg, "reserved bytes are not zero");
  }
  for (int i = 0; i < 16; ++i) {
    const int rows = config.rows[i], colsb = config.colsb[i];
    if (i >= kTiles && (rows != 0 || colsb != 0)) contradiction(kLdtilecfg, "reserved bytes are not zero");
    if (rows > kRows || colsb > kRowBytes || (rows == 0) != (colsb == 0)) {
      contradiction(kLdtilecfg, "tmm%d of %d rows of %d bytes", i, rows, colsb);
    }
  }
}

void load_config(const uint8_t* memory) {
  Config config;
  std::memcpy(&config, memory, sizeof config);
  if (config.palette != 0) check_config(config);
  std::memset(&state, 0, sizeof state);
  if (config.palette != 0) state.config = config;
}

void load_tile(const Instruction& instruction) {
  Tile loaded{};
  for (int64_t r = 0; r < state.config.rows[instruction.tile]; ++r) {
    std::memcpy(loaded.row[r], instruction.memory + r * instruction.index, state.config.colsb[instruction.tile]);
  }
  state.tiles[instruction.tile] = loaded;
}

void store_tile(const Instruction& instruction) {
  const Tile& tile = state.tiles[instruction.tile];
  for (int64_t r = 0; r < state.config.rows[instruction.tile]; ++r) {
    std::memcpy(instruction.memory + r * instruction.index, tile.row[r], state.config.colsb[instruction.tile]);
  }
}

void check_product(const Instruction& instruction) {
  const int c = instruction.tile, a = instruction.source1, b = instruction.source2;
  for (int tile : {c, a, b}) need_tile(kTdpbf16ps, tile);
  if (c == a || c == b || a == b) contradiction(kTdpbf16ps, "tmm%d, tmm%d, tmm%d are not three tiles", c, a, b);
  const Config& config = state.config;
  for (int tile : {c, a, b}) {
    if (config.colsb[tile] % 4) contradiction(kTdpbf16ps, "tmm%d has rows of %d bytes", tile, config.colsb[tile]);
  }
  if (config.rows[c] != config.rows[a]) {
    contradiction(kTdpbf16ps, "C (tmm%d) has %d rows, A (tmm%d) %d", c, config.rows[c], a, config.rows[a]);
  }
  if (config.colsb[c] != config.colsb[b]) {
    contradiction(kTdpbf16ps, "C (tmm%d) has rows of %d bytes, B (tmm%d) of %d", c, config.colsb[c], b,
                  config.colsb[b]);
  }
  if (config.colsb[a] / 4 != config.rows[b]) {
    contradiction(kTdpbf16ps, "A (tmm%d) has %d pairs in a row, B (tmm%d) %d rows", a, config.colsb[a] / 4, b,
                  config.rows[b]);
  }
}

// The order of the manual (not of the intrinsics guide): the even and the odd products of a row add up by themselves
// from zero, their sum is added to C. Not inlined, as the compiler does not know that the arithmetic has to stay
// behind the change of MXCSR.
__attribute__((noinline)) void multiply(Tile& c, const Tile& a, const Tile& b, int rows, int pairs, int columns) {
  const __m512i upper = _mm512_set1_epi32(int(0xFFFF0000));
  const __mmask16 inside = __mmask16((1u << columns) - 1);
  for (int m = 0; m < rows; ++m) {
    __m512 even = _mm512_setzero_ps(), odd = _mm512_setzero_ps();
    for (int k = 0; k < pairs; ++k) {
      int pair;
      std::memcpy(&pair, a.row[m] + 4 * k, sizeof pair);
      const __m512i left = _mm512_set1_epi32(pair), right = _mm512_load_si512(b.row[k]);
      even = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(left, 16)),
                             _mm512_castsi512_ps(_mm512_slli_epi32(right, 16)), even);
      odd = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(left, upper)),
                            _mm512_castsi512_ps(_mm512_and_si512(right, upper)), odd);
    }
    const __m512 sum = _mm512_add_ps(even, odd);
    _mm512_store_ps(c.row[m], _mm512_maskz_add_ps(inside, _mm512_load_ps(c.row[m]), sum));
  }
}

void run_product(const Instruction& instruction) {
  check_product(instruction);
  // Nearest even, denormals are zero, nothing raised; `enter` brings the program's own back.
  constexpr unsigned kMaskAll = 0x1F80, kFlushToZero = 0x8000, kDenormalsAreZero = 0x0040;
  _mm_setcsr(kMaskAll | kFlushToZero | kDenormalsAreZero);
  const Config& config = state.config;
  multiply(state.tiles[instruction.tile], state.tiles[instruction.source1], state.tiles[instruction.source2],
           config.rows[instruction.tile], config.rows[instruction.source2], config.colsb[instruction.tile] / 4);
}

void execute(const Instruction& instruction) {
  switch (instruction.kind) {
    case kLdtilecfg:
      return load_config(instruction.memory + instruction.index);
    case kSttilecfg:
      std::memcpy(instruction.memory + instruction.index, &state.config, sizeof state.config);
      return;
    case kTilerelease:
      std::memset(&state, 0, sizeof state);
      return;
    case kTilezero:
      need_tile(instruction.kind, instruction.tile);
      state.tiles[instruction.tile] = Tile{};
      return;
    case kTileloadd:
    case kTileloaddt1:
      need_tile(instruction.kind, instruction.tile);
      return load_tile(instruction);
    case kTilestored:
      need_tile(instruction.kind, instruction.tile);
      return store_tile(instruction);
    case kTdpbf16ps:
      return run_product(instruction);
    case kKinds:
      return;
  }
}

[[noreturn]] void give_up(const char* reason) {
  dprintf(STDERR_FILENO, "AMX emulator: %s\n", reason);
  abort();
}

// Where the program has a tile instruction.
struct Place {
  uint64_t address;
  uint8_t bytes[16];
};

constexpr int kPlaces = 1 << 13;
Place places[kPlaces];
int place_count;
std::atomic_flag changing = ATOMIC_FLAG_INIT;  // the places, the detours and the program

}  // namespace

// What a detour calls, with the number of its place pushed, and below the red zone of the function that it
// interrupts: keeps all registers (of x87 up to AVX-512, compacted, behind a header of zeros).
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
  Registers registers;
  uint64_t into_detour, place;
  uint8_t red_zone[128];
};

__attribute__((visibility("hidden"))) void execute_place(Frame* frame) {
  constexpr int kRsp = 4;
  frame->registers.general[kRsp] = uint64_t(frame + 1);
  const Place& place = places[frame->place];
  Instruction instruction;
  Decoder(place.bytes, place.address, frame->registers).decode(instruction);
  execute(instruction);
  counts[instruction.kind].fetch_add(1, std::memory_order_relaxed);
}
}

namespace {

constexpr int64_t kPage = 4096, kNear = int64_t(1) << 30;  // a jump reaches twice as far

// Room of which a jump reaches the address and back.
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

const uint8_t* detour(int place, uint64_t end) {
  uint8_t* const start = near(end, 48);
  uint8_t* at = start;
  put(at, {0x48, 0x8D, 0x64, 0x24, 0x80});  // lea -128(%rsp), %rsp, which leaves the flags
  put(at, {0x68});                          // push $place
  put_value(at, int32_t(place));
  put(at, {0xFF, 0x15});  // call *13(%rip), what stands behind the two instructions that follow
  put_value(at, int32_t(13));
  put(at, {0x48, 0x8D, 0xA4, 0x24, 136, 0, 0, 0});  // lea 136(%rsp), %rsp
  put_jump(at, uint64_t(at), end);
  put_value(at, uint64_t(&enter));
  return start;
}

// Puts a jump in place of an instruction, none of which is shorter. The program's page, or two, are replaced as a
// whole, so that no other thread ever comes upon a part of the jump.
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

// False where the program has neither a tile instruction nor, for another thread's signal, the jump in place of one.
bool take_over(uint64_t address) {
  bool taken = false;
  while (changing.test_and_set(std::memory_order_acquire)) usleep(10);
  for (int i = 0; i < place_count; ++i) taken = taken || places[i].address == address;
  const auto* bytes = reinterpret_cast<const uint8_t*>(address);
  Instruction instruction;
  if (!taken && Decoder(bytes, address, Registers{}).decode(instruction)) {
    if (place_count == kPlaces) give_up("too many tile instructions");
    places[place_count].address = address;
    std::memcpy(places[place_count].bytes, bytes, instruction.end - address);
    replace(address, detour(place_count++, instruction.end));
    taken = true;
  }
  changing.clear(std::memory_order_release);
  return taken;
}

using Sigaction = int (*)(int, const struct sigaction*, struct sigaction*);

Sigaction system_sigaction() {
  static const Sigaction found = reinterpret_cast<Sigaction>(dlsym(RTLD_NEXT, "sigaction"));
  return found;
}

struct sigaction displaced;  // what the program wants done at SIGILL
std::atomic<bool> given_up;

void on_illegal_instruction(int number, siginfo_t* info, void* context) {
  const greg_t* registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  const bool sent = info->si_code <= 0;  // by kill or raise: no instruction is to blame
  if (!sent && take_over(uint64_t(registers[REG_RIP]))) return;
  given_up = true;
  system_sigaction()(SIGILL, &displaced, nullptr);
  if (sent) raise(number);
}

__attribute__((constructor)) void install() {
  struct sigaction action = {};
  action.sa_sigaction = on_illegal_instruction;
  action.sa_flags = SA_SIGINFO | SA_NODEFER;
  system_sigaction()(SIGILL, &action, &displaced);
}

}  // namespace

#define EXPORTED extern "C" __attribute__((visibility("default")))

// Python's faulthandler, which pytest switches on, wants SIGILL too. It gets it where the emulator gives up.
EXPORTED int sigaction(int number, const struct sigaction* action, struct sigaction* old) noexcept {
  if (number != SIGILL || given_up) return system_sigaction()(number, action, old);
  const struct sigaction before = displaced;
  if (action != nullptr) displaced = *action;
  if (old != nullptr) *old = before;
  return 0;
}

EXPORTED bool pathnet_amx_emulated() { return true; }

// How many instructions of a name the process has executed; 0 of a name that is none.
EXPORTED uint64_t pathnet_amx_count(const char* name) {
  for (int kind = 0; kind < kKinds; ++kind) {
    if (std::strcmp(name, kNames[kind]) == 0) return counts[kind];
  }
  return 0;
}

EXPORTED uint64_t pathnet_amx_executed() { return counts[kTdpbf16ps]; }
