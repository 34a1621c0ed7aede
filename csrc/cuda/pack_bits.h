#pragma once

#include <cstdint>

namespace pathnet {

// x, [rows, row_size], to bits, [rows, ceil(row_size / 8)], on the stream. Null, or what went wrong.
const char* launch_pack_bits(const float* x, int64_t row_size, int64_t rows, uint8_t* bits, void* stream);

}  // namespace pathnet
