// Builds the program of one variant: where images and weights are, and how each convolution is cut.
#pragma once

#include <algorithm>
#include <vector>

#include "program.h"

namespace pathnet::cuda {

// The network and the limits that a program is built for.
struct ProgramSpec {
  const Plan& plan;
  bool backward;
  int parts;         // bf16 terms of a number
  int shared_bytes;  // of a thread block, at most
};

// The choices that a program leaves open; make_program takes the best variant that fits.
struct Variant {
  bool windowed;
  int slicing;  // 0: chunks are copied whole; 1 or 2: those too large for that by columns, or by taps
  int samples;  // of a thread block
  int windows;  // least number, of a convolution's largest pass
};

// Returns the rows of the source that one window of a pass reads.
inline Window window_of(const Conv& conv, const Pass& pass, int window) {
  return Window(conv.source, pass, conv.target.strip_rows(), window);
}

// Returns the numbers of the program, whose shared_bytes may exceed the spec's.
std::vector<int32_t> build_program(const ProgramSpec& spec, const Variant& variant);

}  // namespace pathnet::cuda
