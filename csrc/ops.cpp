// Schemas and registration of the ops: the only file that includes torch, through its stable ABI, so that one build
// serves every torch from 2.11 on. An op checks and allocates; kernels only compute.

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <stdexcept>
#include <tuple>
#include <vector>

#include "checks.h"
#include "cpu/isa.h"
#include "cpu/pack_bits.h"
#include "cpu/routed_backward.h"
#include "cuda/pack_bits.h"
#include "cuda/program.h"
#include "cuda/routed_backward.h"
#include "cuda/routed_forward.h"

namespace pathnet {
namespace {

// Beyond what any GPU's thread block has.
constexpr int64_t kLargestShared = 1 << 20;

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

void* current_stream(const Tensor& x) {
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "this torch has no CUDA streams");
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  return stream;
}

Tensor pack_bits_cuda(const Tensor& x) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Tensor bits = empty_bits(x);
  const char* error = launch_pack_bits(x.const_data_ptr<float>(), row_size_of(x), x.size(0),
                                       bits.mutable_data_ptr<uint8_t>(), current_stream(x));
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

// The tables of a plan, its shapes and offsets checked.
Plan checked_plan(const Tensor& blocks, const Tensor& units, const Tensor& weights, const Tensor& scales,
                  int64_t bits_size) {
  check_dtype("blocks", blocks, ScalarType::Long);
  check_dtype("units", units, ScalarType::Long);
  check_dtype("weights", weights, ScalarType::Float);
  check_dtype("scales", scales, ScalarType::Float);
  check_shape("blocks", blocks, {-1, kBlockFields});
  STD_TORCH_CHECK(blocks.size(0) >= 1, "blocks: expected at least one row, got none");
  check_shape("units", units, {-1, kUnitFields});
  check_shape("weights", weights, {-1});
  check_shape("scales", scales, {-1});
  const Plan plan = {reinterpret_cast<const Block*>(blocks.const_data_ptr<int64_t>()),
                     blocks.size(0),
                     reinterpret_cast<const Unit*>(units.const_data_ptr<int64_t>()),
                     units.size(0),
                     weights.const_data_ptr<float>(),
                     scales.const_data_ptr<float>(),
                     nullptr,
                     bits_size};
  check_plan(plan, {weights.numel(), scales.numel(), bits_size});
  return plan;
}

std::tuple<Tensor, Tensor> routed_backward_cpu(const Tensor& grad, const Tensor& exponent, const Tensor& routing,
                                               const Tensor& blocks, const Tensor& units, const Tensor& weights,
                                               const Tensor& scales, const Tensor& relu_bits) {
  check_dtype("grad", grad, ScalarType::Float);
  check_dtype("exponent", exponent, ScalarType::Int);
  check_dtype("routing", routing, ScalarType::Float);
  check_dtype("relu_bits", relu_bits, ScalarType::Byte);
  check_shape("relu_bits", relu_bits, {-1, -1});
  Plan plan = checked_plan(blocks, units, weights, scales, relu_bits.size(1));
  plan.relu_bits = relu_bits.const_data_ptr<uint8_t>();
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

// The whole-path kernels' program and packed weights; made on the host.
std::tuple<Tensor, Tensor> cuda_plan(const Tensor& blocks, const Tensor& units, const Tensor& weights,
                                     const Tensor& scales, bool backward, int64_t parts, int64_t shared_bytes) {
  STD_TORCH_CHECK(parts == 1 || parts == 2, "parts: expected 1 or 2 bf16 terms a number, got ", parts);
  STD_TORCH_CHECK(shared_bytes > 0 && shared_bytes <= kLargestShared, "shared_bytes: expected 1 to ", kLargestShared,
                  ", got ", shared_bytes);
  const Plan plan = checked_plan(blocks, units, weights, scales, INT64_MAX);
  std::vector<int32_t> made;
  try {
    made = make_program(plan, backward, int(parts), int(shared_bytes));
  } catch (const std::invalid_argument& refusal) {
    STD_TORCH_CHECK(false, "blocks: ", refusal.what());
  }
  Tensor numbers = torch::stable::new_empty(blocks, {int64_t(made.size())}, ScalarType::Int);
  std::copy(made.begin(), made.end(), numbers.mutable_data_ptr<int32_t>());
  const Program& program = *reinterpret_cast<const Program*>(made.data());
  Tensor packed = torch::stable::new_empty(blocks, {program.weights_bytes}, ScalarType::Byte);
  pack_program_weights(plan, program, packed.mutable_data_ptr<uint8_t>());
  return {numbers, packed};
}

const Program& checked_program(const Tensor& program, bool backward) {
  check_dtype("program", program, ScalarType::Int);
  STD_TORCH_CHECK(program.is_cpu(), "program: expected a tensor on the CPU");
  STD_TORCH_CHECK(is_program(program.const_data_ptr<int32_t>(), program.numel()),
                  "program: expected what cuda_plan made, got other numbers");
  const Program& checked = *reinterpret_cast<const Program*>(program.const_data_ptr<int32_t>());
  STD_TORCH_CHECK((checked.backward != 0) == backward, "program: expected one for the walk ",
                  backward ? "back" : "forward", ", got the other");
  return checked;
}

// What both walks check: tensors of the network, and the routings.
void check_walk(const Program& program, const Tensor& program_numbers, const Tensor& device_program,
                const Tensor& weights, const Tensor& routing, const Tensor& order, const Tensor& like) {
  check_dtype("device_program", device_program, ScalarType::Int);
  check_shape("device_program", device_program, {program_numbers.numel()});
  check_dtype("weights", weights, ScalarType::Byte);
  check_shape("weights", weights, {program.weights_bytes});
  check_dtype("routing", routing, ScalarType::Float);
  check_shape("routing", routing, {-1, program.block_count, 2});
  check_dtype("order", order, ScalarType::Int);
  check_shape("order", order, {routing.size(0)});
  STD_TORCH_CHECK(
      !device_program.is_cpu() || std::equal(program_numbers.const_data_ptr<int32_t>(),
                                             program_numbers.const_data_ptr<int32_t>() + program_numbers.numel(),
                                             device_program.const_data_ptr<int32_t>()),
      "device_program: expected a copy of program, got other numbers");
  for (const Tensor* tensor : {&device_program, &weights, &routing, &order}) {
    STD_TORCH_CHECK(tensor->device() == like.device(), "expected all tensors but program on one device");
  }
}

struct BackwardTensors {
  PathBackward job;
  Tensor norms, grad_input, exponent_input, counter;
};

BackwardTensors backward_tensors(const Tensor& grad, const Tensor& exponent, const Tensor& routing,
                                 const Tensor& order, const Tensor& program_numbers, const Tensor& device_program,
                                 const Tensor& weights, const Tensor& relu_bits, bool gradients) {
  const Program& program = checked_program(program_numbers, true);
  const Image &in = program.blocks()[0].in, &out = program.blocks()[program.block_count - 1].out;
  check_walk(program, program_numbers, device_program, weights, routing, order, grad);
  check_dtype("grad", grad, ScalarType::Float);
  check_shape("grad", grad, {-1, program.channels_out, out.height, out.width});
  const int64_t batch = grad.size(0), paths = routing.size(0);
  check_dtype("exponent", exponent, ScalarType::Int);
  check_shape("exponent", exponent, {batch});
  check_dtype("relu_bits", relu_bits, ScalarType::Byte);
  check_shape("relu_bits", relu_bits, {batch, program.bits_bytes});
  STD_TORCH_CHECK(exponent.device() == grad.device() && relu_bits.device() == grad.device(),
                  "expected all tensors but program on one device");
  STD_TORCH_CHECK(paths * batch <= INT32_MAX / 2, "routing: expected at most 2^30 walks of samples, got ",
                  paths * batch);
  BackwardTensors made = {
      {},
      torch::stable::new_empty(grad, {paths, batch}, ScalarType::Double),
      torch::stable::new_empty(grad, {gradients ? paths : 0, batch, program.channels_in, in.height, in.width}),
      torch::stable::new_empty(exponent, {gradients ? paths : 0, batch}),
      torch::stable::new_zeros(exponent, {1})};
  made.job = {reinterpret_cast<const Program*>(device_program.const_data_ptr<int32_t>()),
              weights.const_data_ptr<uint8_t>(),
              relu_bits.const_data_ptr<uint8_t>(),
              grad.const_data_ptr<float>(),
              exponent.const_data_ptr<int32_t>(),
              routing.const_data_ptr<float>(),
              order.const_data_ptr<int32_t>(),
              made.counter.mutable_data_ptr<int32_t>(),
              int32_t(batch),
              int32_t(paths),
              made.norms.mutable_data_ptr<double>(),
              gradients ? made.grad_input.mutable_data_ptr<float>() : nullptr,
              gradients ? made.exponent_input.mutable_data_ptr<int32_t>() : nullptr};
  return made;
}

std::tuple<Tensor, Tensor, Tensor> cuda_routed_backward_twin(const Tensor& grad, const Tensor& exponent,
                                                             const Tensor& routing, const Tensor& order,
                                                             const Tensor& program, const Tensor& device_program,
                                                             const Tensor& weights, const Tensor& relu_bits,
                                                             bool gradients) {
  BackwardTensors made =
      backward_tensors(grad, exponent, routing, order, program, device_program, weights, relu_bits, gradients);
  if (made.job.paths > 0 && made.job.batch > 0) {
    const std::string finding = run_routed_backward(made.job);
    STD_TORCH_CHECK(finding.empty(), "cuda_routed_backward: ", finding);
  }
  return {made.norms, made.grad_input, made.exponent_input};
}

struct ForwardTensors {
  PathForward job;
  Tensor output, relu_bits, counter, scratch;
};

// `thread_blocks` of the scratch; the kernel's launcher and the twin know how many they run.
template <class Blocks>
ForwardTensors forward_tensors(const Tensor& y0, const Tensor& routing, const Tensor& order,
                               const Tensor& program_numbers, const Tensor& device_program, const Tensor& weights,
                               const Tensor& affine, bool record, const Blocks& thread_blocks) {
  const Program& program = checked_program(program_numbers, false);
  const Image &in = program.blocks()[0].in, &out = program.blocks()[program.block_count - 1].out;
  check_walk(program, program_numbers, device_program, weights, routing, order, y0);
  check_dtype("y0", y0, ScalarType::Float);
  check_shape("y0", y0, {-1, program.channels_in, in.height, in.width});
  check_dtype("affine", affine, ScalarType::Float);
  check_shape("affine", affine, {program.affine_size});
  STD_TORCH_CHECK(affine.device() == y0.device(), "expected all tensors but program on one device");
  const int64_t batch = y0.size(0), paths = routing.size(0);
  STD_TORCH_CHECK(!record || paths == 1, "routing: expected one to record, got ", paths);
  STD_TORCH_CHECK(paths * batch <= INT32_MAX / 2, "routing: expected at most 2^30 walks of samples, got ",
                  paths * batch);
  ForwardTensors made = {
      {},
      torch::stable::new_empty(y0, {paths, batch, program.channels_out, out.height, out.width}),
      torch::stable::new_empty(y0, {record ? batch : 0, program.bits_bytes}, ScalarType::Byte),
      torch::stable::new_zeros(order, {1}),
      torch::stable::new_empty(y0, {thread_blocks(program, int(paths * batch)), program.scratch_size})};
  made.job = {reinterpret_cast<const Program*>(device_program.const_data_ptr<int32_t>()),
              weights.const_data_ptr<uint8_t>(),
              affine.const_data_ptr<float>(),
              y0.const_data_ptr<float>(),
              routing.const_data_ptr<float>(),
              order.const_data_ptr<int32_t>(),
              made.counter.mutable_data_ptr<int32_t>(),
              int32_t(batch),
              int32_t(paths),
              made.scratch.mutable_data_ptr<float>(),
              made.output.mutable_data_ptr<float>(),
              record ? made.relu_bits.mutable_data_ptr<uint8_t>() : nullptr};
  return made;
}

std::tuple<Tensor, Tensor> cuda_routed_forward_twin(const Tensor& y0, const Tensor& routing, const Tensor& order,
                                                    const Tensor& program, const Tensor& device_program,
                                                    const Tensor& weights, const Tensor& affine, bool record) {
  const auto one = [](const Program&, int) { return int64_t(1); };
  ForwardTensors made = forward_tensors(y0, routing, order, program, device_program, weights, affine, record, one);
  if (made.job.paths > 0 && made.job.batch > 0) {
    const std::string finding = run_routed_forward(made.job);
    STD_TORCH_CHECK(finding.empty(), "cuda_routed_forward: ", finding);
  }
  return {made.output, made.relu_bits};
}

// The bits that a whole-path kernel recorded of one unit's ReLU, a byte each.
Tensor cuda_unpack_bits(const Tensor& relu_bits, const Tensor& program_numbers, int64_t block, int64_t unit) {
  const Program& program = checked_program(program_numbers, true);
  check_dtype("relu_bits", relu_bits, ScalarType::Byte);
  check_shape("relu_bits", relu_bits, {-1, program.bits_bytes});
  STD_TORCH_CHECK(relu_bits.is_cpu(), "relu_bits: expected a tensor on the CPU");
  STD_TORCH_CHECK(block >= 0 && block < program.block_count, "block: expected 0 to ", program.block_count - 1,
                  ", got ", block);
  STD_TORCH_CHECK(unit == 0 || unit == 1, "unit: expected 0 or 1, got ", unit);
  const Conv& conv = program.blocks()[block].units[unit];
  const Image& image = conv.target;
  Tensor bits = torch::stable::new_empty(relu_bits, {relu_bits.size(0), image.channels, image.height, image.width});
  uint8_t* out = bits.mutable_data_ptr<uint8_t>();
  for (int64_t sample = 0; sample < relu_bits.size(0); ++sample) {
    const uint8_t* own = relu_bits.const_data_ptr<uint8_t>() + sample * program.bits_bytes + conv.bits_byte;
    for (int c = 0; c < image.channels; ++c) {
      for (int y = 0; y < image.height; ++y) {
        for (int x = 0; x < image.width; ++x) {
          const int index = bit_index(image, c, y, x);
          *out++ = own[index / 8] >> index % 8 & 1;
        }
      }
    }
  }
  return bits;
}

#ifdef PATHNET_CUDA
std::tuple<Tensor, Tensor, Tensor> cuda_routed_backward(const Tensor& grad, const Tensor& exponent,
                                                        const Tensor& routing, const Tensor& order,
                                                        const Tensor& program, const Tensor& device_program,
                                                        const Tensor& weights, const Tensor& relu_bits,
                                                        bool gradients) {
  const torch::stable::accelerator::DeviceGuard guard(grad.get_device_index());
  BackwardTensors made =
      backward_tensors(grad, exponent, routing, order, program, device_program, weights, relu_bits, gradients);
  const char* error = launch_routed_backward(made.job, checked_program(program, true), current_stream(grad));
  STD_TORCH_CHECK(error == nullptr, "cuda_routed_backward: the launch failed: ", error);
  return {made.norms, made.grad_input, made.exponent_input};
}

std::tuple<Tensor, Tensor> cuda_routed_forward(const Tensor& y0, const Tensor& routing, const Tensor& order,
                                               const Tensor& program, const Tensor& device_program,
                                               const Tensor& weights, const Tensor& affine, bool record) {
  const torch::stable::accelerator::DeviceGuard guard(y0.get_device_index());
  const auto resident = [](const Program& program, int items) {
    int blocks = 0;
    const char* error = routed_forward_blocks(program, items, blocks);
    STD_TORCH_CHECK(error == nullptr, "cuda_routed_forward: ", error);
    return int64_t(blocks);
  };
  ForwardTensors made =
      forward_tensors(y0, routing, order, program, device_program, weights, affine, record, resident);
  const char* error =
      launch_routed_forward(made.job, checked_program(program, false), int(made.scratch.size(0)), current_stream(y0));
  STD_TORCH_CHECK(error == nullptr, "cuda_routed_forward: the launch failed: ", error);
  return {made.output, made.relu_bits};
}
#endif

}  // namespace
}  // namespace pathnet

