// The weight gradient of a convolution on AMX tiles: products of 16 input channels by 32 pixels of the activations
// and 32 pixels by 16 output channels of the gradient, in bf16.
//
// Tiles of the activations (channels by pixels) are a transposed copy, tiles of the gradient (pairs of pixels by
// channels) an interleaved one, of which every tap takes the same lines at an offset (amx_pixels.h). A step keeps one
// tile of activations and up to four tiles of sums, and loads one of the gradient a product: 5 loads of 8 cycles
// against 64 cycles of products.
//
// Cycles of 32 pixels and 16 by 16 channels of a 3x3 convolution: 144 of products. The copy of the activations takes
// about 110 on the port for shuffles (16 conversions, 16 interleaves, 64 to transpose), shared by all output
// channels; that of the gradient about 40, shared by all input channels. So copies take as long as products at 16
// channels, a quarter at 64. Sums are loaded and stored once for all pixels that are copied together, as many as
// leave both copies of a pair of groups in the first level of cache: that is 16 rows of 32 pixels, or 6 samples of
// 8x8 pixels, where it would otherwise add a half. So `add` is to have several samples where images are small.
//
// The products of AVX-512 with bf16 numbers are of no use here: at 9 for a pixel, at twice the rate, they take twice
// as long as the 2.25 of Winograd's filtering in float32.
#pragma once

#if defined(__AMX_BF16__)

#include <algorithm>
#include <memory>
#include <new>
#include <vector>

#include "amx_pixels.h"

namespace pathnet::cpu {
namespace PATHNET_ISA_NAMESPACE {
namespace {

constexpr int64_t kSumNumbers = 16 * 16;

// Adds the products of all steps to `kCount` tiles of sums that follow each other. activations: [step][tile];
// gradients: the first line of each tile of sums.
//
// Tiles 0 to 3 are sums, 4 and 5 hold activations of alternating steps, and 6 and 7 alternate for the gradient. As in
// tile_products, one tile of sums is stored on the way, before 130 products have gone by without a store.
template <int kCount>
void add_products(const uint16_t* activations, const uint16_t* const* gradients, const int64_t* lines, int64_t steps,
                  float* sums) {
  constexpr int64_t kStepsToStore = 128 / kCount;
  static_assert(kStepsToStore % 2 == 0, "an odd number of steps ends all");
#define PATHNET_ADD(m, gradient, tile)                                    \
  if constexpr (m < kCount) {                                             \
    _tile_loadd(gradient, gradients[m] + lines[step] * kLineNumbers, 64); \
    _tile_dpbf16ps(m, tile, gradient);                                    \
  }
#define PATHNET_STEP(tile) \
  PATHNET_ADD(0, 6, tile)  \
  PATHNET_ADD(1, 7, tile)  \
  PATHNET_ADD(2, 6, tile)  \
  PATHNET_ADD(3, 7, tile)
  stores_are_done();
  _tile_loadd(0, sums, 64);
  if constexpr (kCount > 1) _tile_loadd(1, sums + 1 * kSumNumbers, 64);
  if constexpr (kCount > 2) _tile_loadd(2, sums + 2 * kSumNumbers, 64);
  if constexpr (kCount > 3) _tile_loadd(3, sums + 3 * kSumNumbers, 64);
  for (int64_t step = 0; step < steps;) {
    if (step > 0) _tile_stored(0, sums, 64);
    const int64_t stop = std::min(steps, step + kStepsToStore);
    for (; step + 1 < stop; activations += 2 * kTileNumbers) {
      _tile_loadd(4, activations, 64);
      PATHNET_STEP(4)
      ++step;
      _tile_loadd(5, activations + kTileNumbers, 64);
      PATHNET_STEP(5)
      ++step;
    }
    if (step < stop) {
      _tile_loadd(4, activations, 64);
      PATHNET_STEP(4)
      ++step;
    }
  }
#undef PATHNET_STEP
#undef PATHNET_ADD
  _tile_stored(0, sums, 64);
  if constexpr (kCount > 1) _tile_stored(1, sums + 1 * kSumNumbers, 64);
  if constexpr (kCount > 2) _tile_stored(2, sums + 2 * kSumNumbers, 64);
  if constexpr (kCount > 3) _tile_stored(3, sums + 3 * kSumNumbers, 64);
  stores_are_done();
}

// A thread's memory for copies of pixels, which grows to what its largest convolution needs.
class PixelMemory {
 public:
  uint16_t* get(int64_t numbers) {
    if (numbers > size_) {
      data_.reset();
      data_.reset(static_cast<uint16_t*>(::operator new(numbers * sizeof(uint16_t), std::align_val_t(64))));
      size_ = numbers;
    }
    return data_.get();
  }

