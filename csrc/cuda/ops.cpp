// The cuda engine's ops: on CUDA tensors the kernels, on CPU tensors their twin. An op checks and allocates; kernels
// only compute.

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "../plan_checks.h"
#include "program.h"
#include "program_checks.h"
#include "routed_backward.h"
#include "routed_forward.h"

namespace pathnet::cuda {
namespace {

// More than any GPU's thread block has; a Divider does not count the strips that would fit into more.
constexpr int64_t kLargestShared = 1 << 18;

// The program, for the host, and the packed bytes, for the device: a copy of the program, and the weights.
std::tuple<Tensor, Tensor> pack(const Tensor& blocks, const Tensor& units, const Tensor& weights,
                                const Tensor& scales, bool backward, int64_t parts, int64_t shared_bytes) {
  STD_TORCH_CHECK(parts == 1 || parts == 2, "parts: expected 1 or 2 bf16 terms per number, got ", parts);
  STD_TORCH_CHECK(backward || parts == 2, "parts: expected 2 for the forward pass, got ", parts);
  STD_TORCH_CHECK(shared_bytes > 0 && shared_bytes <= kLargestShared, "shared_bytes: expected 1 to ", kLargestShared,
                  ", got ", shared_bytes);
  const Plan plan = checked_plan(blocks, units, weights, scales);
  std::vector<int32_t> numbers;
  try {
    numbers = make_program(plan, backward, int(parts), int(shared_bytes));
  } catch (const std::invalid_argument& refusal) {
    STD_TORCH_CHECK(false, "blocks: ", refusal.what());
  }
  const int64_t count = int64_t(numbers.size());
  Tensor program_numbers = torch::stable::new_empty(blocks, {count}, ScalarType::Int);
  std::copy(numbers.begin(), numbers.end(), program_numbers.mutable_data_ptr<int32_t>());
  const Program& program = *reinterpret_cast<const Program*>(numbers.data());
  Tensor packed = torch::stable::new_zeros(blocks, {weights_byte(program) + program.weights_bytes}, ScalarType::Byte);
  uint8_t* bytes = packed.mutable_data_ptr<uint8_t>();
  std::memcpy(bytes, numbers.data(), count * sizeof(int32_t));
  pack_program_weights(plan, program, bytes + weights_byte(program));
  return {program_numbers, packed};
}

// A backward pass, and the tensors that it writes.
struct BackwardTensors {
  PathBackward walk;
  Tensor norms, grad_input, exponent_input, counter;

