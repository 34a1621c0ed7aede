#include "program_builder.h"

#include "supported.h"

namespace pathnet::cuda {
namespace {

class Builder {
 public:
  Builder(const ProgramSpec& spec, const Variant& variant)
      : plan_(spec.plan),
        variant_(variant),
        backward_(spec.backward),
        parts_(spec.parts),
        shared_bytes_(spec.shared_bytes) {}

  std::vector<int32_t> program() {
    std::vector<int32_t> numbers(program_size(plan_.block_count), 0);
    Program& program = *reinterpret_cast<Program*>(numbers.data());
    BlockForm* blocks = reinterpret_cast<BlockForm*>(numbers.data() + sizeof(Program) / 4);
    program.backward = backward_;
    program.parts = parts_;
    program.samples = variant_.samples;
    program.windowed = variant_.windowed;
    program.block_count = int32_t(plan_.block_count);
    program.channels_in = int32_t(plan_.blocks[0].in_channels);
    program.channels_out = int32_t(plan_.blocks[plan_.block_count - 1].out_channels);
    for (int64_t b = 0; b < plan_.block_count; ++b) describe(program, blocks[b], plan_.blocks[b]);
    for (int64_t b = 0; b < plan_.block_count; ++b) {
      for (Conv* conv : {&blocks[b].units[0], &blocks[b].units[1], &blocks[b].projection}) {
        if (conv->pass_count > 0) cut(program, *conv);
      }
    }
    if (backward_) {
      place_gradients(program, blocks);
    } else {
      place_operands(program, blocks);
    }
    for (int64_t b = 0; b < plan_.block_count; ++b) connect(blocks[b]);
    // A third slot lets a slice's copy run during a whole slice's product; two are enough for correctness.
    program.slots = program.slot_byte(3) <= shared_bytes_ ? 3 : 2;
    program.shared_bytes = program.slot_byte(program.slots);
    program.checksum = checksum_of(numbers.data(), int64_t(numbers.size()));
    return numbers;
  }

 private:
  int image_bytes(const Image& image) const { return variant_.samples * parts_ * image.plane_bytes(); }

  // Fills in all that does not depend on other blocks' convolutions.
  void describe(Program& program, BlockForm& form, const Block& block) {
    const Unit* units[2] = {&plan_.units[block.first_unit], &plan_.units[block.first_unit + 1]};
    form.skip = int32_t(block.skip);
    form.relu = units[0]->bits_offset >= 0;
    form.skip_channels = int32_t(block.in_channels);
    form.pad_before = int32_t(block.pad_before);
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
    form.units[0] = conv(program, form.in, form.out, 3, form.stride, {first_bits, inner_affine, -1});
    form.units[1] = conv(program, form.out, form.out, 3, 1, {second_bits, -1, bias});
    form.units[backward_ ? 0 : 1].behind_relu = block.skip == kActivated;
    if (form.skip == kProjection) {
      form.projection = conv(program, form.in, form.out, 1, form.stride,
                             {backward_ ? form.bits_byte : -1, -1, program.affine_size});
      program.affine_size += form.out.channels;
    }
    program.scratch_size =
        std::max({program.scratch_size, 2 * form.in.lane_order_size(), 2 * form.out.lane_order_size()});
  }

  // The places that a convolution's epilogue reads or writes, as Conv has them.
  struct Places {
    int32_t bits_byte, affine, bias;
  };

  Conv conv(Program& program, const Image& in, const Image& out, int kernel, int stride, const Places& places) {
    Conv conv = {};
    conv.source = backward_ ? out : in;
    conv.target = backward_ ? in : out;
    conv.kernel = kernel;
    conv.stride = stride;
    conv.chunks = conv.source.channels / kReduced;
    conv.chunk_bytes = chunk_bytes(parts_, kernel * kernel, conv.target.tiles());
    conv.weights_byte = program.weights_bytes;
    conv.bits_byte = places.bits_byte;
    conv.affine = places.affine;
    conv.bias = places.bias;
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
    const int max_slices = variant_.slicing == 0 ? 1 : variant_.slicing == 1 ? kernel : kernel * kernel;
    largest_slice_ = std::max(largest_slice_, conv.chunk_bytes / max_slices);
    return conv;
  }

  Axis axis(int kernel, int stride, int parity) const {
    return backward_ ? backward_axis(kernel, stride, parity) : forward_axis(kernel, stride);
  }

  // As many as leave no warp without work, since each further tile saves a load of the source; four only with one
  // term a number, because of the registers.
  int column_tiles(const Conv& conv) const {
    if (conv.target.channels == 16) return parts_ == 1 ? 2 : 1;
    if (!conv.dense()) return 2;
    const int pairs = ceil_div(variant_.samples * conv.target.strips(), 2), all = conv.target.tiles();
    if (parts_ == 1 && all % 4 == 0 && pairs * (all / 4) >= kWarps) return 4;
    return pairs * (all / 2) >= kWarps ? 2 : 1;
  }

  // Cuts a convolution's passes into windows and its weights into slices, which depend on the largest slice of all.
  void cut(Program& program, Conv& conv) const {
    if (variant_.windowed) {
      for (int i = 0; i < conv.pass_count; ++i) {
        Pass& pass = conv.passes[i];
        pass = in_windows(pass, ceil_div(pass.lines(), variant_.windows));
        for (int window = 0; window < pass.windows; ++window) {
          const int pixels = round_up(window_of(conv, pass, window).pixels, kStripWidth);
          conv.window_plane = std::max(conv.window_plane, pixels * (kUnitBytes << conv.source.unit_shift()));
        }
      }
      program.window_bytes = std::max(program.window_bytes, variant_.samples * parts_ * conv.window_plane);
    }
    conv.slices = 1;
    for (int i = 0; i < variant_.slicing && conv.slice_bytes() > largest_slice_; ++i) conv.slices *= conv.kernel;
    program.slot_bytes = std::max(program.slot_bytes, conv.slice_bytes());
    conv.reads = conv.slices_read(variant_.samples);
  }

  // The gradient and the intermediate of a stage (blocks with identity skips) are side by side at one end of the
  // images' memory, and the next stage's at the other end, since the block between two stages reads one pair while it
  // writes the other's gradient.
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

  // Turns offsets into the images into bytes of shared memory, or of the scratch, and hands them to the convolutions.
  void connect(BlockForm& form) const {
    for (int32_t* byte : {&form.in_byte, &form.out_byte, &form.mid_byte}) {
      if (!variant_.windowed) *byte += kControlBytes;
    }
    form.units[0].source_byte = backward_ ? form.mid_byte : form.in_byte;
    form.units[0].target_byte = backward_ ? form.in_byte : form.mid_byte;
    form.units[1].source_byte = backward_ ? form.out_byte : form.mid_byte;
    form.units[1].target_byte = backward_ ? form.mid_byte : form.out_byte;
    form.projection.source_byte = backward_ ? form.out_byte : form.in_byte;
    form.projection.target_byte = backward_ ? form.in_byte : form.out_byte;
  }

  const Plan& plan_;
  const Variant variant_;
  const bool backward_;
  const int parts_, shared_bytes_;
  int largest_slice_ = 0;  // of all convolutions, cut as finely as the variant allows
};

}  // namespace

std::vector<int32_t> build_program(const ProgramSpec& spec, const Variant& variant) {
  return Builder(spec, variant).program();
}

}  // namespace pathnet::cuda
