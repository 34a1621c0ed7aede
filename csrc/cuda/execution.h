// The interface of an execution policy `Exec`, over which the kernels' bodies are written: CUDA on the device
// (device_exec.cuh) and plain loops on the host (host_exec.h), so a GPU runs the code that is tested without
// one.
//
// A body is code of a thread block. Control flow outside `warps` and `threads` is uniform over the block.
//   warps(f)            calls f(warp) in every warp; inside it lanes(g) calls g(lane) in every lane
//   threads(f)          calls f(thread) in every thread
//   hide(number)        keeps the compiler from using what it knows of the number
//   barrier()           orders accesses of the block to shared and global memory
//   PerWarp<T>, PerLane<T>   registers: a value for every warp, or lane of a warp, indexed by its number
//   load<T>, store<T>, clear_unit                     shared memory by byte
//   uniform_load<T>     loads the same value for the whole block
//   load_scratch<T>, store_scratch                    the thread block's part of a scratch in global memory
//   raise(byte, values) sets a word of shared memory to the maximum of itself and the bits of all lanes' values, none
//                       of which is negative; raise_one(byte, bits) does so for one value
//   sum(values)         adds the values of a warp's lanes, in a fixed order
//   load_image, store_image, clear_image_unit         the thread block's images in global memory by byte; words of 4
//   copy_async, copy_image_async, commit_copies, wait_copies<pending>
//                       groups of copies to shared memory, from weights by address or from the images by byte
//   load_source, load_weights, multiply               ldmatrix.x4, B registers of a column tile, mma.m16n8k16
//   load_bits<bytes>, store_bits<bytes>               ReLU bits in global memory
#pragma once

#include <cstddef>
#include <cstdint>

#include "program.h"

#if defined(__CUDACC__)
#define PATHNET_DEVICE __device__ __forceinline__
#define PATHNET_UNROLL _Pragma("unroll")
#define PATHNET_NO_UNROLL _Pragma("unroll 1")
#else
#define PATHNET_DEVICE inline
#define PATHNET_UNROLL
#define PATHNET_NO_UNROLL
#endif

namespace pathnet::cuda {

// A lane's share of the results of one warp's product: `rows` rows of two strips by `tiles` column tiles. Elements 0
// and 1 belong to the first strip, 2 and 3 to the second.
template <int rows, int tiles>
struct Sums {
  float of[rows][tiles][4];
};

// Bytes of the fields of Control.
PATHNET_DEVICE int item_byte() { return int(offsetof(Control, item)); }
PATHNET_DEVICE int exponent_byte(int sample) { return int(offsetof(Control, exponent)) + 4 * sample; }
PATHNET_DEVICE int peak_byte(int parity, int sample) {
  return int(offsetof(Control, peak)) + 4 * (parity * kMaxSamples + sample);
}
PATHNET_DEVICE int partial_byte(int sample, int warp) {
  return int(offsetof(Control, partial)) + 8 * (sample * kWarps + warp);
}

}  // namespace pathnet::cuda
