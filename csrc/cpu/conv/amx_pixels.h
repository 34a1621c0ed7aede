// Pixels as the inner dimension of tile products, for weight gradients: a product of 16 channels by 16 channels sums
// over 32 pixels.
//
// One operand has a pair of pixels for each number of a line of 16 channels, so both pixels of a pair must move
// together when a tap reads the source at an offset. Neighbouring pixels would need one copy for even offsets and one
// for odd ones. Here the rows of an image are cut into strips of equal height, and a pair takes one pixel from each
// of two strips, at the same place: then any offset is a number of lines of 64 bytes, every tile is loaded from whole
// lines of the cache, and one copy serves all taps. Where rows are short, pairs of further strips alternate line by
// line, so that 16 lines are filled: rows of 8 pixels take two pairs of strips.
#pragma once

#if defined(__AMX_BF16__)

#include <algorithm>
#include <vector>

#include "amx.h"

namespace pathnet::cpu {
namespace PATHNET_ISA_NAMESPACE {
namespace {

constexpr int64_t kLineNumbers = 32;  // 16 channels of a pair of pixels
constexpr int64_t kStepLines = 16;    // of one product
constexpr int64_t kTileNumbers = kStepLines * kLineNumbers;
// Of one product, and of copying a line.
constexpr int64_t kProductCycles = 16, kLineCycles = 3;

// Exchanges rows and columns.
inline void transpose(__m512i (&rows)[16]) {
  __m512i pairs[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    pairs[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    pairs[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
  }
  __m512i quads[16];  // [4 rows][column modulo 4]: a quarter of the vector for each 4 columns
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    quads[i] = _mm512_unpacklo_epi64(pairs[i], pairs[i + 2]);
    quads[i + 1] = _mm512_unpackhi_epi64(pairs[i], pairs[i + 2]);
    quads[i + 2] = _mm512_unpacklo_epi64(pairs[i + 1], pairs[i + 3]);
    quads[i + 3] = _mm512_unpackhi_epi64(pairs[i + 1], pairs[i + 3]);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512i upper_even = _mm512_shuffle_i32x4(quads[j], quads[4 + j], 0x88);
    const __m512i upper_odd = _mm512_shuffle_i32x4(quads[j], quads[4 + j], 0xdd);
    const __m512i lower_even = _mm512_shuffle_i32x4(quads[8 + j], quads[12 + j], 0x88);
    const __m512i lower_odd = _mm512_shuffle_i32x4(quads[8 + j], quads[12 + j], 0xdd);
    rows[j] = _mm512_shuffle_i32x4(upper_even, lower_even, 0x88);
    rows[4 + j] = _mm512_shuffle_i32x4(upper_odd, lower_odd, 0x88);
    rows[8 + j] = _mm512_shuffle_i32x4(upper_even, lower_even, 0xdd);
    rows[12 + j] = _mm512_shuffle_i32x4(upper_odd, lower_odd, 0xdd);
  }
}

// A line of rounded numbers: those of `upper` in the lower halves of its pairs.
inline __m512i line_of(Vector upper, Vector lower) {
  alignas(64) static constexpr uint16_t kInterleaved[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                            21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                            11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i rounded = (__m512i)_mm512_cvtne2ps_pbh(lower, upper);
  return _mm512_permutexvar_epi16(_mm512_load_si512(kInterleaved), rounded);
}

// The lines and steps of a part of a pass: some rows of its target pixels, and the source pixels that its taps read.
//
// A target pixel is at line (row in the strip * pitch + column) * pairs + pair of strips. The source pixel of a tap
// is shift(run, tap) lines further on in the lines of the source, which begin at the smallest offsets of the taps.
class PixelLines {
 public:
  PixelLines(const Convolution& convolution, const Pass& pass, int64_t rows)
      : convolution_(convolution), pass_(pass), rows_(rows) {
    // Runs ascend in rows and, within a row, in columns.
    const Run &first = pass.runs.front(), &last = pass.runs.back();
    const int64_t last_column = last.column + pass.taps - 1;
    first_row_ = first.row;
    first_column_ = first.column;
    more_rows_ = last.row - first.row;
    pitch_ = pass.columns + last_column - first_column_;
    choose_pairs();
    find_pixels();
    const int64_t last_shift = (more_rows_ * pitch_ + last_column - first_column_) * pairs_;
    filled_ = (height_ + more_rows_) * pitch_ * pairs_;
    lines_ = std::max(filled_, first_lines_.back() + last_shift + kStepLines);
  }

  int64_t rows() const { return rows_; }
  int64_t steps() const { return int64_t(first_lines_.size()); }
  int64_t lines() const { return lines_; }  // of 16 source channels
  int64_t first_line(int64_t step) const { return first_lines_[step]; }
  int64_t shift(const Run& run, int64_t tap) const {
    return ((run.row - first_row_) * pitch_ + run.column + tap - first_column_) * pairs_;
  }

  // Copies the source's pixels for the part that begins at a row of the pass. `line_group`: numbers from 16 channels'
  // lines to the next 16 channels'.
  void copy_source(const uint16_t* image, int64_t row, uint16_t* lines, int64_t line_group) const {
    const Image& source = convolution_.source;
    const int64_t channels = TileConvolver<1>::operand_channels(source);
    for (int64_t group = 0; group < source.groups(); ++group) {
      const uint16_t* numbers = image + group * kGroup;
      uint16_t* line = lines + group * line_group;
      for (int64_t r = 0; r < height_ + more_rows_; ++r, line += pitch_ * pairs_ * kLineNumbers) {
        for (int64_t pair = 0; pair < pairs_; ++pair) {
          const int64_t upper = row + 2 * pair * height_ + r + first_row_;
          copy_row(numbers, upper, upper + height_, channels, line + pair * kLineNumbers);
        }
      }
      // What tiles read here is multiplied by zeros, and must be finite.
      std::fill_n(line, (lines_ - filled_) * kLineNumbers, uint16_t(0));
    }
  }

  // Copies the target's pixels of that part, [16 channels][step][channel][pixel]; `group_size`: numbers from 16
  // channels to the next.
  void copy_target(const float* image, int64_t row, uint16_t* tiles, int64_t group_size) const {
    const Image& target = convolution_.target;
    alignas(64) static constexpr float kZeros[kGroup] = {};
    const float* first =
        image + ((pass_.first_row + row * pass_.step) * target.width + pass_.first_column) * target.padded();
    const int64_t rows = std::min(rows_, pass_.rows - row);
    const Pixel* pixel = pixels_.data();
    for (int64_t step = 0; step < steps(); ++step, tiles += kTileNumbers) {
      const float* numbers[2 * kStepLines];
      int64_t further[2 * kStepLines];
      for (int64_t i = 0; i < 2 * kStepLines; ++i, ++pixel) {
        numbers[i] = pixel->row < rows ? first + pixel->offset : kZeros;
        further[i] = pixel->row < rows ? kGroup : 0;
      }
      for (int64_t group = 0; group < target.groups(); ++group) {
        uint16_t* tile = tiles + group * group_size;
        __m512i lines[kStepLines];
#pragma GCC unroll 16
        for (int64_t i = 0; i < kStepLines; ++i) {
          const Vector upper = load(numbers[2 * i] + group * further[2 * i]);
          const Vector lower = load(numbers[2 * i + 1] + group * further[2 * i + 1]);
          lines[i] = line_of(upper, lower);
        }
        transpose(lines);
#pragma GCC unroll 16
        for (int64_t i = 0; i < kStepLines; ++i) _mm512_store_si512(tile + i * kLineNumbers, lines[i]);
      }
    }
  }

 private:
  struct Pixel {
    int64_t offset;  // in the target, from the part's first pixel
    int64_t row;     // in the part, or kNoRow
  };
  static constexpr int64_t kNoRow = INT64_MAX;

  // Copies pixels of two rows, either of which may lie below the source.
  void copy_row(const uint16_t* image, int64_t upper, int64_t lower, int64_t channels, uint16_t* lines) const {
    const Image& source = convolution_.source;
    alignas(64) static constexpr uint16_t kZeros[kGroup] = {};
    const int64_t end = source.height;
    const auto row_at = [&](int64_t row) {
      return row < end ? image + source.pixel(row, first_column_) * channels : kZeros;
    };
    const uint16_t *above = row_at(upper), *below = row_at(lower);
    const int64_t next_above = upper < end ? channels : 0, next_below = lower < end ? channels : 0;
    for (int64_t x = 0; x < pitch_; ++x, above += next_above, below += next_below) {
      const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(above)));
      const __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(below)));
      _mm512_store_si512(lines + x * pairs_ * kLineNumbers, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    }
  }

