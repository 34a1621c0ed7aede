// The kernels' twin and their index arithmetic with a plain C interface. It does not include torch, so that a
// mutated copy compiles in seconds.
#include <cstring>
#include <stdexcept>
#include <string>

#include "program.h"
#include "routed_backward.h"
#include "routed_forward.h"

using namespace pathnet;
using namespace pathnet::cuda;

namespace {

std::string last_finding;

// Keeps the finding until the next one, and returns it.
const char* keep(const std::string& finding) {
  last_finding = finding;
  return last_finding.c_str();
}

struct PlanTables {
  const int64_t* blocks;
  int64_t block_count;
  const int64_t* units;
  int64_t unit_count;
  const float* weights;
  const float* scales;

  Plan plan() const {
    return {reinterpret_cast<const Block*>(blocks),
            block_count,
            reinterpret_cast<const Unit*>(units),
            unit_count,
            weights,
            scales,
            nullptr,
            0};
  }
};

}  // namespace

extern "C" {

// Writes a program; returns the number of its numbers, or -1 if the network is refused or the capacity exceeded.
int64_t twin_program(const PlanTables* tables, int backward, int parts, int shared_bytes, int32_t* numbers,
                     int64_t capacity) {
  try {
    const std::vector<int32_t> program = make_program(tables->plan(), backward != 0, parts, shared_bytes);
    if (int64_t(program.size()) > capacity) return -1;
    std::memcpy(numbers, program.data(), program.size() * sizeof(int32_t));
    return int64_t(program.size());
  } catch (const std::invalid_argument&) {
    return -1;
  }
}

void twin_weights(const PlanTables* tables, const int32_t* program, uint8_t* packed) {
  pack_program_weights(tables->plan(), *reinterpret_cast<const Program*>(program), packed);
}

// Writes the facts of a program that the judge needs: six sizes, and for each block's two units and projection the
// bytes at which its weights and bits begin and the number of slices of a chunk.
void twin_facts(const int32_t* numbers, int32_t* facts) {
  const Program& program = *reinterpret_cast<const Program*>(numbers);
  *facts++ = program.weights_bytes;
  *facts++ = program.bits_bytes;
  *facts++ = program.scratch_size;
  *facts++ = program.affine_size;
  *facts++ = program.samples;
  *facts++ = program.shared_bytes;
  for (int b = 0; b < program.block_count; ++b) {
    const BlockForm& form = program.blocks()[b];
    for (const Conv* conv : {&form.units[0], &form.units[1], &form.projection}) {
      *facts++ = conv->weights_byte;
      *facts++ = conv->bits_byte;
      *facts++ = conv->slices;
    }
  }
}

const char* twin_backward(const PathBackward* job) { return keep(run_routed_backward(*job)); }
const char* twin_forward(const PathForward* job) { return keep(run_routed_forward(*job)); }

void probe_sizes(const Image* image, int32_t* sizes) {
  sizes[0] = image->plane_bytes();
  sizes[1] = image->bits_bytes();
  sizes[2] = image->lane_order_size();
}
int probe_unit_byte(const Image* image, int base, int pixel, int unit) { return image->unit_byte(base, pixel, unit); }
int probe_bit_index(const Image* image, int channel, int y, int x) { return bit_index(*image, channel, y, x); }
int probe_lane_order(const Image* image, int strip, int row, int tile, int lane) {
  return image->lane_order_index(strip, row, tile, lane);
}
int probe_quotient(int divisor, int value) { return divider(divisor).quotient(value); }
}