  static PixelMemory& of_thread() {
    thread_local PixelMemory memory;
    return memory;
  }

 private:
  struct Free {
    void operator()(uint16_t* data) const { ::operator delete(data, std::align_val_t(64)); }
  };
  std::unique_ptr<uint16_t, Free> data_;
  int64_t size_ = 0;
};

// For the transposed convolution, like DirectWeightGradient; its sums are
// [pass][16 target channels][16 source channels][tap of a run][target channel][source channel].
struct TileWeightGradient {
  static int64_t size(const Convolution& convolution) {
    int64_t taps = 0;
    for (const Pass& pass : convolution.passes) taps += taps_of(pass);
    return taps * convolution.source.groups() * convolution.target.groups() * kSumNumbers;
  }

  // Adds samples' weight gradients. gradients: operands of TileConvolver<1>, bordered, like the convolution's
  // source; activations: dense, like its target without border, channels zero-padded.
  static void add(const Convolution& convolution, const uint16_t* const* gradients, const float* const* activations,
                  int64_t samples, float* sums) {
    const TileShapes shapes{16};
    stores_are_done();
    _tile_loadconfig(&shapes);
    for (const Pass& pass : convolution.passes) {
      if (taps_of(pass) == 0) continue;
      add_pass({convolution, pass, gradients, activations, samples}, sums);
      sums += taps_of(pass) * convolution.source.groups() * convolution.target.groups() * kSumNumbers;
    }
    _tile_release();
  }

  // grads = the sums by the kernel's positions, as DirectWeightGradient: [position][source channel][target channel],
  // channels padded.
  static void finish(const Convolution& convolution, const float* sums, float* grads) {
    const int64_t source_channels = convolution.source.padded(), target_channels = convolution.target.padded();
    const int64_t plane = source_channels * target_channels;
    // Where an image is smaller than the stride, some positions have no tap.
    std::fill_n(grads, convolution.positions * plane, 0.0f);
    for (const Pass& pass : convolution.passes) {
      for (int64_t to = 0; to < target_channels; to += kGroup) {
        for (int64_t from = 0; from < source_channels; from += kGroup) {
          for (int64_t tap = 0; tap < taps_of(pass); ++tap, sums += kSumNumbers) {
            float* grad = grads + pass.runs[tap / pass.taps].kernel[tap % pass.taps] * plane;
            __m512i rows[16];
#pragma GCC unroll 16
            for (int64_t i = 0; i < 16; ++i) rows[i] = _mm512_loadu_si512(sums + i * kGroup);
            transpose(rows);
#pragma GCC unroll 16
            for (int64_t i = 0; i < 16; ++i) {
              _mm512_storeu_si512(grad + (from + i) * target_channels + to, rows[i]);
            }
          }
        }
      }
    }
  }

 private:
  // Of the first level of cache, 48 KB on every processor with tiles, all but the tiles of sums.
  static constexpr int64_t kFirstLevel = 44 << 10;
  // All channels of what is copied together stay in the second level.
  static constexpr int64_t kSecondLevel = 1 << 20;

  struct Work {
    const Convolution& convolution;
    const Pass& pass;
    const uint16_t* const* gradients;
    const float* const* activations;
    int64_t samples;
  };

  static int64_t taps_of(const Pass& pass) { return int64_t(pass.runs.size()) * pass.taps; }

  // Bytes of a part's copies.
  static int64_t bytes(const PixelLines& part, int64_t target_groups, int64_t source_groups) {
    return 2 * (target_groups * part.steps() * kTileNumbers + source_groups * part.lines() * kLineNumbers);
  }

