// A thread block owns one path and `program.samples` samples: two of a CIFAR network in bf16, one in float32
// precision. See routed_backward.cuh and walk.cuh for the walk and its limits.
#include "launch.cuh"
#include "routed_backward.cuh"

namespace pathnet::cuda {
namespace {

template <int parts>
__global__ void __launch_bounds__(kThreads, 1) routed_backward_kernel(const __grid_constant__ PathBackward job) {
  DeviceExec exec;
  RoutedBackward<DeviceExec, parts>(exec, job).run();
}

}  // namespace

const char* launch_routed_backward(const PathBackward& job, const Program& program, void* stream) {
  const auto kernel = program.parts == 1 ? routed_backward_kernel<1> : routed_backward_kernel<2>;
  const int items = job.paths * ceil_div(job.batch, program.samples);
  int blocks = 0;
  if (const char* error = resident_blocks(kernel, program, items, blocks)) return error;
  return items == 0 ? nullptr : launch(kernel, job, program, blocks, stream);
}

}  // namespace pathnet::cuda
