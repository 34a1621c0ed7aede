// Convolutions on AMX tiles: bf16 products, or float32 ones of numbers split into two bf16 terms.
//
// A tile of the source is up to 16 pixels of a row times 32 numbers: a pixel's 32 channels, or, where pixels have
// only 16, a pixel and its right neighbour, so that two taps go into one product (a third one is paired with zero
// weights). Rows of the tile overlap in memory, and nothing is copied. Four tiles of sums (64 pixels, 16 target
// channels) stay in tile registers; each step loads one tile of weights and four of the source for four products:
// five loads of 8 cycles against 64 cycles of products. With two terms it is two and eight loads for twelve products.
//
// The weights of 16 target channels are the outer loop: 18 KB at 64 source channels, so they stay in the first
// level of cache for all rows of all samples. Rows of 8 pixels share tiles, five per sample: a product takes its 16
// cycles for a tile of 8 rows too, since it waits for the weights.
//
// The clock limits that rate: with numbers other than zero in the tiles it falls from 3.8 to 3.1 or 3.3 GHz while the
// tile unit is kept busy (measured). So running the epilogue of one group of tiles between the products of the next,
// which ought to hide it, gains nothing: it was tried.
#pragma once

#if defined(__AMX_BF16__)

#include <algorithm>
#include <vector>

#include "../isa/vector.h"

namespace pathnet::cpu {
namespace PATHNET_ISA_NAMESPACE {
namespace {

constexpr int64_t kTileBytes = 1024;
constexpr int64_t kStepNumbers = 32;
constexpr int kSumTiles = 4;

// The operand of LDTILECFG.
struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  explicit TileShapes(int pixels) {
    for (int tile = 0; tile < 8; ++tile) {
      row_bytes[tile] = 64;
      rows[tile] = uint8_t(tile < 6 ? pixels : 16);
    }
  }
};
static_assert(sizeof(TileShapes) == 64, "the layout of palette 1");

// A row of target pixels in a tile of sums, as an epilogue takes it.
struct TileRow {
  int64_t sample, y, x, count;
  const float* sums;
};

// The tiles of a pass, sample after sample. A tile covers neighbouring places in rows of the source's pitch, borders
// included. Either each row has separate tiles, as few as possible and all of one size; or, where that takes fewer
// since rows are short, tiles run on from row to row, and their results between rows are discarded. A last tile that
// does not fit begins earlier, and leaves out the pixels of the one before.
class Tiles {
 public:
  Tiles(const Image& source, const Pass& pass)
      : pass_(pass), pitch_(source.pitch()), places_((pass.rows - 1) * pitch_ + pass.columns) {
    const int64_t in_row = (pass.columns + 15) / 16;
    runs_on_ = (places_ + 15) / 16 < pass.rows * in_row;
    pixels_ = runs_on_ ? std::min<int64_t>(places_, 16) : (pass.columns + in_row - 1) / in_row;
  }

  void begin() { sample_ = 0; }
  int64_t pixels() const { return pixels_; }
  int64_t sample() const { return sample_; }  // of the next tile

  // Returns the place, row * pitch + column, where the next tile begins; writes its rows to `rows` and advances that.
  int64_t next(const float* sums, TileRow*& rows) {
    const int64_t most = runs_on_ ? places_ : row_ * pitch_ + pass_.columns;
    int64_t place = row_ * pitch_ + column_;
    const int64_t begin = std::min(place, most - pixels_), end = begin + pixels_;
    while (place < end) {
      if (column_ < pass_.columns) {
        const int64_t count = std::min(pass_.columns - column_, end - place);
        const int64_t y = pass_.first_row + row_ * pass_.step, x = pass_.first_column + column_ * pass_.step;
        *rows++ = {sample_, y, x, count, sums + (place - begin) * kGroup};
        place += count;
        column_ += count;
      } else {
        place += pitch_ - column_;
        next_row();
      }
    }
    if (end == most) next_row();
    if (end == places_) {
      row_ = column_ = 0;
      ++sample_;
    }
    return begin;
  }

 private:
  void next_row() {
    column_ = 0;
    ++row_;
  }

