// The cuda engine's ops: on CUDA tensors the kernels, on CPU tensors their twin. An op checks and allocates; kernels
// only compute.

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "../plan_checks.h"
#include "program.h"
#include "routed_backward.h"
#include "routed_forward.h"

namespace pathnet::cuda {
namespace {

// Beyond what any GPU's thread block has; more strips than fit this a Divider's numbers do not count.
constexpr int64_t kLargestShared = 1 << 18;

#ifdef PATHNET_CUDA
// Absent from a torch that was built without CUDA, where no CUDA tensor can arrive either.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

void* current_stream(const Tensor& x) {
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "this torch has no CUDA streams");
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  return stream;
}
#endif

// The whole-path kernels' program and packed weights; made on the host.
std::tuple<Tensor, Tensor> pack(const Tensor& blocks, const Tensor& units, const Tensor& weights,
                                const Tensor& scales, bool backward, int64_t parts, int64_t shared_bytes) {
  STD_TORCH_CHECK(parts == 1 || parts == 2, "parts: expected 1 or 2 bf16 terms a number, got ", parts);
  STD_TORCH_CHECK(backward || parts == 2, "parts: expected 2 for the walk forward, got ", parts);
  STD_TORCH_CHECK(shared_bytes > 0 && shared_bytes <= kLargestShared, "shared_bytes: expected 1 to ", kLargestShared,
                  ", got ", shared_bytes);
  const Plan plan = checked_plan(blocks, units, weights, scales);
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

const Program& checked_program(const Tensor& program) {
  check_dtype("program", program, ScalarType::Int);
  STD_TORCH_CHECK(program.is_cpu(), "program: expected a tensor on the CPU");
  STD_TORCH_CHECK(is_program(program.const_data_ptr<int32_t>(), program.numel()),
                  "program: expected what cuda_pack made, got other numbers");
  return *reinterpret_cast<const Program*>(program.const_data_ptr<int32_t>());
}

const Program& checked_program(const Tensor& program, bool backward) {
  const Program& checked = checked_program(program);
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
  check_alignment("weights", weights, kUnitBytes);
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

// Whole rows of a sample's ReLU bits each, or the part of longer ones that some blocks have.
void check_bits(const Tensor& relu_bits, int64_t batch, int64_t bytes) {
  check_type("relu_bits", relu_bits, ScalarType::Byte);
  check_shape("relu_bits", relu_bits, {batch, bytes});
  check_alignment("relu_bits", relu_bits, kMostBits);
  STD_TORCH_CHECK(relu_bits.stride(1) == 1 && (batch < 2 || relu_bits.stride(0) % kMostBits == 0),
                  "relu_bits: expected contiguous rows a multiple of ", kMostBits, " bytes apart, got strides of ",
                  relu_bits.stride(0), " and ", relu_bits.stride(1));
}

BackwardTensors backward_tensors(const Tensor& grad, const Tensor& exponent, const Tensor& starts,
                                 const Tensor& routing, const Tensor& order, const Tensor& program_numbers,
                                 const Tensor& device_program, const Tensor& weights, const Tensor& relu_bits,
                                 bool wanted) {
  const Program& program = checked_program(program_numbers, true);
  const Image &in = program.blocks()[0].in, &out = program.blocks()[program.block_count - 1].out;
  check_walk(program, program_numbers, device_program, weights, routing, order, grad);
  check_dtype("grad", grad, ScalarType::Float);
  check_shape("grad", grad, {-1, -1, program.channels_out, out.height, out.width});
  const int64_t gradients = grad.size(0), batch = grad.size(1), paths = routing.size(0);
  check_dtype("exponent", exponent, ScalarType::Int);
  check_shape("exponent", exponent, {gradients, batch});
  check_dtype("starts", starts, ScalarType::Int);
  check_shape("starts", starts, {paths});
  check_bits(relu_bits, batch, program.bits_bytes);
  for (const Tensor* tensor : {&exponent, &starts, &relu_bits}) {
    STD_TORCH_CHECK(tensor->device() == grad.device(), "expected all tensors but program on one device");
  }
  STD_TORCH_CHECK(gradients <= INT32_MAX, "grad: expected at most 2^31 - 1 gradients, got ", gradients);
  STD_TORCH_CHECK(paths * batch <= INT32_MAX / 2, "routing: expected at most 2^30 walks of samples, got ",
                  paths * batch);
  BackwardTensors made = {
      {},
      torch::stable::new_empty(grad, {paths, batch}, ScalarType::Double),
      torch::stable::new_empty(grad, {wanted ? paths : 0, batch, program.channels_in, in.height, in.width}),
      torch::stable::new_empty(exponent, {wanted ? paths : 0, batch}),
      torch::stable::new_zeros(exponent, {1})};
  made.job = {reinterpret_cast<const Program*>(device_program.const_data_ptr<int32_t>()),
              weights.const_data_ptr<uint8_t>(),
              relu_bits.const_data_ptr<uint8_t>(),
              grad.const_data_ptr<float>(),
              exponent.const_data_ptr<int32_t>(),
              starts.const_data_ptr<int32_t>(),
              routing.const_data_ptr<float>(),
              order.const_data_ptr<int32_t>(),
              made.counter.mutable_data_ptr<int32_t>(),
              relu_bits.stride(0),
              int32_t(gradients),
              int32_t(batch),
              int32_t(paths),
              nullptr,
              made.norms.mutable_data_ptr<double>(),
              wanted ? made.grad_input.mutable_data_ptr<float>() : nullptr,
              wanted ? made.exponent_input.mutable_data_ptr<int32_t>() : nullptr};
  return made;
}

std::tuple<Tensor, Tensor, Tensor> backward_running_twin(const Tensor& grad, const Tensor& exponent,
                                                         const Tensor& starts, const Tensor& routing,
                                                         const Tensor& order, const Tensor& program,
                                                         const Tensor& device_program, const Tensor& weights,
                                                         const Tensor& relu_bits, bool gradients) {
  BackwardTensors made = backward_tensors(grad, exponent, starts, routing, order, program, device_program, weights,
                                          relu_bits, gradients);
  if (made.job.paths > 0 && made.job.batch > 0) {
    const std::string finding = run_routed_backward(made.job);
    STD_TORCH_CHECK(finding.empty(), "cuda_backward_running: ", finding);
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
              nullptr,
              made.output.mutable_data_ptr<float>(),
              record ? made.relu_bits.mutable_data_ptr<uint8_t>() : nullptr};
  return made;
}

std::tuple<Tensor, Tensor> forward_running_twin(const Tensor& y0, const Tensor& routing, const Tensor& order,
                                                const Tensor& program, const Tensor& device_program,
                                                const Tensor& weights, const Tensor& affine, bool record) {
  // The twin runs as the second thread block.
  const auto two = [](const Program&, int) { return int64_t(2); };
  ForwardTensors made = forward_tensors(y0, routing, order, program, device_program, weights, affine, record, two);
  if (made.job.paths > 0 && made.job.batch > 0) {
    const std::string finding = run_routed_forward(made.job);
    STD_TORCH_CHECK(finding.empty(), "cuda_forward_running: ", finding);
  }
  return {made.output, made.relu_bits};
}

// What shared memory a program asks for, and how it makes do with it.
std::tuple<int64_t, int64_t, int64_t, int64_t> form(const Tensor& program_numbers) {
  const Program& program = checked_program(program_numbers);
  return {program.samples, program.most_windows(), program.most_slices(), program.shared_bytes};
}

// Bytes of a sample's row of ReLU bits.
int64_t bits_bytes(const Tensor& program_numbers) { return checked_program(program_numbers, true).bits_bytes; }

// The bits that a whole-path kernel recorded of one unit's ReLU, a byte each.
Tensor unpack_bits(const Tensor& relu_bits, const Tensor& program_numbers, int64_t block, int64_t unit) {
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
// Memory for the images of so many thread blocks; empty where they lie in shared memory.
Tensor images_scratch(const Tensor& like, const Program& program, int64_t blocks) {
  return torch::stable::new_empty(like, {blocks, program.images_scratch()}, ScalarType::Byte);
}

std::tuple<Tensor, Tensor, Tensor> backward_running(const Tensor& grad, const Tensor& exponent, const Tensor& starts,
                                                    const Tensor& routing, const Tensor& order, const Tensor& program,
                                                    const Tensor& device_program, const Tensor& weights,
                                                    const Tensor& relu_bits, bool gradients) {
  const torch::stable::accelerator::DeviceGuard guard(grad.get_device_index());
  BackwardTensors made = backward_tensors(grad, exponent, starts, routing, order, program, device_program, weights,
                                          relu_bits, gradients);
  const Program& checked = checked_program(program, true);
  const int items = made.job.paths * ceil_div(made.job.batch, checked.samples);
  int blocks = 0;
  const char* error = routed_backward_blocks(checked, items, blocks);
  STD_TORCH_CHECK(error == nullptr, "cuda_backward_running: ", error);
  Tensor images = images_scratch(grad, checked, blocks);
  made.job.images = images.mutable_data_ptr<uint8_t>();
  error = launch_routed_backward(made.job, checked, blocks, current_stream(grad));
  STD_TORCH_CHECK(error == nullptr, "cuda_backward_running: the launch failed: ", error);
  return {made.norms, made.grad_input, made.exponent_input};
}

std::tuple<Tensor, Tensor> forward_running(const Tensor& y0, const Tensor& routing, const Tensor& order,
                                           const Tensor& program, const Tensor& device_program, const Tensor& weights,
                                           const Tensor& affine, bool record) {
  const torch::stable::accelerator::DeviceGuard guard(y0.get_device_index());
  const auto resident = [](const Program& program, int items) {
    int blocks = 0;
    const char* error = routed_forward_blocks(program, items, blocks);
    STD_TORCH_CHECK(error == nullptr, "cuda_forward_running: ", error);
    return int64_t(blocks);
  };
  ForwardTensors made =
      forward_tensors(y0, routing, order, program, device_program, weights, affine, record, resident);
  const Program& checked = checked_program(program, false);
  Tensor images = images_scratch(y0, checked, made.scratch.size(0));
  made.job.images = images.mutable_data_ptr<uint8_t>();
  const char* error = launch_routed_forward(made.job, checked, int(made.scratch.size(0)), current_stream(y0));
  STD_TORCH_CHECK(error == nullptr, "cuda_forward_running: the launch failed: ", error);
  return {made.output, made.relu_bits};
}
#endif

}  // namespace
}  // namespace pathnet::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(pathnet, m) {
  m.def(
      "cuda_pack(Tensor blocks, Tensor units, Tensor weights, Tensor scales, bool backward, int parts, "
      "int shared_bytes) -> (Tensor, Tensor)");
  m.def("cuda_form(Tensor program) -> (int, int, int, int)");
  m.def("cuda_bits_bytes(Tensor program) -> int");
  m.def("cuda_unpack_bits(Tensor relu_bits, Tensor program, int block, int unit) -> Tensor");
  m.def(
      "cuda_backward_running(Tensor grad, Tensor exponent, Tensor starts, Tensor routing, Tensor order, Tensor "
      "program, "
      "Tensor device_program, Tensor weights, Tensor relu_bits, bool gradients) -> (Tensor, Tensor, Tensor)");
  m.def(
      "cuda_forward_running(Tensor y0, Tensor routing, Tensor order, Tensor program, Tensor device_program, "
      "Tensor weights, Tensor affine, bool record) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(pathnet, CPU, m) {
  m.impl("cuda_pack", TORCH_BOX(&pathnet::cuda::pack));
  m.impl("cuda_form", TORCH_BOX(&pathnet::cuda::form));
  m.impl("cuda_bits_bytes", TORCH_BOX(&pathnet::cuda::bits_bytes));
  m.impl("cuda_unpack_bits", TORCH_BOX(&pathnet::cuda::unpack_bits));
  m.impl("cuda_backward_running", TORCH_BOX(&pathnet::cuda::backward_running_twin));
  m.impl("cuda_forward_running", TORCH_BOX(&pathnet::cuda::forward_running_twin));
}

#ifdef PATHNET_CUDA
STABLE_TORCH_LIBRARY_IMPL(pathnet, CUDA, m) {
  m.impl("cuda_backward_running", TORCH_BOX(&pathnet::cuda::backward_running));
  m.impl("cuda_forward_running", TORCH_BOX(&pathnet::cuda::forward_running));
}
#endif