  std::tuple<Tensor, Tensor, Tensor> results() const { return {norms, grad_input, exponent_input}; }
};

BackwardTensors backward_tensors(const Tensor& grad, const Tensor& exponent, const Tensor& routing,
                                 const Tensor& schedule, const Tensor& program_numbers, const Tensor& packed,
                                 const Tensor& relu_bits, bool gradients) {
  const Program& program = checked_program(program_numbers, true);
  const Image &in = program.blocks()[0].in, &out = program.blocks()[program.block_count - 1].out;
  const PackedProgram device = checked_packed(packed, program, grad);
  check_dtype("grad", grad, ScalarType::Float);
  check_shape("grad", grad, {-1, -1, program.channels_out, out.height, out.width});
  const int64_t starts = grad.size(0), batch = grad.size(1);
  STD_TORCH_CHECK(starts <= INT32_MAX, "grad: expected at most 2^31 - 1 gradients, got ", starts);
  const int64_t paths = checked_routing(routing, program, batch, grad), rows = gradients ? paths : 0;
  const int32_t* exponents = checked_numbers("exponent", exponent, {starts, batch}, grad);
  const int32_t* order = checked_numbers("schedule", schedule, {2, paths}, grad);
  check_bits(relu_bits, batch, program.bits_bytes, grad);
  BackwardTensors tensors = {{},
                             torch::stable::new_empty(grad, {paths, batch}, ScalarType::Double),
                             torch::stable::new_empty(grad, {rows, batch, program.channels_in, in.height, in.width}),
                             torch::stable::new_empty(exponent, {rows, batch}),
                             torch::stable::new_zeros(exponent, {1})};
  tensors.walk = {device.program,
                  device.weights,
                  relu_bits.const_data_ptr<uint8_t>(),
                  grad.const_data_ptr<float>(),
                  exponents,
                  order + paths,
                  routing.const_data_ptr<float>(),
                  order,
                  tensors.counter.mutable_data_ptr<int32_t>(),
                  relu_bits.stride(0),
                  int32_t(starts),
                  int32_t(batch),
                  int32_t(paths),
                  nullptr,
                  tensors.norms.mutable_data_ptr<double>(),
                  gradients ? tensors.grad_input.mutable_data_ptr<float>() : nullptr,
                  gradients ? tensors.exponent_input.mutable_data_ptr<int32_t>() : nullptr};
  return tensors;
}

std::tuple<Tensor, Tensor, Tensor> backward_running_twin(const Tensor& grad, const Tensor& exponent,
                                                         const Tensor& routing, const Tensor& schedule,
                                                         const Tensor& program, const Tensor& packed,
                                                         const Tensor& relu_bits, bool gradients) {
  BackwardTensors tensors =
      backward_tensors(grad, exponent, routing, schedule, program, packed, relu_bits, gradients);
  if (tensors.walk.paths > 0 && tensors.walk.batch > 0) {
    const std::string finding = run_routed_backward(tensors.walk);
    STD_TORCH_CHECK(finding.empty(), "cuda_backward_running: ", finding);
  }
  return tensors.results();
}

// A forward pass, and the tensors that it writes.
struct ForwardTensors {
  PathForward walk;
  Tensor output, relu_bits, counter, scratch;
};

// `thread_blocks(program, items)` is how many of them need a part of the scratch.
template <class ThreadBlocks>
ForwardTensors forward_tensors(const Tensor& y0, const Tensor& routing, const Tensor& order,
                               const Tensor& program_numbers, const Tensor& packed, const Tensor& affine, bool record,
                               const ThreadBlocks& thread_blocks) {
  const Program& program = checked_program(program_numbers, false);
  const Image &in = program.blocks()[0].in, &out = program.blocks()[program.block_count - 1].out;
  const PackedProgram device = checked_packed(packed, program, y0);
  check_dtype("y0", y0, ScalarType::Float);
  check_shape("y0", y0, {-1, program.channels_in, in.height, in.width});
  const int64_t batch = y0.size(0), paths = checked_routing(routing, program, batch, y0);
  const int32_t* order_numbers = checked_numbers("order", order, {paths}, y0);
  check_dtype("affine", affine, ScalarType::Float);
  check_shape("affine", affine, {program.affine_size});
  check_device("affine", affine, y0);
  STD_TORCH_CHECK(!record || paths == 1, "routing: expected one to record, got ", paths);
  ForwardTensors tensors = {
      {},
      torch::stable::new_empty(y0, {paths, batch, program.channels_out, out.height, out.width}),
      torch::stable::new_empty(y0, {record ? batch : 0, program.bits_bytes}, ScalarType::Byte),
      torch::stable::new_zeros(order, {1}),
      torch::stable::new_empty(y0, {thread_blocks(program, int(paths * batch)), program.scratch_size})};
  tensors.walk = {device.program,
                  device.weights,
                  affine.const_data_ptr<float>(),
                  y0.const_data_ptr<float>(),
                  routing.const_data_ptr<float>(),
                  order_numbers,
                  tensors.counter.mutable_data_ptr<int32_t>(),
                  int32_t(batch),
                  int32_t(paths),
                  tensors.scratch.mutable_data_ptr<float>(),
                  nullptr,
                  tensors.output.mutable_data_ptr<float>(),
                  record ? tensors.relu_bits.mutable_data_ptr<uint8_t>() : nullptr};
  return tensors;
}

std::tuple<Tensor, Tensor> forward_running_twin(const Tensor& y0, const Tensor& routing, const Tensor& order,
                                                const Tensor& program, const Tensor& packed, const Tensor& affine,
                                                bool record) {
  // The twin runs as the second thread block.
  const auto two = [](const Program&, int) { return int64_t(2); };
  ForwardTensors tensors = forward_tensors(y0, routing, order, program, packed, affine, record, two);
  if (tensors.walk.paths > 0 && tensors.walk.batch > 0) {
    const std::string finding = run_routed_forward(tensors.walk);
    STD_TORCH_CHECK(finding.empty(), "cuda_forward_running: ", finding);
  }
  return {tensors.output, tensors.relu_bits};
}

// Samples of a thread block, windows and slices at most, and bytes of shared memory.
std::tuple<int64_t, int64_t, int64_t, int64_t> form(const Tensor& program_numbers) {
  const Program& program = checked_program(program_numbers);
  return {program.samples, program.max_windows(), program.max_slices(), program.shared_bytes};
}

// Bytes of a sample's row of ReLU bits.
int64_t bits_bytes(const Tensor& program_numbers) { return checked_program(program_numbers, true).bits_bytes; }

// The recorded bits of one unit's ReLU, a byte each.
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
    const uint8_t* row = relu_bits.const_data_ptr<uint8_t>() + sample * program.bits_bytes + conv.bits_byte;
    for (int c = 0; c < image.channels; ++c) {
      for (int y = 0; y < image.height; ++y) {
        for (int x = 0; x < image.width; ++x) {
          const int index = bit_index(image, c, y, x);
          *out++ = row[index / 8] >> index % 8 & 1;
        }
      }
    }
  }
  return bits;
}

