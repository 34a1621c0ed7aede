// The program that the tests run under the emulator: AMX by the compiler's intrinsics, data from stdin, results to
// stdout.
#include <immintrin.h>
#include <sched.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <thread>
#include <vector>

// Written in assembly by snippets.py: one function for each addressing mode.
using Snippet = void (*)();
extern "C" const Snippet snippets[];
extern "C" const int64_t snippet_count;
// From there too: loads every register from the start of the arena, and stores it kKept bytes further.
extern "C" void keep_registers();
constexpr int kBelow = 1 << 17, kArea = 1024, kTileBytes = 1024, kKept = 4096;
extern "C" {
alignas(64) unsigned char arena[kBelow + kArea];  // the area, and below it room for a stack
alignas(64) unsigned char result[kTileBytes];
}

namespace {

struct Config {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t colsb[16] = {};
  uint8_t rows[16] = {};

  void set(int tile, int64_t tile_rows, int64_t bytes) {
    rows[tile] = uint8_t(tile_rows);
    colsb[tile] = uint16_t(bytes);
  }
};

// The intrinsics of older compilers do not say that they read memory (or, of the configuration, only its first eight
// bytes), so stores before them could come late or never.
void written() { asm volatile("" ::: "memory"); }

void configure(const Config& config) {
  written();
  _tile_loadconfig(&config);
}

void read(void* to, size_t bytes) {
  if (fread(to, 1, bytes, stdin) != bytes) exit(2);
}

void write(const void* from, size_t bytes) { fwrite(from, 1, bytes, stdout); }

// One product C += A * B, repeated; strides in bytes, of any size.
struct Product {
  int64_t rows, pairs, columns, stride_a, stride_b, stride_c, repeats, mxcsr;
  std::vector<char> a, b, c;

  void read_input() {
    read(&rows, 8 * sizeof rows);
    a.resize((rows - 1) * stride_a + 4 * pairs);
    b.resize((pairs - 1) * stride_b + 4 * columns);
    c.resize((rows - 1) * stride_c + 4 * columns);
    for (auto* buffer : {&a, &b, &c}) read(buffer->data(), buffer->size());
  }

  void run() {
    _mm_setcsr(unsigned(mxcsr));
    Config config;
    config.set(5, rows, 4 * columns);
    config.set(0, rows, 4 * pairs);
    config.set(7, pairs, 4 * columns);
    configure(config);
    _tile_loadd(5, c.data(), stride_c);
    _tile_loadd(0, a.data(), stride_a);
    _tile_stream_loadd(7, b.data(), stride_b);
    for (int64_t i = 0; i < repeats; ++i) {
      _tile_dpbf16ps(5, 0, 7);
      if (repeats > 1) sched_yield();
    }
    _tile_stored(5, c.data(), stride_c);
    _tile_release();
    if (_mm_getcsr() != unsigned(mxcsr)) abort();
  }
};

// Runs the first product in this thread, each other one in its own thread.
int products(int count) {
  std::vector<Product> all(count);
  for (Product& product : all) product.read_input();
  std::vector<std::thread> threads;
  for (int i = 1; i < count; ++i) threads.emplace_back([&all, i] { all[i].run(); });
  all[0].run();
  for (std::thread& thread : threads) thread.join();
  for (Product& product : all) write(product.c.data(), product.c.size());
  return 0;
}

// Multiplies A (21 x 32 * steps) by B (32 * steps x 19) with two by two tiles of C, two of A and two of B: all eight
// tiles, in different shapes.
int eight_tiles(int steps) {
  constexpr int kRows = 21, kColumns = 19;
  const int64_t stride_a = 64 * steps, stride_b = 4 * kColumns, stride_c = 4 * kColumns;
  std::vector<char> a(kRows * stride_a), b(16 * steps * stride_b), c(kRows * stride_c);
  read(a.data(), a.size());
  read(b.data(), b.size());
  Config config;
  for (int i = 0; i < 2; ++i) {
    config.set(4 + i, i ? 5 : 16, 64);
    config.set(6 + i, 16, i ? 12 : 64);
    for (int j = 0; j < 2; ++j) config.set(2 * i + j, i ? 5 : 16, j ? 12 : 64);
  }
  configure(config);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int step = 0; step < steps; ++step) {
    const char* left = a.data() + 64 * step;
    const char* right = b.data() + 16 * step * stride_b;
    _tile_loadd(4, left, stride_a);
    _tile_loadd(5, left + 16 * stride_a, stride_a);
    _tile_stream_loadd(6, right, stride_b);
    _tile_stream_loadd(7, right + 64, stride_b);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c.data(), stride_c);
  _tile_stored(1, c.data() + 64, stride_c);
  _tile_stored(2, c.data() + 16 * stride_c, stride_c);
  _tile_stored(3, c.data() + 16 * stride_c + 64, stride_c);
  _tile_release();
  write(c.data(), c.size());
  return 0;
}

