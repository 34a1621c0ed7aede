// Reads and writes of images in memory: pairs of channels, and the rows that a lane holds.
#pragma once

#include "execution.h"

namespace pathnet::cuda {

// Images of one or two bf16 terms (parts) a number, in shared memory or, in the windowed form, in the scratch.
template <class Exec, int kParts, bool kWindowed>
struct Images {
  Exec& exec;

  // Returns the first byte of a sample's image.
  static PATHNET_DEVICE int sample_byte(const Image& image, int base, int sample) {
    return base + sample * kParts * image.plane_bytes();
  }

  // Stores two neighbouring channels at `byte`, their second terms `plane_bytes` after it.
  PATHNET_DEVICE void store_pair(int byte, int plane_bytes, float first, float second) const {
    PATHNET_UNROLL
    for (int part = 0; part < kParts; ++part) {
      const uint32_t pair = Exec::to_bf16(first, second);
      if (kWindowed) {
        exec.store_image(byte + part * plane_bytes, pair);
      } else {
        exec.store(byte + part * plane_bytes, pair);
      }
      first -= Exec::low(pair);
      second -= Exec::high(pair);
    }
  }

  PATHNET_DEVICE void load_pair(int byte, int plane_bytes, float& first, float& second) const {
    const uint32_t pair = load(byte);
    first = Exec::low(pair);
    second = Exec::high(pair);
    if (kParts == 1) return;
    const uint32_t remainders = load(byte + plane_bytes);
    first += Exec::low(remainders);
    second += Exec::high(remainders);
  }

  PATHNET_DEVICE uint32_t load(int byte) const {
    return kWindowed ? exec.load_image(byte) : exec.template load<uint32_t>(byte);
  }

  PATHNET_DEVICE void clear(const Image& image, int base, int samples) const {
    const int units = samples * kParts * image.plane_bytes() / kUnitBytes;
    exec.threads([&](int thread) {
      PATHNET_NO_UNROLL
      for (int unit = thread; unit < units; unit += kThreads) {
        if (kWindowed) {
          exec.clear_image_unit(base + unit * kUnitBytes);
        } else {
          exec.clear_unit(base + unit * kUnitBytes);
        }
      }
    });
  }
};

// Calls f(row, inside, bytes) for the rows of a lane's pixel column of one strip: whether the row belongs to the
// image, and the bytes of the tiles' channel pairs in the sample's first plane. One call takes a whole row, so that
// all its loads are issued before its first store. A dense convolution has no branch for rows beyond the image, which
// are passed too.
template <int rows, int tiles, bool dense, class Function>
PATHNET_DEVICE void each_row(const Image& target, int base, const Pass& pass, const Strip& strip, int tile, int lane,
                             const Function& f) {
  const int x = strip.x + lane_pixel(lane), pitch = target.pitch();
  if (x >= pass.width) return;
  const int first = target.pixel(strip.y * pass.vertical.target_step + pass.vertical.parity + 1,
                                 x * pass.horizontal.target_step + pass.horizontal.parity + 1);
  PATHNET_UNROLL
  for (int row = 0; row < rows; ++row) {
    const bool inside = strip.y + row < pass.height;
    if (dense || inside) {
      const int byte = target.pair_byte(base, first + row * pass.vertical.target_step * pitch, tile, lane);
      int bytes[tiles];
      PATHNET_UNROLL
      for (int t = 0; t < tiles; ++t) bytes[t] = byte ^ t * kUnitBytes;
      f(row, inside, bytes);
    }
  }
}

}  // namespace pathnet::cuda