#ifdef PATHNET_CUDA
// Absent from a torch that was built without CUDA, where no CUDA tensor can arrive either.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

void* current_stream(const Tensor& x) {
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "this torch has no CUDA streams");
  // torch 2.11 and 2.12 have no macro for this in their stable headers.
  const AOTITorchError error = aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream);
  STD_TORCH_CHECK(error == AOTI_TORCH_SUCCESS, "torch does not report its current CUDA stream, error ", error);
  return stream;
}

// Memory for the images of that many thread blocks; empty if they are in shared memory.
Tensor images_scratch(const Tensor& like, const Program& program, int64_t blocks) {
  return torch::stable::new_empty(like, {blocks, program.images_scratch()}, ScalarType::Byte);
}

std::tuple<Tensor, Tensor, Tensor> backward_running(const Tensor& grad, const Tensor& exponent, const Tensor& routing,
                                                    const Tensor& schedule, const Tensor& program,
                                                    const Tensor& packed, const Tensor& relu_bits, bool gradients) {
  const torch::stable::accelerator::DeviceGuard guard(grad.get_device_index());
  BackwardTensors tensors =
      backward_tensors(grad, exponent, routing, schedule, program, packed, relu_bits, gradients);
  const Program& checked = checked_program(program, true);
  const int items = tensors.walk.paths * ceil_div(tensors.walk.batch, checked.samples);
  int blocks = 0;
  const char* error = routed_backward_blocks(checked, items, blocks);
  STD_TORCH_CHECK(error == nullptr, "cuda_backward_running: ", error);
  Tensor images = images_scratch(grad, checked, blocks);
  tensors.walk.images = images.mutable_data_ptr<uint8_t>();
  error = launch_routed_backward(tensors.walk, checked, blocks, current_stream(grad));
  STD_TORCH_CHECK(error == nullptr, "cuda_backward_running: the launch failed: ", error);
  return tensors.results();
}

std::tuple<Tensor, Tensor> forward_running(const Tensor& y0, const Tensor& routing, const Tensor& order,
                                           const Tensor& program, const Tensor& packed, const Tensor& affine,
                                           bool record) {
  const torch::stable::accelerator::DeviceGuard guard(y0.get_device_index());
  const auto resident = [](const Program& program, int items) {
    int blocks = 0;
    const char* error = routed_forward_blocks(program, items, blocks);
    STD_TORCH_CHECK(error == nullptr, "cuda_forward_running: ", error);
    return int64_t(blocks);
  };
  ForwardTensors tensors = forward_tensors(y0, routing, order, program, packed, affine, record, resident);
  const Program& checked = checked_program(program, false);
  const int64_t blocks = tensors.scratch.size(0);
  Tensor images = images_scratch(y0, checked, blocks);
  tensors.walk.images = images.mutable_data_ptr<uint8_t>();
  const char* error = launch_routed_forward(tensors.walk, checked, int(blocks), current_stream(y0));
  STD_TORCH_CHECK(error == nullptr, "cuda_forward_running: the launch failed: ", error);
  return {tensors.output, tensors.relu_bits};
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
      "cuda_backward_running(Tensor grad, Tensor exponent, Tensor routing, Tensor schedule, Tensor program, "
      "Tensor packed, Tensor relu_bits, bool gradients) -> (Tensor, Tensor, Tensor)");
  m.def(
      "cuda_forward_running(Tensor y0, Tensor routing, Tensor order, Tensor program, Tensor packed, Tensor affine, "
      "bool record) -> (Tensor, Tensor)");
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