  const Pass& pass_;
  const int64_t pitch_, places_;
  bool runs_on_;
  int64_t pixels_;
  int64_t sample_ = 0, row_ = 0, column_ = 0;
};

// GCC's tile intrinsics are asm statements that do not declare their reads of memory: without a barrier the compiler
// may drop the stores before them.
inline void stores_are_done() { asm volatile("" ::: "memory"); }

// Tiles 0 to 3 are sums, 4 and 5 alternate for the source, 6 and 7 hold weights: of alternating steps, or the two
// terms of one. A product has a latency of 52 cycles and takes the unit for 16, so products of one tile of sums
// are kept apart.
//
// After more than about 130 products without a store of a tile, the next such store costs 1,000 cycles more
// (measured, for any loads and any unrolling of loops; no manual says why). So one tile of sums is stored on the way,
// to no other end: it saves a tenth of the time where modules have 64 channels.
template <int kParts, int kCount>
void tile_products(const uint16_t* const* sources, int64_t plane, int64_t row_bytes, const int64_t* offsets,
                   int64_t steps, const uint16_t* weights, float* sums) {
  constexpr int64_t kTile = kTileBytes / 2;
  constexpr int64_t kStepsToStore = kParts == 1 ? 18 : 6;
#define PATHNET_ADD(m, source, term, tile)                                       \
  if constexpr (m < kCount) {                                                    \
    _tile_loadd(source, sources[m] + (term) * plane + offsets[step], row_bytes); \
    _tile_dpbf16ps(m, source, tile);                                             \
  }
#define PATHNET_STEP(term, tile) \
  PATHNET_ADD(0, 4, term, tile)  \
  PATHNET_ADD(1, 5, term, tile)  \
  PATHNET_ADD(2, 4, term, tile)  \
  PATHNET_ADD(3, 5, term, tile)
#define PATHNET_ADD_BOTH(m, source)                             \
  if constexpr (m < kCount) {                                   \
    _tile_loadd(source, sources[m] + offsets[step], row_bytes); \
    _tile_dpbf16ps(m, source, 7);                               \
    _tile_dpbf16ps(m, source, 6);                               \
  }
  stores_are_done();
  _tile_zero(0);
  if constexpr (kCount > 1) _tile_zero(1);
  if constexpr (kCount > 2) _tile_zero(2);
  if constexpr (kCount > 3) _tile_zero(3);
  for (int64_t step = 0; step < steps;) {
    if (step > 0) _tile_stored(0, sums, 64);
    const int64_t stop = std::min(steps, step + kStepsToStore);
    if constexpr (kParts == 1) {
      for (; step + 1 < stop; weights += 2 * kTile) {
        _tile_loadd(6, weights, 64);
        PATHNET_STEP(0, 6)
        ++step;
        _tile_loadd(7, weights + kTile, 64);
        PATHNET_STEP(0, 7)
        ++step;
      }
      if (step < stop) {
        _tile_loadd(6, weights, 64);
        PATHNET_STEP(0, 6)
        ++step;
      }
    } else {
      for (; step < stop; ++step, weights += 2 * kTile) {
        _tile_loadd(6, weights, 64);
        PATHNET_STEP(1, 6)
        _tile_loadd(7, weights + kTile, 64);
        PATHNET_ADD_BOTH(0, 4)
        PATHNET_ADD_BOTH(1, 5)
        PATHNET_ADD_BOTH(2, 4)
        PATHNET_ADD_BOTH(3, 5)
      }
    }
  }
#undef PATHNET_ADD_BOTH
#undef PATHNET_STEP
#undef PATHNET_ADD
  _tile_stored(0, sums, 64);
  if constexpr (kCount > 1) _tile_stored(1, sums + 1 * kTileBytes / 4, 64);
  if constexpr (kCount > 2) _tile_stored(2, sums + 2 * kTileBytes / 4, 64);
  if constexpr (kCount > 3) _tile_stored(3, sums + 3 * kTileBytes / 4, 64);
  stores_are_done();
}

template <int kTerms>
struct TileConvolver {
  using Element = uint16_t;
  static constexpr int kParts = kTerms;
  static constexpr bool kFloats = false;

  static int64_t operand_channels(const Image& image) {
    return image.padded() == kGroup ? kGroup : (image.padded() + kStepNumbers - 1) / kStepNumbers * kStepNumbers;
  }

