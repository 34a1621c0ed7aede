#include "kept_memory.h"

#include <algorithm>
#include <thread>
#include <vector>

#include "cpu/memory.h"
#include "dice.h"
#include "report.h"

namespace trial {
namespace {

constexpr int kThreads = 4, kTurns = 200;

struct Kept {
  uint8_t* bytes;
  size_t size;
  uint8_t pattern;

  bool whole() const {
    return std::all_of(bytes, bytes + size, [&](uint8_t byte) { return byte == pattern; });
  }
};

void take_and_give_back(uint64_t seed, int thread, bool& whole) {
  Dice dice(seed * kThreads + uint64_t(thread));
  std::vector<Kept> all;
  whole = true;
  for (int turn = 0; turn < kTurns || !all.empty(); ++turn) {
    if (turn < kTurns && dice.chance(0.55)) {
      // Few sizes, so that threads take what another gave back.
      const size_t size = size_t(dice.one_of<int64_t>({1, 64, 4095, 4096, 4097, 8192, 50000}));
      const Kept kept = {static_cast<uint8_t*>(pathnet::cpu::take_memory(size)), size, uint8_t(dice.between(1, 255))};
      whole = whole && reinterpret_cast<uintptr_t>(kept.bytes) % 64 == 0;
      std::fill_n(kept.bytes, size, kept.pattern);
      all.push_back(kept);
    } else if (!all.empty()) {
      std::swap(all[dice.below(int64_t(all.size()))], all.back());
      whole = whole && all.back().whole();
      pathnet::cpu::give_memory_back(all.back().bytes);
      all.pop_back();
    }
  }
}

}  // namespace

void try_kept_memory(uint64_t seed) {
  doing = text("kept memory, seed %llu", static_cast<unsigned long long>(seed));
  bool whole[kThreads];
  std::vector<std::thread> threads;
  for (int thread = 0; thread < kThreads; ++thread) {
    threads.emplace_back([&, thread] { take_and_give_back(seed, thread, whole[thread]); });
  }
  for (std::thread& thread : threads) thread.join();
  for (bool all : whole) {
    if (!all) fail("a block is not at the start of a line, or another was written in it");
  }
}

}  // namespace trial
