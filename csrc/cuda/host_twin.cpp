// The kernels' bodies under the host's execution policy.
#include "host_twin.h"

#include "routed_backward.cuh"
#include "routed_forward.cuh"

namespace pathnet::cuda {

namespace {

template <class Walk, class Job>
std::string run(const Job& job) {
  HostExec exec(job.program->shared_bytes, job.program->images_scratch());
  Walk(exec, job).run();
  return exec.finding();
}

}  // namespace

std::string run_routed_backward(const PathBackward& job) {
  if (job.program->windowed) {
    return job.program->parts == 1 ? run<RoutedBackward<HostExec, 1, true>>(job)
                                   : run<RoutedBackward<HostExec, 2, true>>(job);
  }
  return job.program->parts == 1 ? run<RoutedBackward<HostExec, 1, false>>(job)
                                 : run<RoutedBackward<HostExec, 2, false>>(job);
}

std::string run_routed_forward(const PathForward& job) {
  return job.program->windowed ? run<RoutedForward<HostExec, true>>(job) : run<RoutedForward<HostExec, false>>(job);
}

}  // namespace pathnet::cuda
