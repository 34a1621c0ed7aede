// Schemas and registration of the ops: the only file that includes torch, through its stable ABI, so that one build
// serves every torch from 2.11 on. An op checks and allocates; kernels only compute.

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <tuple>
#include <vector>

#include "checks.h"
#include "cpu/isa.h"
#include "cpu/pack_bits.h"
#include "cpu/routed_backward.h"
#include "cuda/pack_bits.h"

namespace pathnet {
namespace {

int64_t row_size_of(const Tensor& x) {
  int64_t row_size = 1;
  for (int64_t d = 1; d < x.dim(); ++d) row_size *= x.size(d);
  return row_size;
}

Tensor empty_bits(const Tensor& x) {
  check_dtype("x", x, ScalarType::Float);
  STD_TORCH_CHECK(x.dim() >= 1, "x: expected shape [B, ...], got ", shape_of(x));
  return torch::stable::new_empty(x, {x.size(0), (row_size_of(x) + 7) / 8}, ScalarType::Byte);
}

Tensor pack_bits_cpu(const Tensor& x) {
  Tensor bits = empty_bits(x);
  const float* values = x.const_data_ptr<float>();
  uint8_t* packed = bits.mutable_data_ptr<uint8_t>();
  const int64_t row_size = row_size_of(x);
  torch::stable::parallel_for(
      0, x.size(0), 1, [&](int64_t begin, int64_t end) { pack_bits_rows(values, row_size, begin, end, packed); });
  return bits;
}

#ifdef PATHNET_CUDA
// Absent from a torch that was built without CUDA, where no CUDA tensor can arrive either.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

Tensor pack_bits_cuda(const Tensor& x) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Tensor bits = empty_bits(x);
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "x: this torch has no CUDA streams");
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  const char* error = launch_pack_bits(x.const_data_ptr<float>(), row_size_of(x), x.size(0),
                                       bits.mutable_data_ptr<uint8_t>(), stream);
  STD_TORCH_CHECK(error == nullptr, "pack_bits: the launch failed: ", error);
  return bits;
}
#endif

RoutedBackwardKernel routed_backward_kernel(Isa isa) {
#ifdef PATHNET_X86
  if (isa == Isa::kAvx512) return avx512::routed_backward_kernel();
  if (isa == Isa::kAvx2) return avx2::routed_backward_kernel();
#endif
  return base::routed_backward_kernel();
}

std::tuple<Tensor, Tensor> routed_backward_cpu(const Tensor& grad, const Tensor& exponent, const Tensor& routing,
                                               const Tensor& blocks, const Tensor& units, const Tensor& weights,
                                               const Tensor& scales, const Tensor& relu_bits) {
  check_dtype("grad", grad, ScalarType::Float);
  check_dtype("exponent", exponent, ScalarType::Int);
  check_dtype("routing", routing, ScalarType::Float);
  check_dtype("blocks", blocks, ScalarType::Long);
  check_dtype("units", units, ScalarType::Long);
  check_dtype("weights", weights, ScalarType::Float);
  check_dtype("scales", scales, ScalarType::Float);
  check_dtype("relu_bits", relu_bits, ScalarType::Byte);
  check_shape("blocks", blocks, {-1, kBlockFields});
  STD_TORCH_CHECK(blocks.size(0) >= 1, "blocks: expected at least one row, got none");
  check_shape("units", units, {-1, kUnitFields});
  check_shape("weights", weights, {-1});
  check_shape("scales", scales, {-1});
  check_shape("relu_bits", relu_bits, {-1, -1});

  const Plan plan = {reinterpret_cast<const Block*>(blocks.const_data_ptr<int64_t>()),
                     blocks.size(0),
                     reinterpret_cast<const Unit*>(units.const_data_ptr<int64_t>()),
                     units.size(0),
                     weights.const_data_ptr<float>(),
                     scales.const_data_ptr<float>(),
                     relu_bits.const_data_ptr<uint8_t>(),
                     relu_bits.size(1)};
  check_plan(plan, weights, scales, relu_bits);
  const Block &first = plan.blocks[0], &last = plan.blocks[plan.block_count - 1];
  const int64_t batch = relu_bits.size(0);
  check_shape("grad", grad, {batch, last.out_channels, last.out_height, last.out_width});
  check_shape("exponent", exponent, {batch});
  check_shape("routing", routing, {-1, plan.block_count, 2});

  const int64_t routings = routing.size(0);
  Tensor grad_input =
      torch::stable::new_empty(grad, {routings, batch, first.in_channels, first.in_height, first.in_width});
  Tensor exponent_input = torch::stable::new_empty(exponent, {routings, batch});
  const RoutedBackwardKernel kernel = routed_backward_kernel(selected_isa());
  std::vector<float> packed(kernel.packed_size(plan));
  kernel.pack_weights(plan, packed.data());
  const RoutedBackward job = {plan,
                              packed.data(),
                              grad.const_data_ptr<float>(),
                              exponent.const_data_ptr<int32_t>(),
                              routing.const_data_ptr<float>(),
                              batch,
                              routings,
                              grad_input.mutable_data_ptr<float>(),
                              exponent_input.mutable_data_ptr<int32_t>()};
  torch::stable::parallel_for(0, routings * batch, 1,
                              [&](int64_t begin, int64_t end) { kernel.walk(job, begin, end); });
  return {grad_input, exponent_input};
}

}  // namespace
}  // namespace pathnet

STABLE_TORCH_LIBRARY(pathnet, m) {
  m.def("pack_bits(Tensor x) -> Tensor");
  m.def(
      "routed_backward(Tensor grad, Tensor exponent, Tensor routing, Tensor blocks, Tensor units, Tensor weights, "
      "Tensor scales, Tensor relu_bits) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(pathnet, CPU, m) {
  m.impl("pack_bits", TORCH_BOX(&pathnet::pack_bits_cpu));
  m.impl("routed_backward", TORCH_BOX(&pathnet::routed_backward_cpu));
}

#ifdef PATHNET_CUDA
STABLE_TORCH_LIBRARY_IMPL(pathnet, CUDA, m) { m.impl("pack_bits", TORCH_BOX(&pathnet::pack_bits_cuda)); }
#endif
