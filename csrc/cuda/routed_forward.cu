// The launch of the routed forward pass. What a thread block owns and what limits it: routed_forward.cuh.
#include "launch.cuh"
#include "routed_forward.cuh"

namespace pathnet::cuda {
namespace {

template <bool windowed>
__global__ void __launch_bounds__(kThreads, 1) routed_forward_kernel(const __grid_constant__ PathForward job) {
  DeviceExec exec(job.images, windowed ? job.program->images_bytes : 0);
  RoutedForward<DeviceExec, windowed>(exec, job).run();
}

auto kernel_of(const Program& program) {
  return program.windowed ? routed_forward_kernel<true> : routed_forward_kernel<false>;
}

}  // namespace

const char* routed_forward_blocks(const Program& program, int items, int& blocks) {
  return resident_blocks(kernel_of(program), program, items, blocks);
}

const char* launch_routed_forward(const PathForward& job, const Program& program, int blocks, void* stream) {
  return blocks == 0 ? nullptr : launch(kernel_of(program), job, program, blocks, stream);
}

}  // namespace pathnet::cuda
