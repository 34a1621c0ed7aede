#include "program.h"

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <stdexcept>

#include "bf16.h"

namespace pathnet::cuda {
namespace {

int round_up(int64_t value, int64_t multiple) { return int((value + multiple - 1) / multiple * multiple); }

[[noreturn]] void refuse(int64_t block, const std::string& reason) {
  throw std::invalid_argument("block " + std::to_string(block + 1) + " " + reason);
}

Image padded(int64_t channels, int64_t height, int64_t width) {
  return {int32_t(round_up(channels, kReduced)), int32_t(height), int32_t(width)};
}

// Pixels of an image with its border, so that bytes of a thread block's images stay below 2^31.
constexpr int64_t kMostPixels = 1 << 16;

// Elements of a sample in whole strips, so that those of two copies and 256 thread blocks stay below 2^31: a column
// of pixels takes a strip of eight.
constexpr int kMostElements = 1 << 22;

void check_form(const Plan& plan, int64_t index) {
  const Block& block = plan.blocks[index];
  // Before anything is reckoned in 32 bits.
  for (int64_t pixels :
       {(block.in_height + 8) * (block.in_width + 2), (block.out_height + 8) * (block.out_width + 2)}) {
    if (pixels > kMostPixels) {
      refuse(index, "has images of more than " + std::to_string(kMostPixels) + " pixels with their borders");
    }
  }
  if (block.unit_count != 2) refuse(index, "is not a basic block (two convolutions)");
  const Unit& first = plan.units[block.first_unit];
  const Unit& second = plan.units[block.first_unit + 1];
  for (const Unit* unit : {&first, &second}) {
    // What enters the network is activated where its first block reads it; later units are by epilogues.
    const bool bare = index == 0 && unit == &first;
    if (unit->scale_offset < 0 || (unit->bits_offset < 0 && !bare)) {
      refuse(index, "has a convolution without BN and ReLU");
    }
    if (unit->kernel != 3 || unit->padding != 1) refuse(index, "has a convolution that is not 3x3 with padding 1");
    if (unit->in_channels > kMaxChannels || unit->out_channels > kMaxChannels) {
      refuse(index, "has more than " + std::to_string(kMaxChannels) + " channels");
    }
  }
  for (const Image& image : {padded(block.in_channels, block.in_height, block.in_width),
                             padded(block.out_channels, block.out_height, block.out_width)}) {
    if (image.lane_order_size() > kMostElements) {
      refuse(index,
             "has images of more than " + std::to_string(kMostElements) + " numbers in strips of eight pixels");
    }
  }
  if (first.stride > 2 || second.stride != 1)
    refuse(index, "has a stride other than 1, or 2 in its first convolution");
  if (round_up(first.out_channels, kReduced) != round_up(second.out_channels, kReduced)) {
    refuse(index, "has convolutions of different widths");
  }
  if (block.skip == kProjection) {
    const Unit& projection = plan.units[block.projection_unit];
    if (projection.kernel != 1 || projection.padding != 0 || projection.stride != first.stride) {
      refuse(index, "has a projection that is not 1x1 with the stride of its first convolution");
    }
  }
}

int32_t checksum_of(const int32_t* numbers, int64_t size) {
  uint32_t sum = 2166136261u;
  for (int64_t i = 0; i < size; ++i) {
    if (i != offsetof(Program, checksum) / 4) sum = (sum ^ uint32_t(numbers[i])) * 16777619u;
  }
  return int32_t(sum);
}

// The images of as many thread blocks as a GPU has multiprocessors are to stay in its L2: 28 MB of an A100's 40.
constexpr int kMostScratch = 256 << 10;

// What a planner chooses among.
struct Shape {
  bool windowed;
  int slicing;  // whether chunks are copied whole, 0; where they are too large for that by columns, 1, or by taps, 2
  int samples;
  int windows;  // at least, of a convolution's largest pass
};

class Planner {
 public:
  Planner(const Plan& plan, bool backward, int parts, int shared_bytes)
      : plan_(plan), backward_(backward), parts_(parts), shared_bytes_(shared_bytes) {
    for (int64_t b = 0; b < plan.block_count; ++b) check_form(plan, b);
  }

