// The kernels' bodies under the host's execution policy.
#include "host_twin.h"

#include "routed_backward.cuh"
#include "routed_forward.cuh"

namespace pathnet::cuda {

std::string run_routed_backward(const PathBackward& job) {
  HostExec exec(job.program->shared_bytes);
  if (job.program->parts == 1) {
    RoutedBackward<HostExec, 1>(exec, job).run();
  } else {
    RoutedBackward<HostExec, 2>(exec, job).run();
  }
  return exec.finding();
}

std::string run_routed_forward(const PathForward& job) {
  HostExec exec(job.program->shared_bytes, job.scratch, job.program->scratch_size);
  RoutedForward<HostExec>(exec, job).run();
  return exec.finding();
}

}  // namespace pathnet::cuda
