// The epilogue of the routed forward pass. The first convolution's results go through BN and ReLU to the
// intermediate. Those of the others are added to y, y <- keep * y + coefficient * (result + bias), and if the shape
// stays the same, y goes through the BN and ReLU of the next block to that block's operand.
#pragma once

#include "forward_item.cuh"
#include "products.cuh"

namespace pathnet::cuda {

template <class Exec, bool kWindowed>
struct ForwardEpilogue {
  using Item = ForwardItem<Exec, kWindowed>;

  const Item& item;
  int y;  // element of the scratch; negative for the intermediate
  float keep, coefficient;
  bool emits;                           // whether an operand is written
  int operand_byte, bits_byte, affine;  // of that operand

  PATHNET_DEVICE float start(const Conv& conv, int tile, int lane, int j) const {
    return conv.bias < 0 ? 0.0f : item.job.affine[conv.bias + tile * kChannelTile + lane_channel(lane) + j];
  }

  template <int rows, int tiles, bool dense>
  PATHNET_DEVICE uint32_t mask(const LocalConv&, const Pass&, const Strip&, int, int) const {
    return 0;
  }

  template <int rows, int tiles, bool dense, class LaneMasks, class LaneSums>
  PATHNET_DEVICE void store(const Conv& program_conv, const LocalConv& conv, const Pass& pass, const Strip& strip,
                            int tile, int half, LaneMasks&, LaneSums& sums) const {
    const Image image = conv.target;
    const int plane_bytes = image.plane_bytes();
    uint8_t* bits = emits ? item.recorded(bits_byte) : nullptr;
    const float least = program_conv.behind_relu ? 0.0f : Item::kWithoutRelu;
    item.exec.lanes([&](int lane) {
      uint32_t word = 0;
      const int element = image.lane_order_index(strip.index, 0, tile, lane);
      const int row_size = image.lane_order_index(0, 1, 0, 0);
      LaneAffine affines[tiles] = {};
      PATHNET_UNROLL
      for (int t = 0; t < tiles; ++t) {
        if (emits) affines[t] = LaneAffine(item.job.affine + affine, image, tile + t, lane);
      }
      const auto store_row = [&](int row, bool inside, const int (&bytes)[tiles]) {
        Pair row_of_y[tiles];
        PATHNET_UNROLL
        for (int t = 0; t < tiles; ++t) {
          Pair& pair = row_of_y[t];
          pair = {0.0f, 0.0f};
          if (keep != 0.0f) pair = item.template load_y<Pair>(y + element + row * row_size + t * Item::kTilePairs);
        }
        PATHNET_UNROLL
        for (int t = 0; t < tiles; ++t) {
          Pair& pair = row_of_y[t];
          const float* result = sums[lane].of[row][t] + 2 * half;
          pair.first = pair.first < least ? least : pair.first;
          pair.second = pair.second < least ? least : pair.second;
          pair.first = Exec::multiply_add(coefficient, result[0], keep * pair.first);
          pair.second = Exec::multiply_add(coefficient, result[1], keep * pair.second);
          if (y >= 0) item.store_y(y + element + row * row_size + t * Item::kTilePairs, pair);
          if (emits) {
            word |= item.activate(bytes[t], plane_bytes, affines[t], pair.first, pair.second, inside)
                    << (t * rows * 2 + bit_in_tile(row, 0));
          }
        }
      };
      // Whole strips even if the convolution is not dense, since y is read by whole strips.
      each_row<rows, tiles, true>(image, operand_byte, pass, strip, tile, lane, store_row);
      if (bits != nullptr) {
        Exec::template store_bits<rows * tiles / 4>(bits + image.bits_byte(strip.index, lane, tile), word);
      }
    });
  }
};

}  // namespace pathnet::cuda