  static void put(Element* operand, int64_t plane, Vector value) {
    const __m256bh high = _mm512_cvtneps_pbh(value);
    std::memcpy(operand, &high, sizeof(high));
    if constexpr (kParts == 2) {
      const __m512i widened = _mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)high), 16);
      const __m256bh low = _mm512_cvtneps_pbh(_mm512_sub_ps(value, _mm512_castsi512_ps(widened)));
      std::memcpy(operand + plane, &low, sizeof(low));
    }
  }

  static int64_t packed_size(const Convolution& convolution) {
    int64_t steps = 0;
    for (const Pass& pass : convolution.passes) steps += steps_of(convolution, pass).size();
    return steps * convolution.target.groups() * kParts * kTileBytes / 2;
  }

  // [pass][16 target channels][step][term][pair of source numbers][target channel][number of the pair]
  static void pack(const Convolution& convolution, Element* packed) {
    const int64_t channels = operand_channels(convolution.source);
    for (const Pass& pass : convolution.passes) {
      const std::vector<Step> steps = steps_of(convolution, pass);
      for (int64_t group = 0; group < convolution.target.groups(); ++group) {
        for (const Step& step : steps) {
          for (int64_t number = 0; number < kStepNumbers; ++number) {
            const int64_t from = (step.channel + number) % channels, tap = step.tap + number / channels;
            for (int64_t n = 0; n < kGroup; ++n) {
              const int64_t to = group * kGroup + n;
              const bool real =
                  from < convolution.source.channels && to < convolution.target.channels && tap < pass.taps;
              const float weight = real ? convolution.weight(from, to, step.run->kernel[tap]) : 0.0f;
              Element* place = packed + (number / 2 * kGroup + n) * 2 + number % 2;
              *place = to_bf16(weight);
              if (kParts == 2) place[kTileBytes / 2] = to_bf16(weight - from_bf16(*place));
            }
          }
          packed += kParts * kTileBytes / 2;
        }
      }
    }
  }

  template <class Then>
  static void run(const Convolution& convolution, const Element* packed, const Element* const* sources,
                  int64_t samples, Then& then) {
    alignas(64) float sums[kSumTiles * kTileBytes / 4];
    TileRow rows[kSumTiles * 16];
    const Image& source = convolution.source;
    const int64_t channels = operand_channels(source), plane = source.pixels() * channels;
    for (const Pass& pass : convolution.passes) {
      Tiles tiles(source, pass);
      const TileShapes shapes{int(tiles.pixels())};
      stores_are_done();
      _tile_loadconfig(&shapes);
      std::vector<int64_t> offsets;
      for (const Step& step : steps_of(convolution, pass)) {
        const int64_t column = step.run->column + step.tap;
        offsets.push_back((step.run->row * source.pitch() + column) * channels + step.channel);
      }
      for (int64_t group = 0; group < convolution.target.groups(); ++group) {
        for (tiles.begin(); tiles.sample() < samples;) {
          const Element* origins[kSumTiles];
          TileRow* end = rows;
          int count = 0;
          for (; count < kSumTiles && tiles.sample() < samples; ++count) {
            const Element* first = sources[tiles.sample()] + source.pixel(0, 0) * channels;
            origins[count] = first + tiles.next(sums + count * kTileBytes / 4, end) * pass.source_step * channels;
          }
          const auto products = count == 4   ? tile_products<kParts, 4>
                                : count == 3 ? tile_products<kParts, 3>
                                : count == 2 ? tile_products<kParts, 2>
                                             : tile_products<kParts, 1>;
          products(origins, plane, pass.source_step * channels * 2, offsets.data(), offsets.size(), packed, sums);
          for (const TileRow* row = rows; row < end; ++row) {
            then(row->sample, row->y, row->x, pass.step, row->count, group * kGroup, 1, row->sums);
          }
        }
        packed += offsets.size() * kParts * kTileBytes / 2;
      }
    }
    _tile_release();
  }

 private:
  // The source numbers of one product: 32 channels of a tap from `channel` on, or two neighbouring taps of 16.
  struct Step {
    const Run* run;
    int64_t tap, channel;
  };

  static std::vector<Step> steps_of(const Convolution& convolution, const Pass& pass) {
    const int64_t channels = operand_channels(convolution.source);
    std::vector<Step> steps;
    for (const Run& run : pass.runs) {
      for (int64_t tap = 0; tap < pass.taps; tap += channels == kGroup ? 2 : 1) {
        for (int64_t channel = 0; channel < channels; channel += kStepNumbers) steps.push_back({&run, tap, channel});
      }
    }
    return steps;
  }
};

}  // namespace
}  // namespace PATHNET_ISA_NAMESPACE
}  // namespace pathnet::cpu

#endif
