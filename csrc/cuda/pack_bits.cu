// The ReLU bits of a forward pass: x > 0, eight elements a byte.
//
// A thread owns one byte: it reads 32 consecutive bytes of x, a whole sector, so that a warp's reads are whole lines
// whatever the row's length. A block of 256 threads reads 8 KB and writes 256 bytes. The limit is memory: 4.125
// bytes an element, 1.4 ns per thousand elements at 3.0 TB/s; nothing is kept on the chip.

#include <cuda_runtime.h>

#include "pack_bits.h"

namespace pathnet {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads)
    pack_bits_kernel(const float* __restrict__ x, int64_t row_size, int64_t row_bytes, int64_t bytes,
                     uint8_t* __restrict__ bits) {
  const int64_t index = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= bytes) return;
  const int64_t row = index / row_bytes, first = (index - row * row_bytes) * 8;
  const float* values = x + row * row_size + first;
  unsigned packed = 0;
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    if (first + j < row_size && values[j] > 0.0f) packed |= 1u << j;
  }
  bits[index] = uint8_t(packed);
}

}  // namespace

const char* launch_pack_bits(const float* x, int64_t row_size, int64_t rows, uint8_t* bits, void* stream) {
  const int64_t row_bytes = (row_size + 7) / 8, bytes = rows * row_bytes;
  if (bytes == 0) return nullptr;
  const int64_t blocks = (bytes + kThreads - 1) / kThreads;
  if (blocks > INT32_MAX) return "x has more than 2^42 elements";
  pack_bits_kernel<<<unsigned(blocks), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(x, row_size, row_bytes,
                                                                                         bytes, bits);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace pathnet