  // Takes as many pairs of strips as need fewest cycles. Each row has its own steps, or, where that needs fewer, they
  // run on from row to row, and the pixels between rows are zeros.
  void choose_pairs() {
    const int64_t products = int64_t(pass_.runs.size()) * pass_.taps * convolution_.target.groups();
    int64_t fewest_cycles = INT64_MAX, steps = 0;
    for (int64_t pairs : {1, 2, 4, 8}) {
      const int64_t height = (rows_ + 2 * pairs - 1) / (2 * pairs);
      const int64_t by_row = (pass_.columns * pairs + kStepLines - 1) / kStepLines * height;
      const int64_t places = (height - 1) * pitch_ + pass_.columns;
      const int64_t running_on = (places * pairs + kStepLines - 1) / kStepLines;
      const int64_t lines = (height + more_rows_) * pitch_ * pairs;
      const int64_t cycles = std::min(by_row, running_on) * products * kProductCycles + lines * kLineCycles;
      if (cycles >= fewest_cycles) continue;
      fewest_cycles = cycles;
      steps = std::min(by_row, running_on);
      pairs_ = pairs;
      height_ = height;
      runs_on_ = running_on < by_row;
    }
    first_lines_.resize(steps);
  }

  void find_pixels() {
    pixels_.reserve(2 * kStepLines * steps());
    int64_t row = 0, column = 0, pair = 0;
    for (int64_t& first_line : first_lines_) {
      if (!runs_on_ && column >= pass_.columns) {
        ++row;
        column = pair = 0;
      }
      first_line = (row * pitch_ + column) * pairs_ + pair;
      for (int64_t line = 0; line < kStepLines; ++line) {
        for (int64_t strip : {2 * pair, 2 * pair + 1}) {
          const bool inside = row < height_ && column < pass_.columns;
          const int64_t y = strip * height_ + row;
          const int64_t offset = (y * convolution_.target.width + column) * pass_.step * convolution_.target.padded();
          pixels_.push_back({offset, inside ? y : kNoRow});
        }
        if (++pair < pairs_) continue;
        pair = 0;
        if (++column < pitch_ || !runs_on_) continue;
        column = 0;
        ++row;
      }
    }
  }

  const Convolution& convolution_;
  const Pass& pass_;
  const int64_t rows_;  // target rows of a part, the last of which may have fewer
  int64_t first_row_, first_column_, more_rows_, pitch_;
  int64_t pairs_ = 1, height_ = 0;  // pairs of strips, and rows of a strip
  bool runs_on_ = false;
  int64_t filled_, lines_;
  std::vector<int64_t> first_lines_;
  std::vector<Pixel> pixels_;
};

}  // namespace
}  // namespace PATHNET_ISA_NAMESPACE
}  // namespace pathnet::cpu

#endif