// Runs all snippets. Before each, the area and the tiles (each loaded from another place of it) have the same
// contents.
int addressing() {
  unsigned char area[kArea], config[64];
  read(area, sizeof area);
  read(config, sizeof config);
  for (int64_t i = 0; i < snippet_count; ++i) {
    std::memcpy(arena + kBelow, area, sizeof area);
    std::memset(result, 0, sizeof result);
    written();
    _tile_loadconfig(config);
    _tile_loadd(0, area + 0, 16);
    _tile_loadd(1, area + 10, 16);
    _tile_loadd(2, area + 20, 16);
    _tile_loadd(3, area + 30, 16);
    _tile_loadd(4, area + 40, 16);
    _tile_loadd(5, area + 50, 16);
    _tile_loadd(6, area + 60, 16);
    _tile_loadd(7, area + 70, 16);
    snippets[i]();
    written();
    write(arena + kBelow, kArea);
    write(result, sizeof result);
  }
  return 0;
}

// Returns three tiles of shapes that match (16 x 16).
Config matching() {
  Config config;
  for (int tile = 0; tile < 3; ++tile) config.set(tile, 16, 64);
  return config;
}

int registers() {
  read(arena, kKept);
  configure(matching());
  keep_registers();
  written();
  write(arena, 2 * kKept);
  return 0;
}

int wrong(const std::string& what) {
  Config config = matching();
  const std::map<std::string, void (*)(Config&)> changes = {
      {"palette", [](Config& c) { c.palette = 2; }},          {"start row", [](Config& c) { c.start_row = 1; }},
      {"reserved", [](Config& c) { c.reserved[13] = 1; }},    {"ninth tile", [](Config& c) { c.rows[8] = 1; }},
      {"too many rows", [](Config& c) { c.rows[1] = 17; }},   {"too wide", [](Config& c) { c.colsb[1] = 68; }},
      {"no rows", [](Config& c) { c.rows[1] = 0; }},          {"pairs", [](Config& c) { c.colsb[1] = 60; }},
      {"odd bytes", [](Config& c) { c.colsb[1] = 62; }},      {"rows", [](Config& c) { c.rows[0] = 15; }},
      {"columns", [](Config& c) { c.colsb[2] = 60; }},        {"no palette", [](Config& c) { c.palette = 0; }},
      {"product without", [](Config& c) { c.set(2, 0, 0); }},
  };
  if (changes.count(what)) changes.at(what)(config);
  configure(config);
  if (what == "same tiles") asm volatile(".byte 0xc4, 0xe2, 0x72, 0x5c, 0xc1");  // assemblers refuse it
  if (what == "zero without") _tile_zero(3);
  if (what == "load without") _tile_loadd(3, arena, 64);
  if (what == "store without") _tile_stored(3, arena, 64);
  if (what == "released") _tile_release();
  _tile_dpbf16ps(0, 1, 2);
  return 0;
}

// Executes an instruction that the emulator must not handle.
int unknown(const std::string& what) {
  configure(matching());
  if (what == "ud2") asm volatile("ud2");
  if (what == "tdpbssd") asm volatile(".byte 0xc4, 0xe2, 0x6b, 0x5e, 0xc1");
  if (what == "tdpfp16ps") asm volatile(".byte 0xc4, 0xe2, 0x6b, 0x5c, 0xc1");
  if (what == "256 bits") asm volatile(".byte 0xc4, 0xe2, 0x6e, 0x5c, 0xc1");
  if (what == "tmm8") asm volatile(".byte 0xc4, 0x62, 0x6a, 0x5c, 0xc1");
  if (what == "no SIB") asm volatile(".byte 0xc4, 0xe2, 0x7b, 0x4b, 0x00");
  return 0;
}

}  // namespace

int main(int, char** arguments) {
  const std::string command = arguments[1], argument = arguments[2];
  if (command == "products") return products(std::stoi(argument));
  if (command == "eight_tiles") return eight_tiles(std::stoi(argument));
  if (command == "addressing") return addressing();
  if (command == "registers") return registers();
  if (command == "wrong") return wrong(argument);
  if (command == "unknown") return unknown(argument);
  return 2;
}
