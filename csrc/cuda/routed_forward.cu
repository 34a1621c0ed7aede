// A thread block owns one routing and one sample; its y lies in its part of the scratch. See routed_forward.cuh and
// walk.cuh for the walk and its limits.
#include "launch.cuh"
#include "routed_forward.cuh"

namespace pathnet::cuda {
namespace {

__global__ void __launch_bounds__(kThreads, 1) routed_forward_kernel(const __grid_constant__ PathForward job) {
  DeviceExec exec;
  RoutedForward<DeviceExec>(exec, job).run();
}

}  // namespace

const char* routed_forward_blocks(const Program& program, int items, int& blocks) {
  return resident_blocks(routed_forward_kernel, program, items, blocks);
}

const char* launch_routed_forward(const PathForward& job, const Program& program, int blocks, void* stream) {
  return blocks == 0 ? nullptr : launch(routed_forward_kernel, job, program, blocks, stream);
}

}  // namespace pathnet::cuda
