// Launches of persistent kernels: as many thread blocks as the device runs at the same time.
#pragma once

#include <algorithm>
#include <cstdint>

#include "device_exec.cuh"

namespace pathnet::cuda {

// Sets `blocks` to the number of thread blocks that run at the same time. Returns null, or why the kernel cannot run
// with the program's shared memory. The kernel's limit is set to all that the device has, whatever this program
// needs, since another thread may launch it with another program in between.
template <class Kernel>
const char* resident_blocks(Kernel kernel, const Program& program, int items, int& blocks) {
  int device = 0, processors = 0, most = 0, each = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error == cudaSuccess) error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
  if (error == cudaSuccess && program.shared_bytes <= most) {
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, kThreads, size_t(program.shared_bytes));
  }
  if (error != cudaSuccess) {
    cudaGetLastError();  // clears the error, so that the next launch does not report it
    return cudaGetErrorString(error);
  }
  if (each == 0) return "a thread block needs more shared memory than the device has";
  blocks = std::min(items, processors * each);
  // The offset of a thread block's images has 32 bits.
  if (program.windowed) blocks = std::min(blocks, INT32_MAX / program.images_bytes);
  return nullptr;
}

// Returns null, or the launch's error.
template <class Kernel, class Job>
const char* launch(Kernel kernel, const Job& job, const Program& program, int blocks, void* stream) {
  const cudaStream_t queue = static_cast<cudaStream_t>(stream);
  kernel<<<blocks, kThreads, program.shared_bytes, queue>>>(job);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace pathnet::cuda