  // All rows of the pass, or half of them, a quarter and so on, until copies of 16 and 16 channels fit. Strips of
  // less than four rows would copy most of the source's rows for the sake of taps in other rows.
  static PixelLines part_of(const Work& work) {
    for (int64_t rows = work.pass.rows;; rows = (rows + 1) / 2) {
      PixelLines part(work.convolution, work.pass, rows);
      if (rows <= 8 || bytes(part, 1, 1) <= kFirstLevel) return part;
    }
  }

  static void add_pass(const Work& work, float* sums) {
    const Pass& pass = work.pass;
    const int64_t target_groups = work.convolution.target.groups(), source_groups = work.convolution.source.groups();
    const PixelLines part = part_of(work);
    const int64_t rows = part.rows();
    const int64_t in_sample = (pass.rows + rows - 1) / rows, parts = work.samples * in_sample;
    const int64_t together = std::clamp<int64_t>(
        std::min(kFirstLevel / bytes(part, 1, 1), kSecondLevel / bytes(part, target_groups, source_groups)), 1,
        parts);
    const int64_t target_size = together * part.steps() * kTileNumbers;
    const int64_t source_size = together * part.lines() * kLineNumbers;
    uint16_t* tiles = PixelMemory::of_thread().get(target_groups * target_size + source_groups * source_size);
    uint16_t* lines = tiles + target_groups * target_size;
    std::vector<int64_t> first_lines;
    for (int64_t p = 0; p < together; ++p) {
      for (int64_t step = 0; step < part.steps(); ++step) {
        first_lines.push_back(p * part.lines() + part.first_line(step));
      }
    }
    std::vector<const uint16_t*> origins;
    for (int64_t group = 0; group < source_groups; ++group) {
      for (const Run& run : pass.runs) {
        for (int tap = 0; tap < pass.taps; ++tap) {
          origins.push_back(lines + group * source_size + part.shift(run, tap) * kLineNumbers);
        }
      }
    }
    for (int64_t first = 0; first < parts; first += together) {
      const int64_t count = std::min(together, parts - first);
      for (int64_t p = 0; p < count; ++p) {
        const int64_t sample = (first + p) / in_sample, row = (first + p) % in_sample * rows;
        part.copy_target(work.activations[sample], row, tiles + p * part.steps() * kTileNumbers, target_size);
        part.copy_source(work.gradients[sample], row, lines + p * part.lines() * kLineNumbers, source_size);
      }
      for (int64_t group = 0; group < target_groups; ++group) {
        multiply(tiles + group * target_size, origins, first_lines.data(), count * part.steps(),
                 sums + group * int64_t(origins.size()) * kSumNumbers);
      }
    }
  }

  // Adds to a tile of sums for each origin, up to four at once, as few times as possible and of about equal numbers.
  static void multiply(const uint16_t* tiles, const std::vector<const uint16_t*>& origins, const int64_t* lines,
                       int64_t steps, float* sums) {
    const int64_t all = origins.size(), turns = (all + kSumTiles - 1) / kSumTiles;
    for (int64_t turn = 0; turn < turns; ++turn) {
      const int64_t begin = turn * all / turns, count = (turn + 1) * all / turns - begin;
      const auto add = count == 4   ? add_products<4>
                       : count == 3 ? add_products<3>
                       : count == 2 ? add_products<2>
                                    : add_products<1>;
      add(tiles, origins.data() + begin, lines, steps, sums + begin * kSumNumbers);
    }
  }
};

// Convolutions of training on tiles, both ways, and their weight gradients.
struct TrainingTileConvolver : TileConvolver<1> {
  static int64_t gradient_size(const Convolution& convolution) { return TileWeightGradient::size(convolution); }

  template <class Then>
  static void run_back(const Convolution& convolution, const uint16_t* packed, const uint16_t* const* gradients,
                       const float* const* activations, int64_t samples, Then& then, float* sums) {
    run(convolution, packed, gradients, samples, then);
    TileWeightGradient::add(convolution, gradients, activations, samples, sums);
  }

  static void finish_gradient(const Convolution& convolution, const float* sums, float* weights) {
    TileWeightGradient::finish(convolution, sums, weights);
  }
};

}  // namespace
}  // namespace PATHNET_ISA_NAMESPACE
}  // namespace pathnet::cpu

#endif
