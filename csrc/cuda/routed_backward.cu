// The launch of the routed backward pass. What a thread block owns and what limits it: routed_backward.cuh. The
// windowed form is compiled in windowed_backward.cu, since a build on many cores waits for the file that takes
// longest.
#include "launch.cuh"
#include "routed_backward_kernel.cuh"

namespace pathnet::cuda {
namespace {

BackwardKernel kernel_of(const Program& program) {
  if (program.windowed) return windowed_backward_kernel(program.parts);
  return program.parts == 1 ? routed_backward_kernel<1, false> : routed_backward_kernel<2, false>;
}

}  // namespace

const char* routed_backward_blocks(const Program& program, int items, int& blocks) {
  return resident_blocks(kernel_of(program), program, items, blocks);
}

const char* launch_routed_backward(const PathBackward& job, const Program& program, int blocks, void* stream) {
  return blocks == 0 ? nullptr : launch(kernel_of(program), job, program, blocks, stream);
}

}  // namespace pathnet::cuda
