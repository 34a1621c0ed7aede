// The routed backward pass with images in global memory; routed_backward.cu launches it.
#include "routed_backward_kernel.cuh"

namespace pathnet::cuda {

BackwardKernel windowed_backward_kernel(int parts) {
  return parts == 1 ? routed_backward_kernel<1, true> : routed_backward_kernel<2, true>;
}

}  // namespace pathnet::cuda
