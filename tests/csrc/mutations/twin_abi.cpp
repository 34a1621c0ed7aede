// The kernels' twin and their index arithmetic behind a plain C interface, without torch, so that a mutated copy
// compiles in seconds.
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

const char* told(const std::string& finding) {
  last_finding = finding;
  return last_finding.c_str();
}

struct Tables {
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

// Numbers of the program, or -1 where it is refused or does not fit.
int64_t twin_program(const Tables* tables, int backward, int parts, int shared_bytes, int32_t* numbers,
                     int64_t capacity) {
  try {
    const std::vector<int32_t> made = make_program(tables->plan(), backward != 0, parts, shared_bytes);
    if (int64_t(made.size()) > capacity) return -1;
    std::memcpy(numbers, made.data(), made.size() * sizeof(int32_t));
    return int64_t(made.size());
  } catch (const std::invalid_argument&) {
    return -1;
  }
}

void twin_weights(const Tables* tables, const int32_t* program, uint8_t* packed) {
  pack_program_weights(tables->plan(), *reinterpret_cast<const Program*>(program), packed);
}

// What of a program the judge needs: bytes of weights and of a sample's bits, scratch, samples, and for each block's
// two units and projection where its weights and bits begin, and how its weights are sliced.
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

const char* twin_backward(const PathBackward* job) { return told(run_routed_backward(*job)); }
const char* twin_forward(const PathForward* job) { return told(run_routed_forward(*job)); }

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