STABLE_TORCH_LIBRARY(pathnet, m) {
  m.def("pack_bits(Tensor x) -> Tensor");
  m.def(
      "routed_backward(Tensor grad, Tensor exponent, Tensor routing, Tensor blocks, Tensor units, Tensor weights, "
      "Tensor scales, Tensor relu_bits) -> (Tensor, Tensor)");
  m.def(
      "cuda_plan(Tensor blocks, Tensor units, Tensor weights, Tensor scales, bool backward, int parts, "
      "int shared_bytes) -> (Tensor, Tensor)");
  m.def("cuda_unpack_bits(Tensor relu_bits, Tensor program, int block, int unit) -> Tensor");
  m.def(
      "cuda_routed_backward(Tensor grad, Tensor exponent, Tensor routing, Tensor order, Tensor program, "
      "Tensor device_program, Tensor weights, Tensor relu_bits, bool gradients) -> (Tensor, Tensor, Tensor)");
  m.def(
      "cuda_routed_forward(Tensor y0, Tensor routing, Tensor order, Tensor program, Tensor device_program, "
      "Tensor weights, Tensor affine, bool record) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(pathnet, CPU, m) {
  m.impl("pack_bits", TORCH_BOX(&pathnet::pack_bits_cpu));
  m.impl("routed_backward", TORCH_BOX(&pathnet::routed_backward_cpu));
  m.impl("cuda_plan", TORCH_BOX(&pathnet::cuda_plan));
  m.impl("cuda_unpack_bits", TORCH_BOX(&pathnet::cuda_unpack_bits));
  m.impl("cuda_routed_backward", TORCH_BOX(&pathnet::cuda_routed_backward_twin));
  m.impl("cuda_routed_forward", TORCH_BOX(&pathnet::cuda_routed_forward_twin));
}

#ifdef PATHNET_CUDA
STABLE_TORCH_LIBRARY_IMPL(pathnet, CUDA, m) {
  m.impl("pack_bits", TORCH_BOX(&pathnet::pack_bits_cuda));
  m.impl("cuda_routed_backward", TORCH_BOX(&pathnet::cuda_routed_backward));
  m.impl("cuda_routed_forward", TORCH_BOX(&pathnet::cuda_routed_forward));
}
#endif
