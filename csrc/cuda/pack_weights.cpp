// Packs weights in the order in which a program's convolutions read them.
#include "bf16.h"
#include "program.h"

namespace pathnet::cuda {
namespace {

// Packs one convolution's weights: [chunk][slice][part][tap of the slice][tile][lane][4].
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
              float remainder = value(unit, scales, tap, chunk * kReduced + fragment_row(lane, i),
                                      tile * kChannelTile + fragment_column(lane));
              for (int part = 0; part < parts_; ++part) {
                const uint16_t term = to_bf16(remainder);
                out[fragment_index(tiles, part * taps + tap % taps, tile, lane) + i] = term;
                remainder -= from_bf16(term);
              }
            }
          }
        }
      }
    }
  }

 private:
  // Returns one weight. `tap` counts column by column, and in the backward pass through the flipped kernel.
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
