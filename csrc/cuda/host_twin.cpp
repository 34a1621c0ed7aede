// The kernels' twin: their bodies under the host's execution policy.
#include "host_exec.h"
#include "routed_backward.cuh"
#include "routed_forward.cuh"

namespace pathnet::cuda {

namespace {

template <class Body, class Job>
std::string run(HostExec exec, const Job& job) {
  Body(exec, job).run();
  return exec.finding();
}

}  // namespace

std::string run_routed_backward(const PathBackward& job) {
  const Program& program = *job.program;
  const HostExec exec(program.shared_bytes, program.images_scratch());
  if (program.windowed) {
    return program.parts == 1 ? run<RoutedBackward<HostExec, 1, true>>(exec, job)
                              : run<RoutedBackward<HostExec, 2, true>>(exec, job);
  }
  return program.parts == 1 ? run<RoutedBackward<HostExec, 1, false>>(exec, job)
                            : run<RoutedBackward<HostExec, 2, false>>(exec, job);
}

std::string run_routed_forward(const PathForward& job) {
  const Program& program = *job.program;
  const float* scratch = job.scratch + HostExec::kBlock * program.scratch_size;
  const HostExec exec(program.shared_bytes, program.images_scratch(), scratch, program.scratch_size);
  return program.windowed ? run<RoutedForward<HostExec, true>>(exec, job)
                          : run<RoutedForward<HostExec, false>>(exec, job);
}

}  // namespace pathnet::cuda
