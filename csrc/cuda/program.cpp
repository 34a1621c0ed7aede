// Queries of a program: its extremes, and whether it is unchanged.
#include "program.h"

#include <algorithm>
#include <cstddef>

namespace pathnet::cuda {

int Program::max_windows() const {
  int most = 0;
  for (int b = 0; windowed && b < block_count; ++b) {
    for (const Conv* conv : {&blocks()[b].units[0], &blocks()[b].units[1], &blocks()[b].projection}) {
      for (int i = 0; i < conv->pass_count; ++i) most = std::max(most, int(conv->passes[i].windows));
    }
  }
  return most;
}

int Program::max_slices() const {
  int most = 1;
  for (int b = 0; b < block_count; ++b) {
    for (const Conv& conv : blocks()[b].units) most = std::max(most, int(conv.slices));
  }
  return most;
}

int32_t checksum_of(const int32_t* numbers, int64_t size) {
  uint32_t sum = 2166136261u;
  for (int64_t i = 0; i < size; ++i) {
    if (i != offsetof(Program, checksum) / 4) sum = (sum ^ uint32_t(numbers[i])) * 16777619u;
  }
  return int32_t(sum);
}

bool is_program(const int32_t* numbers, int64_t size) {
  if (size < program_size(1)) return false;
  const Program& program = *reinterpret_cast<const Program*>(numbers);
  return size == program_size(program.block_count) && program.checksum == checksum_of(numbers, size);
}

}  // namespace pathnet::cuda
