// Chooses a program: resident if that fits, with the largest number of samples, since they share every fetch of the
// weights; else windowed with the least traffic from L2.
#include <stdexcept>
#include <string>

#include "program_builder.h"
#include "refusal.h"
#include "supported.h"

namespace pathnet::cuda {
namespace {

// Largest scratch for the images of a thread block of several samples. The images of as many thread blocks as a GPU
// has multiprocessors are to stay in its L2: 28 MB of an A100's 40.
constexpr int kMaxScratch = 256 << 10;

const Program& program_of(const std::vector<int32_t>& numbers) {
  return *reinterpret_cast<const Program*>(numbers.data());
}

// Returns the bytes of weights and of image rows that a thread block reads in a pass through all blocks.
double traffic(const Program& program) {
  double bytes = 0.0;
  for (int b = 0; b < program.block_count; ++b) {
    const BlockForm& form = program.blocks()[b];
    for (const Conv* conv : {&form.units[0], &form.units[1], &form.projection}) {
      if (conv->pass_count == 0) continue;
      bytes += double(conv->reads) * conv->slice_bytes();
      for (int i = 0; i < conv->pass_count; ++i) {
        const Pass& pass = conv->passes[i];
        for (int window = 0; window < pass.windows; ++window) {
          bytes += double(program.samples) * program.parts * window_of(*conv, pass, window).pixels *
                   (kUnitBytes << conv->source.unit_shift());
        }
      }
    }
  }
  return bytes;
}

class Planner {
 public:
  explicit Planner(const ProgramSpec& spec) : spec_(spec) {
    for (int64_t b = 0; b < spec.plan.block_count; ++b) check_supported(spec.plan, b);
  }

  std::vector<int32_t> program() const {
    for (int slicing = 0; slicing <= max_slicing(); ++slicing) {
      for (int samples = max_samples(); samples >= 1; --samples) {
        std::vector<int32_t> numbers = build_program(spec_, {false, slicing, samples, 1});
        if (fits(numbers)) return numbers;
      }
    }
    std::vector<int32_t> best;
    double least = 0.0;
    for (int samples = 1; samples <= max_samples(); ++samples) {
      for (int windows = 1; windows <= max_windows(); ++windows) {
        bool fitted = false;
        for (int slicing = 0; slicing <= max_slicing(); ++slicing) {
          std::vector<int32_t> numbers = build_program(spec_, {true, slicing, samples, windows});
          if (!fits(numbers)) continue;
          fitted = true;
          if (samples > 1 && program_of(numbers).images_bytes > kMaxScratch) continue;
          const double bytes = traffic(program_of(numbers)) / samples;
          if (best.empty() || bytes < least) {
            best = numbers;
            least = bytes;
          }
        }
        // More windows only read more rows twice.
        if (fitted) break;
      }
    }
    if (best.empty()) {
      const std::vector<int32_t> smallest = build_program(spec_, {true, max_slicing(), 1, max_windows()});
      throw std::invalid_argument(
          "block " + std::to_string(largest_block(program_of(smallest))) +
          ": a window of its images and the weights need " + std::to_string(program_of(smallest).shared_bytes) +
          " bytes of shared memory, and a thread block has " + std::to_string(spec_.shared_bytes));
    }
    return best;
  }

 private:
  bool fits(const std::vector<int32_t>& numbers) const {
    return program_of(numbers).shared_bytes <= spec_.shared_bytes;
  }

  int max_samples() const { return spec_.backward ? kMaxSamples : 1; }

  // Only two terms per number: the products have no shape of tile by taps for one term and four column tiles.
  int max_slicing() const { return spec_.parts == 2 ? 2 : 1; }

  // Lines of strips in the tallest image.
  int max_windows() const {
    int lines = 1;
    for (int64_t b = 0; b < spec_.plan.block_count; ++b) {
      const Block& block = spec_.plan.blocks[b];
      lines = std::max(
          {lines, ceil_div(int(block.in_height), kStripRows / 2), ceil_div(int(block.out_height), kStripRows / 2)});
    }
    return lines;
  }

  const ProgramSpec spec_;
};

}  // namespace

std::vector<int32_t> make_program(const Plan& plan, bool backward, int parts, int shared_bytes) {
  return Planner({plan, backward, parts, shared_bytes}).program();
}

}  // namespace pathnet::cuda
