#pragma once

#include <cstdint>

namespace pathnet {

// Rows [begin, end) of x, [rows, row_size], to bits, [rows, ceil(row_size / 8)]: bit j & 7 of byte j >> 3 is
// set where x > 0.
inline void pack_bits_rows(const float* x, int64_t row_size, int64_t begin, int64_t end, uint8_t* bits) {
  const int64_t row_bytes = (row_size + 7) / 8;
  for (int64_t row = begin; row < end; ++row) {
    const float* values = x + row * row_size;
    uint8_t* out = bits + row * row_bytes;
    for (int64_t byte = 0; byte < row_bytes; ++byte) {
      const int64_t first = byte * 8;
      const int64_t count = row_size - first < 8 ? row_size - first : 8;
      unsigned packed = 0;
      for (int64_t j = 0; j < count; ++j) packed |= unsigned(values[first + j] > 0.0f) << j;
      out[byte] = uint8_t(packed);
    }
  }
}

}  // namespace pathnet