  // Resident where that fits, with the largest number of samples, since they share every fetch of the weights; else
  // windowed with the least traffic from L2.
  std::vector<int32_t> program() {
    const int most_samples = backward_ ? kMaxSamples : 1;
    for (int slicing = 0; slicing <= most_slicing(); ++slicing) {
      for (int samples = most_samples; samples >= 1; --samples) {
        std::vector<int32_t> numbers = with({false, slicing, samples, 1});
        if (fits(numbers)) return numbers;
      }
    }
    std::vector<int32_t> best;
    double least = 0.0;
    for (int samples = 1; samples <= most_samples; ++samples) {
      for (int windows = 1; windows <= most_windows(); ++windows) {
        bool fitted = false;
        for (int slicing = 0; slicing <= most_slicing(); ++slicing) {
          std::vector<int32_t> numbers = with({true, slicing, samples, windows});
          if (!fits(numbers)) continue;
          fitted = true;
          if (samples > 1 && program_of(numbers).images_bytes > kMostScratch) continue;
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
      const int needed = program_of(with({true, most_slicing(), 1, most_windows()})).shared_bytes;
      throw std::invalid_argument("a window of the network's images needs " + std::to_string(needed) +
                                  " bytes of shared memory, and a thread block has " + std::to_string(shared_bytes_));
    }
    return best;
  }

 private:
  static const Program& program_of(const std::vector<int32_t>& numbers) {
    return *reinterpret_cast<const Program*>(numbers.data());
  }
  bool fits(const std::vector<int32_t>& numbers) const { return program_of(numbers).shared_bytes <= shared_bytes_; }

  int image_bytes(const Image& image) const { return shape_.samples * parts_ * image.plane_bytes(); }

  // By taps the products have no shape of tile for one term a number and four column tiles.
  int most_slicing() const { return parts_ == 2 ? 2 : 1; }

  // Lines of strips in the tallest image.
  int most_windows() const {
    int lines = 1;
    for (int64_t b = 0; b < plan_.block_count; ++b) {
      const Block& block = plan_.blocks[b];
      lines = std::max(
          {lines, ceil_div(int(block.in_height), kStripRows / 2), ceil_div(int(block.out_height), kStripRows / 2)});
    }
    return lines;
  }

  // Bytes that a thread block reads in a walk through all blocks: weights, and rows of images.
  double traffic(const Program& program) const {
    double bytes = 0.0;
    for (int b = 0; b < program.block_count; ++b) {
      const BlockForm& form = program.blocks()[b];
      for (const Conv* conv : {&form.units[0], &form.units[1], &form.projection}) {
        if (conv->pass_count == 0) continue;
        bytes += double(conv->reads) * conv->slice_bytes();
        for (int i = 0; i < conv->pass_count; ++i) {
          const Pass& pass = conv->passes[i];
          for (int window = 0; window < pass.windows; ++window) {
            bytes += double(shape_.samples) * parts_ * window_of(*conv, pass, window).pixels *
                     (kUnitBytes << conv->source.unit_shift());
          }
        }
      }
    }
    return bytes;
  }

  static Window window_of(const Conv& conv, const Pass& pass, int window) {
    return Window(conv.source, pass, conv.target.strip_rows(), window);
  }

  std::vector<int32_t> with(const Shape& shape) {
    shape_ = shape;
    largest_slice_ = 0;
    std::vector<int32_t> numbers(program_size(plan_.block_count), 0);
    Program& program = *reinterpret_cast<Program*>(numbers.data());
    BlockForm* blocks = reinterpret_cast<BlockForm*>(numbers.data() + sizeof(Program) / 4);
    program.backward = backward_;
    program.parts = parts_;
    program.samples = shape.samples;
    program.windowed = shape.windowed;
    program.block_count = int32_t(plan_.block_count);
    program.channels_in = int32_t(plan_.blocks[0].in_channels);
    program.channels_out = int32_t(plan_.blocks[plan_.block_count - 1].out_channels);
    describe(program, blocks);
    for (int64_t b = 0; b < plan_.block_count; ++b) {
      for (Conv* conv : {&blocks[b].units[0], &blocks[b].units[1], &blocks[b].projection}) {
        if (conv->pass_count > 0) finish(program, *conv);
      }
    }
    if (backward_) {
      place_gradients(program, blocks);
    } else {
      place_operands(program, blocks);
    }
    for (int64_t b = 0; b < plan_.block_count; ++b) connect(blocks[b]);
    // A third slot lets a slice's copy run for a whole slice's product; two are enough to be correct.
    program.slots = program.slot_byte(3) <= shared_bytes_ ? 3 : 2;
    program.shared_bytes = program.slot_byte(program.slots);
    program.checksum = checksum_of(numbers.data(), int64_t(numbers.size()));
    return numbers;
  }

  // What of a convolution depends on the shape: how its weights are sliced, and its windows.
  void finish(Program& program, Conv& conv) const {
    if (shape_.windowed) {
      for (int i = 0; i < conv.pass_count; ++i) {
        Pass& pass = conv.passes[i];
        pass = in_windows(pass, ceil_div(pass.lines(), shape_.windows));
        for (int window = 0; window < pass.windows; ++window) {
          const int pixels = round_up(window_of(conv, pass, window).pixels, kStripWidth);
          conv.window_plane = std::max(conv.window_plane, pixels * (kUnitBytes << conv.source.unit_shift()));
        }
      }
      program.window_bytes = std::max(program.window_bytes, shape_.samples * parts_ * conv.window_plane);
    }
    conv.slices = 1;
    for (int cut = 0; cut < shape_.slicing && conv.slice_bytes() > largest_slice_; ++cut) conv.slices *= conv.kernel;
    program.slot_bytes = std::max(program.slot_bytes, conv.slice_bytes());
    conv.reads = conv.slices_read(shape_.samples);
  }

  void describe(Program& program, BlockForm* blocks) {
    for (int64_t b = 0; b < plan_.block_count; ++b) {
      const Block& block = plan_.blocks[b];
      BlockForm& form = blocks[b];
      const Unit* units[2] = {&plan_.units[block.first_unit], &plan_.units[block.first_unit + 1]};
      form.skip = int32_t(block.skip);
      form.relu = units[0]->bits_offset >= 0;
      form.skip_channels = int32_t(block.in_channels);
      form.stride = int32_t(units[0]->stride);
      form.in = padded(block.in_channels, block.in_height, block.in_width);
      form.out = padded(block.out_channels, block.out_height, block.out_width);
      form.bits_byte = program.bits_bytes;
      program.bits_bytes += form.in.bits_bytes();
      const int32_t inner_bits = program.bits_bytes;
      program.bits_bytes += form.out.bits_bytes();
      form.affine = program.affine_size;
      program.affine_size += 2 * form.in.channels;
      const int32_t inner_affine = program.affine_size;
      program.affine_size += 2 * form.out.channels;
      const int32_t bias = program.affine_size;
      program.affine_size += form.out.channels;
      const int32_t first_bits = backward_ ? form.bits_byte : inner_bits;
      const int32_t second_bits = backward_ ? inner_bits : -1;
      form.units[0] = conv(program, form.in, form.out, 3, form.stride, first_bits, inner_affine, -1);
      form.units[1] = conv(program, form.out, form.out, 3, 1, second_bits, -1, bias);
      form.units[backward_ ? 0 : 1].behind_relu = block.skip == kActivated;
      if (form.skip == kProjection) {
        form.projection = conv(program, form.in, form.out, 1, form.stride, backward_ ? form.bits_byte : -1, -1,
                               program.affine_size);
        program.affine_size += form.out.channels;
      }
      program.scratch_size =
          std::max({program.scratch_size, 2 * form.in.lane_order_size(), 2 * form.out.lane_order_size()});
    }
  }

  Conv conv(Program& program, const Image& in, const Image& out, int kernel, int stride, int32_t bits, int32_t affine,
            int32_t bias) {
    Conv conv = {};
    conv.source = backward_ ? out : in;
    conv.target = backward_ ? in : out;
    conv.kernel = kernel;
    conv.stride = stride;
    conv.chunks = conv.source.channels / kReduced;
    conv.chunk_bytes = chunk_bytes(parts_, kernel * kernel, conv.target.tiles());
    conv.weights_byte = program.weights_bytes;
    conv.bits_byte = bits;
    conv.affine = affine;
    conv.bias = bias;
    conv.column_tiles = column_tiles(conv);
    const int parities = backward_ && kernel == 3 ? stride : 1;
    for (int parity = 0; parity < parities * parities; ++parity) {
      const Axis vertical = axis(kernel, stride, parity / parities),
                 horizontal = axis(kernel, stride, parity % parities);
      // A side of one pixel has no odd positions.
      if (vertical.parity >= conv.target.height || horizontal.parity >= conv.target.width) continue;
      conv.passes[conv.pass_count++] = make_pass(conv.target, vertical, horizontal, conv.column_tiles, conv.dense());
    }
    program.weights_bytes += conv.chunks * conv.chunk_bytes;
    const int most_slices = shape_.slicing == 0 ? 1 : shape_.slicing == 1 ? kernel : kernel * kernel;
    largest_slice_ = std::max(largest_slice_, conv.chunk_bytes / most_slices);
    return conv;
  }

  Axis axis(int kernel, int stride, int parity) const {
    return backward_ ? backward_axis(kernel, stride, parity) : forward_axis(kernel, stride);
  }

  // As many as leave no warp without work, since every further one saves a reading of the source; four only with one
  // term a number, for the registers' sake.
  int column_tiles(const Conv& conv) const {
    if (conv.target.channels == 16) return parts_ == 1 ? 2 : 1;
    if (!conv.dense()) return 2;
    const int pairs = ceil_div(shape_.samples * conv.target.strips(), 2), all = conv.target.tiles();
    if (parts_ == 1 && all % 4 == 0 && pairs * (all / 4) >= kWarps) return 4;
    return pairs * (all / 2) >= kWarps ? 2 : 1;
  }

  // Gradient and intermediate of a stage (blocks with identity skips) stand side by side at one end of the arena; the
  // next stage's at the other end, since the block between two stages reads one pair while it writes the other's
  // gradient.
  void place_gradients(Program& program, BlockForm* blocks) {
    struct Stage {
      int grad, mid;
    };
    std::vector<Stage> stages;  // from the last block to the first
    for (int64_t b = plan_.block_count - 1; b >= 0; --b) {
      if (stages.empty()) stages.push_back({image_bytes(blocks[b].out), 0});
      stages.back().mid = image_bytes(blocks[b].out);
      if (blocks[b].changes_shape()) stages.push_back({image_bytes(blocks[b].in), 0});
    }
    for (size_t s = 0; s < stages.size(); ++s) {
      const int next = s + 1 < stages.size() ? stages[s + 1].grad : 0;
      program.images_bytes = std::max(program.images_bytes, stages[s].grad + stages[s].mid + next);
    }
    auto grad_byte = [&](size_t s) { return s % 2 == 0 ? 0 : program.images_bytes - stages[s].grad; };
    size_t stage = 0;
    for (int64_t b = plan_.block_count - 1; b >= 0; --b) {
      BlockForm& form = blocks[b];
      form.out_byte = grad_byte(stage);
      form.mid_byte = stage % 2 == 0 ? stages[stage].grad : form.out_byte - stages[stage].mid;
      if (form.changes_shape()) ++stage;
      form.in_byte = grad_byte(stage);
    }
  }

  void place_operands(Program& program, BlockForm* blocks) {
    int operand = 0, mid = 0;
    for (int64_t b = 0; b < plan_.block_count; ++b) {
      operand = std::max({operand, image_bytes(blocks[b].in), image_bytes(blocks[b].out)});
      mid = std::max(mid, image_bytes(blocks[b].out));
    }
    for (int64_t b = 0; b < plan_.block_count; ++b) blocks[b].mid_byte = operand;
    program.images_bytes = operand + mid;
  }

  // From offsets in the arena to bytes of shared memory, or of the scratch.
  void connect(BlockForm& form) const {
    for (int32_t* byte : {&form.in_byte, &form.out_byte, &form.mid_byte}) {
      if (!shape_.windowed) *byte += kControlBytes;
    }
    form.units[0].source_byte = backward_ ? form.mid_byte : form.in_byte;
    form.units[0].target_byte = backward_ ? form.in_byte : form.mid_byte;
    form.units[1].source_byte = backward_ ? form.out_byte : form.mid_byte;
    form.units[1].target_byte = backward_ ? form.mid_byte : form.out_byte;
    form.projection.source_byte = backward_ ? form.out_byte : form.in_byte;
    form.projection.target_byte = backward_ ? form.in_byte : form.out_byte;
  }

  const Plan& plan_;
  const bool backward_;
  const int parts_, shared_bytes_;
  Shape shape_ = {};
  int largest_slice_ = 0;
};

// One convolution's weights, [chunk][slice][part][tap of the slice][tile][lane][4].
class WeightPacker {
 public:
  WeightPacker(const Plan& plan, const Program& program, uint8_t* packed)
      : plan_(plan), backward_(program.backward != 0), parts_(program.parts), packed_(packed) {}

  void operator()(const Conv& conv, const Unit& unit, const float* scales) const {
    const int all_taps = conv.kernel * conv.kernel, taps = all_taps / conv.slices, tiles = conv.target.tiles();
    for (int chunk = 0; chunk < conv.chunks; ++chunk) {
      for (int tap = 0; tap < all_taps; ++tap) {
        uint16_t* out = reinterpret_cast<uint16_t*>(packed_ + conv.weights_byte + chunk * conv.chunk_bytes +
                                                    tap / taps * conv.slice_bytes());
        for (int tile = 0; tile < tiles; ++tile) {
          for (int lane = 0; lane < kWarpSize; ++lane) {
            for (int i = 0; i < 4; ++i) {
              float rest = value(unit, scales, tap, chunk * kReduced + fragment_row(lane, i),
                                 tile * kChannelTile + fragment_column(lane));
              for (int part = 0; part < parts_; ++part) {
                const uint16_t term = to_bf16(rest);
                out[fragment_index(tiles, part * taps + tap % taps, tile, lane) + i] = term;
                rest -= from_bf16(term);
              }
            }
          }
        }
      }
    }
  }

 private:
  // `tap` counts column by column, and backward the flipped kernel.
  float value(const Unit& unit, const float* scales, int tap, int reduced, int column) const {
    const int side = int(unit.kernel), flipped = backward_ ? side * side - 1 - tap : tap;
    const int row = flipped % side, across = flipped / side;
    const int64_t in = backward_ ? column : reduced, out = backward_ ? reduced : column;
    if (in >= unit.in_channels || out >= unit.out_channels) return 0.0f;
    const float weight =
        plan_.weights[unit.weight_offset + ((out * unit.in_channels + in) * side + row) * side + across];
    return backward_ ? weight * scales[in] : weight;
  }

  const Plan& plan_;
  const bool backward_;
  const int parts_;
  uint8_t* packed_;
};

}  // namespace

std::vector<int32_t> make_program(const Plan& plan, bool backward, int parts, int shared_bytes) {
  return Planner(plan, backward, parts, shared_bytes).program();
}

int Program::most_windows() const {
  int most = 0;
  for (int b = 0; windowed && b < block_count; ++b) {
    for (const Conv* conv : {&blocks()[b].units[0], &blocks()[b].units[1], &blocks()[b].projection}) {
      for (int i = 0; i < conv->pass_count; ++i) most = std::max(most, int(conv->passes[i].windows));
    }
  }
  return most;
}

int Program::most_slices() const {
  int most = 1;
  for (int b = 0; b < block_count; ++b) {
    for (const Conv& conv : blocks()[b].units) most = std::max(most, int(conv.slices));
  }
  return most;
}

bool is_program(const int32_t* numbers, int64_t size) {
  if (size < program_size(1)) return false;
  const Program& program = *reinterpret_cast<const Program*>(numbers);
  return size == program_size(program.block_count) && program.checksum == checksum_of(numbers, size);
}

void pack_program_weights(const Plan& plan, const Program& program, uint8_t* packed) {
  const WeightPacker pack(plan, program, packed);
  for (int64_t b = 0; b < plan.block_count; ++b) {
    const BlockForm& form = program.blocks()[b];
    const Block& block = plan.blocks[b];
    for (int u = 0; u < 2; ++u) {
      const Unit& unit = plan.units[block.first_unit + u];
      pack(form.units[u], unit, plan.scales + unit.scale_offset);
    }
    if (form.skip == kProjection) {
      pack(form.projection, plan.units[block.projection_unit],
           plan.scales + plan.units[block.first_unit].scale_offset);
    }
  }
}

}  // namespace pathnet::cuda
