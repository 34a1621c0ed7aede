// The epilogue of the routed backward pass: masks a convolution's results and stores them.
#pragma once

#include "backward_item.cuh"
#include "products.cuh"

namespace pathnet::cuda {

template <class Exec, int kParts, bool kWindowed>
struct BackwardEpilogue {
  using Item = BackwardItem<Exec, kParts, kWindowed>;
  using Images = pathnet::cuda::Images<Exec, kParts, kWindowed>;

  const Item& item;
  float keep, coefficient;  // target <- keep * target + coefficient * result
  // Whether the target is the gradient at the block's input: the result is then scaled and added, and its peak is
  // recorded. Otherwise, between the block's convolutions, it is only masked.
  bool last;
  bool adds;  // to a target that has been scaled already

  static PATHNET_DEVICE float start(const Conv&, int, int, int) { return 0.0f; }

  template <int rows, int tiles, bool dense>
  PATHNET_DEVICE uint32_t mask(const LocalConv& conv, const Pass& pass, const Strip& strip, int tile,
                               int lane) const {
    const uint8_t* bits = item.relu_bits(strip.sample, conv.bits_byte);
    if (dense || pass.vertical.target_step == 1) {
      return Exec::template load_bits<rows * tiles / 4>(bits + conv.target.bits_byte(strip.index, lane, tile));
    }
    uint32_t word = 0;
    const int x = (strip.x + lane_pixel(lane)) * pass.horizontal.target_step + pass.horizontal.parity;
    PATHNET_NO_UNROLL
    for (int row = 0; row < rows; ++row) {
      const int y = (strip.y + row) * pass.vertical.target_step + pass.vertical.parity;
      if (x >= conv.target.width || y >= conv.target.height) continue;
      for (int t = 0; t < tiles; ++t) {
        const int index = bit_index(conv.target, (tile + t) * kChannelTile + lane_channel(lane), y, x);
        word |= uint32_t(bits[index / 8] >> index % 8 & 3) << (t * rows * 2 + bit_in_tile(row, 0));
      }
    }
    return word;
  }

  // Bits beyond the image are zero, and so are the results that they mask.
  template <int rows, int tiles, bool dense, class LaneMasks, class LaneSums>
  PATHNET_DEVICE void store(const Conv& program_conv, const LocalConv& conv, const Pass& pass, const Strip& strip,
                            int tile, int half, LaneMasks& masks, LaneSums& sums) const {
    Exec& exec = item.exec;
    const Images images{exec};
    const Image target = conv.target;
    const int plane_bytes = target.plane_bytes();
    const int base = Images::sample_byte(target, conv.target_byte, strip.sample);
    if (!last) {
      exec.lanes([&](int lane) {
        const uint32_t mask = masks[lane];
        each_row<rows, tiles, dense>(target, base, pass, strip, tile, lane,
                                     [&](int row, bool, const int (&bytes)[tiles]) {
                                       PATHNET_UNROLL
                                       for (int t = 0; t < tiles; ++t) {
                                         const float* result = sums[lane].of[row][t] + 2 * half;
                                         const int bit = t * rows * 2 + bit_in_tile(row, 0);
                                         images.store_pair(bytes[t], plane_bytes, mask >> bit & 1 ? result[0] : 0.0f,
                                                           mask >> (bit + 1) & 1 ? result[1] : 0.0f);
                                       }
                                     });
      });
      return;
    }
    if (program_conv.behind_relu) {
      join<rows, tiles, dense, true>(target, base, pass, strip, tile, half, masks, sums);
    } else {
      join<rows, tiles, dense, false>(target, base, pass, strip, tile, half, masks, sums);
    }
  }

 private:
  // Adds the results to the part of the target that is kept, and records the largest magnitude.
  template <int rows, int tiles, bool dense, bool kBehindRelu, class LaneMasks, class LaneSums>
  PATHNET_DEVICE void join(const Image& target, int base, const Pass& pass, const Strip& strip, int tile, int half,
                           LaneMasks& masks, LaneSums& sums) const {
    Exec& exec = item.exec;
    const Images images{exec};
    const int plane_bytes = target.plane_bytes();
    const float scale = item.pending_scale(strip.sample);
    const float kept = adds ? keep : keep * scale, factor = coefficient * scale;
    typename Exec::template PerLane<float> peak(0.0f);
    exec.lanes([&](int lane) {
      const uint32_t mask = masks[lane];
      const auto join_row = [&](int row, bool, const int (&bytes)[tiles]) {
        float old[tiles][2] = {};
        PATHNET_UNROLL
        for (int t = 0; t < tiles; ++t) {
          if (kept != 0.0f) images.load_pair(bytes[t], plane_bytes, old[t][0], old[t][1]);
        }
        PATHNET_UNROLL
        for (int t = 0; t < tiles; ++t) {
          float values[2];
          PATHNET_UNROLL
          for (int j = 0; j < 2; ++j) {
            const bool passes = mask >> (t * rows * 2 + bit_in_tile(row, j)) & 1;
            values[j] = factor * sums[lane].of[row][t][2 * half + j];
            if (!kBehindRelu && !passes) values[j] = 0.0f;
            if (kept != 0.0f) values[j] = Exec::multiply_add(kept, old[t][j], values[j]);
            if (kBehindRelu && !passes) values[j] = 0.0f;
            peak[lane] = Exec::larger_magnitude(peak[lane], values[j]);
          }
          images.store_pair(bytes[t], plane_bytes, values[0], values[1]);
        }
      };
      each_row<rows, tiles, dense>(target, base, pass, strip, tile, lane, join_row);
    });
    exec.raise(peak_byte(1 - item.parity, strip.sample), peak);
  }
};

}  // namespace pathnet::cuda
