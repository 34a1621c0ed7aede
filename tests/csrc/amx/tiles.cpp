#include "tiles.h"

#include <immintrin.h>
#include <unistd.h>

#include <atomic>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

namespace amx {
namespace {

struct Config {  // the 64 bytes of ldtilecfg
  uint8_t palette, start_row, reserved[14];
  uint16_t colsb[16];  // bytes of a row; here and in `rows` all beyond the eighth are reserved
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

// initial-exec, since the other models allocate at a thread's first use, which here is inside a signal handler.
__attribute__((tls_model("initial-exec"))) thread_local State state;

std::atomic<uint64_t> counts[kKinds];

// Ends the process with a reason. The program is at its own tile instruction, never inside a library's call, so that
// stdio is safe here.
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

// Adds in the order of the manual (not of the intrinsics guide): the even and the odd products of a row are summed
// separately from zero, and their sum is added to C. Not inlined, since the compiler does not know that the
// arithmetic has to come after the change of MXCSR.
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
  // Round to nearest even, denormals are zero, no exceptions; `enter` restores the program's MXCSR.
  constexpr unsigned kMaskAll = 0x1F80, kFlushToZero = 0x8000, kDenormalsAreZero = 0x0040;
  _mm_setcsr(kMaskAll | kFlushToZero | kDenormalsAreZero);
  const Config& config = state.config;
  multiply(state.tiles[instruction.tile], state.tiles[instruction.source1], state.tiles[instruction.source2],
           config.rows[instruction.tile], config.rows[instruction.source2], config.colsb[instruction.tile] / 4);
}

void run(const Instruction& instruction) {
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

}  // namespace

void execute(const Instruction& instruction) {
  run(instruction);
  counts[instruction.kind].fetch_add(1, std::memory_order_relaxed);
}

uint64_t executed(Kind kind) { return counts[kind]; }

}  // namespace amx
