// The routed backward pass as a kernel.
#pragma once

#include "device_exec.cuh"
#include "routed_backward.cuh"

namespace pathnet::cuda {

using BackwardKernel = void (*)(PathBackward);

BackwardKernel windowed_backward_kernel(int parts);

// Each file compiles the forms that it names.
namespace {

template <int parts, bool windowed>
__global__ void __launch_bounds__(kThreads, 1) routed_backward_kernel(const __grid_constant__ PathBackward job) {
  DeviceExec exec(job.images, windowed ? job.program->images_bytes : 0);
  RoutedBackward<DeviceExec, parts, windowed>(exec, job).run();
}

}  // namespace
}  // namespace pathnet::cuda
