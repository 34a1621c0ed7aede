// What the kernels' bodies are written over: an execution policy `Exec` that is CUDA on the device (device.cuh) and
// plain loops on the host (host_twin.h), so that what is tested without a GPU is what runs on one.
//
// A body is block-level code. Control flow outside `warps` and `threads` is uniform over the block.
//   warps(f)            f(warp) by every warp; inside it lanes(g): g(lane) by every lane
//   threads(f)          f(thread) by every thread
//   hide(number)        the compiler is to know nothing of the number
//   barrier()           orders shared and global memory over the block
//   PerWarp<T>, PerLane<T>   registers: a value for every warp, or lane of a warp, indexed by its number
//   load<T>, store<T>   shared memory by byte
//   uniform_load<T>     the same value to the whole block
//   load_scratch<T>, store_scratch   the thread block's part of a scratch in global memory
//   raise(byte, values) shared word = max(word, bits of all lanes' values, which are not negative)
//   sum(values)         over the lanes of a warp, in a fixed order
//   load_image, store_image, clear_image_unit         the thread block's images in global memory by byte, words of 4
//   copy_async, copy_image_async, commit_copies, wait_copies<pending>
//                       groups of copies to shared memory, from weights by address or from the images by byte
//   load_source, load_weights, multiply               ldmatrix.x4, two tiles' B registers, mma.m16n8k16
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

// Results of one warp's product, a lane's share: `rows` rows of two strips by `tiles` column tiles. Elements 0 and 1
// belong to the first strip, 2 and 3 to the second.
template <int rows, int tiles>
struct Sums {
  float of[rows][tiles][4];
};

// Bytes of what Control holds.
PATHNET_DEVICE int item_byte() { return int(offsetof(Control, item)); }
PATHNET_DEVICE int exponent_byte(int sample) { return int(offsetof(Control, exponent)) + 4 * sample; }
PATHNET_DEVICE int peak_byte(int parity, int sample) {
  return int(offsetof(Control, peak)) + 4 * (parity * kMaxSamples + sample);
}
PATHNET_DEVICE int partial_byte(int sample, int warp) {
  return int(offsetof(Control, partial)) + 8 * (sample * kWarps + warp);
}

}  // namespace pathnet::cuda
