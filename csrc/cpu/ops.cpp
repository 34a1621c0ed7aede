// The cpu engine's ops. An op checks and allocates; kernels only compute.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstring>
#include <tuple>

#include "../plan_checks.h"
#include "../signals.h"
#include "kernels.h"
#include "threads.h"

namespace pathnet::cpu {
namespace {

// What stands before packed weights: which kernels they are for.
struct PackedHeader {
  int64_t isa, direction, folded, bf16;
};
constexpr int64_t kHeaderBytes = 64;
static_assert(sizeof(PackedHeader) <= kHeaderBytes, "the weights behind it are aligned");

Tensor pack(const Tensor& blocks, const Tensor& units, const Tensor& weights, const Tensor& scales, bool backward,
            bool fold_scales, bool bf16) {
  const Plan plan = checked_plan(blocks, units, weights, scales);
  if (fold_scales) check_closed(plan, false);
  const Isa isa = selected_isa();
  const Direction direction = backward ? Direction::kBackward : Direction::kForward;
  const Kernels kernels = kernels_of(isa, bf16);
  const int64_t size = kHeaderBytes + kernels.packed_size(plan, direction);
  Tensor packed = torch::stable::new_zeros(blocks, {size}, ScalarType::Byte);
  uint8_t* bytes = packed.mutable_data_ptr<uint8_t>();
  *reinterpret_cast<PackedHeader*>(bytes) = {int64_t(isa), int64_t(direction), fold_scales, bf16};
  Watch watch;
  kernels.pack(plan, direction, fold_scales, bytes + kHeaderBytes, [&] { watch.check(); });
  return packed;
}

struct Checked {
  Kernels kernels;
  const uint8_t* weights;
};

Checked checked_packed(const Tensor& packed, const Plan& plan, Direction direction, bool folded) {
  check_dtype("packed", packed, ScalarType::Byte);
  check_shape("packed", packed, {-1});
  check_alignment("packed", packed, sizeof(float));
  STD_TORCH_CHECK(packed.numel() >= kHeaderBytes, "packed: expected what cpu_pack made, got ", packed.numel(),
                  " bytes");
  PackedHeader header;
  std::memcpy(&header, packed.const_data_ptr<uint8_t>(), sizeof(header));
  const Isa isa = selected_isa();
  STD_TORCH_CHECK(header.isa == int64_t(isa), "packed: expected weights for the instruction set ", isa_name(isa),
                  ", got another's");
  STD_TORCH_CHECK(header.direction == int64_t(direction) && (header.folded != 0) == folded,
                  "packed: expected weights for this walk, got another's");
  const Kernels kernels = kernels_of(isa, header.bf16 != 0);
  const int64_t size = kHeaderBytes + kernels.packed_size(plan, direction);
  STD_TORCH_CHECK(packed.numel() == size, "packed: expected ", size, " bytes for this plan, got ", packed.numel());
  return {kernels, packed.const_data_ptr<uint8_t>() + kHeaderBytes};
}

// What the walks back give: so many gradients of each sample.
struct BackwardResult {
  int64_t batch;
  Tensor norms, grad_input, exponent_input;
};

BackwardResult backward_result(const Plan& plan, const Tensor& grad, const Tensor& exponent, int64_t exponents,
                               int64_t results, const Tensor& relu_bits, bool gradients) {
  check_dtype("grad", grad, ScalarType::Float);
  check_dtype("exponent", exponent, ScalarType::Int);
  const Block &first = plan.blocks[0], &last = plan.blocks[plan.block_count - 1];
  const int64_t batch = relu_bits.size(0), given = gradients ? results : 0;
  check_shape("grad", grad, {batch, last.out_channels, last.out_height, last.out_width});
  check_shape("exponent", exponent, {exponents});
  return {batch, torch::stable::new_empty(grad, {results, batch}, ScalarType::Double),
          torch::stable::new_empty(grad, {given, batch, first.in_channels, first.in_height, first.in_width}),
          torch::stable::new_zeros(exponent, {given, exponents})};
}

int64_t checked_routings(const Tensor& routing, const Plan& plan) {
  check_dtype("routing", routing, ScalarType::Float);
  check_shape("routing", routing, {-1, plan.block_count, 2});
  return routing.size(0);
}

// Of the sums by length: those of one routing.
int64_t checked_factors(const Tensor& routing, const Plan& plan) {
  check_dtype("routing", routing, ScalarType::Float);
  check_shape("routing", routing, {plan.block_count, 2});
  return 1;
}

BackwardWalk backward_walk(const Plan& plan, const Checked& checked, const Tensor& grad, const Tensor& exponent,
                           const Tensor& routing, int64_t routings, BackwardResult& made) {
  const bool gradients = made.grad_input.size(0) > 0;
  return {plan,
          checked.weights,
          grad.const_data_ptr<float>(),
          exponent.const_data_ptr<int32_t>(),
          routing.const_data_ptr<float>(),
          made.batch,
          routings,
          made.norms.mutable_data_ptr<double>(),
          gradients ? made.grad_input.mutable_data_ptr<float>() : nullptr,
          gradients ? made.exponent_input.mutable_data_ptr<int32_t>() : nullptr};
}

std::tuple<Tensor, Tensor, Tensor> backward_running(const Tensor& grad, const Tensor& exponent, const Tensor& routing,
                                                    const Tensor& blocks, const Tensor& units, const Tensor& packed,
                                                    const Tensor& relu_bits, bool gradients) {
  check_dtype("relu_bits", relu_bits, ScalarType::Byte);
  check_shape("relu_bits", relu_bits, {-1, -1});
  Plan plan = checked_tables(blocks, units, {INT64_MAX, INT64_MAX, relu_bits.size(1)});
  plan.relu_bits = relu_bits.const_data_ptr<uint8_t>();
  check_closed(plan, false);
  const Checked checked = checked_packed(packed, plan, Direction::kBackward, true);
  const int64_t routings = checked_routings(routing, plan);
  BackwardResult made = backward_result(plan, grad, exponent, relu_bits.size(0), routings, relu_bits, gradients);
  const BackwardWalk job = backward_walk(plan, checked, grad, exponent, routing, routings, made);
  if (made.batch > 0 && routings > 0) checked.kernels.backward(job, Threads().team());
  return {made.norms, made.grad_input, made.exponent_input};
}

std::tuple<Tensor, Tensor, Tensor> sums_by_length_running(const Tensor& grad, const Tensor& exponent,
                                                          const Tensor& routing, const Tensor& blocks,
                                                          const Tensor& units, const Tensor& packed,
                                                          const Tensor& relu_bits, bool gradients) {
  check_dtype("relu_bits", relu_bits, ScalarType::Byte);
  check_shape("relu_bits", relu_bits, {-1, -1});
  Plan plan = checked_tables(blocks, units, {INT64_MAX, INT64_MAX, relu_bits.size(1)});
  plan.relu_bits = relu_bits.const_data_ptr<uint8_t>();
  check_closed(plan, false);
  const Checked checked = checked_packed(packed, plan, Direction::kBackward, true);
  const int64_t routings = checked_factors(routing, plan);
  BackwardResult made =
      backward_result(plan, grad, exponent, relu_bits.size(0), plan.block_count + 1, relu_bits, gradients);
  const BackwardWalk job = backward_walk(plan, checked, grad, exponent, routing, routings, made);
  if (made.batch > 0) checked.kernels.sums_by_length(job, Threads().team());
  return {made.norms, made.grad_input, made.exponent_input};
}

// Both walks back of BN mode `batch`: routings, or the sums by length of one.
template <bool kSums>
std::tuple<Tensor, Tensor, Tensor> batch_walk(const Tensor& grad, const Tensor& exponent, const Tensor& routing,
                                              const Tensor& blocks, const Tensor& units, const Tensor& packed,
                                              const Tensor& relu_bits, const Tensor& normalized, const Tensor& scales,
                                              bool gradients) {
  check_dtype("relu_bits", relu_bits, ScalarType::Byte);
  check_shape("relu_bits", relu_bits, {-1, -1});
  const float* own_scales = checked_row("scales", scales);
  Plan plan = checked_tables(blocks, units, {INT64_MAX, scales.numel(), relu_bits.size(1)});
  plan.relu_bits = relu_bits.const_data_ptr<uint8_t>();
  plan.scales = own_scales;
  check_closed(plan, true);
  const Checked checked = checked_packed(packed, plan, Direction::kBackward, false);
  const int64_t routings = kSums ? checked_factors(routing, plan) : checked_routings(routing, plan);
  const int64_t results = kSums ? plan.block_count + 1 : routings;
  BackwardResult made = backward_result(plan, grad, exponent, 1, results, relu_bits, gradients);
  const BatchBackwardWalk job = {plan,
                                 checked.weights,
                                 checked_row("normalized", normalized, normalized_size(plan, made.batch)),
                                 grad.const_data_ptr<float>(),
                                 *exponent.const_data_ptr<int32_t>(),
                                 routing.const_data_ptr<float>(),
                                 made.batch,
                                 routings,
                                 made.norms.mutable_data_ptr<double>(),
                                 gradients ? made.grad_input.mutable_data_ptr<float>() : nullptr,
                                 gradients ? made.exponent_input.mutable_data_ptr<int32_t>() : nullptr};
  const auto walk = kSums ? checked.kernels.batch_sums_by_length : checked.kernels.batch_backward;
  if (made.batch > 0 && routings > 0) walk(job, Threads().team());
  return {made.norms, made.grad_input, made.exponent_input};
}

// Bytes of a sample's ReLU bits: the tables say where each unit's begin.
int64_t bits_stride(const Plan& plan) {
  int64_t stride = 0;
  for (int64_t u = 0; u < plan.unit_count; ++u) {
    const Unit& unit = plan.units[u];
    if (unit.bits_offset >= 0) stride = std::max(stride, unit.bits_offset + unit.bits_size());
  }
  return stride;
}

// What both walks forward check.
Plan forward_plan(const Tensor& y0, const Tensor& routing, const Tensor& blocks, const Tensor& units,
                  const Tensor& scales, const Tensor& shifts, bool record) {
  const float* own_scales = checked_row("scales", scales);
  checked_row("shifts", shifts, scales.numel());
  Plan plan = checked_tables(blocks, units, {INT64_MAX, scales.numel(), INT64_MAX});
  plan.scales = own_scales;
  plan.bits_stride = bits_stride(plan);
  check_dtype("y0", y0, ScalarType::Float);
  check_dtype("routing", routing, ScalarType::Float);
  const Block& first = plan.blocks[0];
  check_shape("y0", y0, {-1, first.in_channels, first.in_height, first.in_width});
  check_shape("routing", routing, {-1, plan.block_count, 2});
  STD_TORCH_CHECK(!record || routing.size(0) == 1, "routing: expected one to record, got ", routing.size(0));
  // What a module that is left out would have recorded is not known.
  for (int64_t b = 0; record && b < plan.block_count; ++b) {
    STD_TORCH_CHECK(routing.const_data_ptr<float>()[2 * b + 1] != 0.0f,
                    "routing: expected no residual module left out where the walk is recorded, got 0 in row ", b);
  }
  return plan;
}

Tensor empty_output(const Plan& plan, const Tensor& y0, const Tensor& routing) {
  const Block& last = plan.blocks[plan.block_count - 1];
  return torch::stable::new_empty(y0,
                                  {routing.size(0), y0.size(0), last.out_channels, last.out_height, last.out_width});
}

std::tuple<Tensor, Tensor> forward_running(const Tensor& y0, const Tensor& routing, const Tensor& blocks,
                                           const Tensor& units, const Tensor& scales, const Tensor& shifts,
                                           const Tensor& biases, const Tensor& packed, bool record) {
  const Plan plan = forward_plan(y0, routing, blocks, units, scales, shifts, record);
  check_closed(plan, false);
  int64_t outputs = 0;
  for (int64_t u = 0; u < plan.unit_count; ++u) outputs += plan.units[u].out_channels;
  const float* own_biases = biases.numel() == 0 ? nullptr : checked_row("biases", biases, outputs);
  const Checked checked = checked_packed(packed, plan, Direction::kForward, false);
  Tensor output = empty_output(plan, y0, routing);
  Tensor relu_bits = torch::stable::new_zeros(y0, {record ? y0.size(0) : 0, plan.bits_stride}, ScalarType::Byte);
  const ForwardWalk job = {plan,
                           checked.weights,
                           shifts.const_data_ptr<float>(),
                           own_biases,
                           y0.const_data_ptr<float>(),
                           routing.const_data_ptr<float>(),
                           y0.size(0),
                           routing.size(0),
                           output.mutable_data_ptr<float>(),
                           record ? relu_bits.mutable_data_ptr<uint8_t>() : nullptr};
  if (job.batch > 0 && job.routings > 0) checked.kernels.forward(job, Threads().team());
  return {output, relu_bits};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward_batch(const Tensor& y0, const Tensor& routing,
                                                         const Tensor& blocks, const Tensor& units,
                                                         const Tensor& scales, const Tensor& shifts,
                                                         const Tensor& epsilons, const Tensor& packed, bool record) {
  const Plan plan = forward_plan(y0, routing, blocks, units, scales, shifts, record);
  check_closed(plan, true);
  const Checked checked = checked_packed(packed, plan, Direction::kForward, false);
  const int64_t batch = y0.size(0);
  Tensor output = empty_output(plan, y0, routing);
  Tensor relu_bits = torch::stable::new_zeros(y0, {record ? batch : 0, plan.bits_stride}, ScalarType::Byte);
  Tensor normalized = torch::stable::new_empty(y0, {record ? normalized_size(plan, batch) : 0});
  Tensor batch_scales = torch::stable::new_zeros(scales, {record ? scales.numel() : 0});
  const BatchForwardWalk job = {plan,
                                checked.weights,
                                shifts.const_data_ptr<float>(),
                                checked_row("epsilons", epsilons, plan.unit_count),
                                y0.const_data_ptr<float>(),
                                routing.const_data_ptr<float>(),
                                batch,
                                routing.size(0),
                                output.mutable_data_ptr<float>(),
                                record ? relu_bits.mutable_data_ptr<uint8_t>() : nullptr,
                                record ? normalized.mutable_data_ptr<float>() : nullptr,
                                record ? batch_scales.mutable_data_ptr<float>() : nullptr};
  if (job.batch > 0 && job.routings > 0) checked.kernels.batch_forward(job, Threads().team());
  return {output, relu_bits, normalized, batch_scales};
}

}  // namespace
}  // namespace pathnet::cpu

STABLE_TORCH_LIBRARY(pathnet, m) {
  m.def(
      "cpu_pack(Tensor blocks, Tensor units, Tensor weights, Tensor scales, bool backward, bool fold_scales, "
      "bool bf16) -> Tensor");
  m.def(
      "cpu_backward_running(Tensor grad, Tensor exponent, Tensor routing, Tensor blocks, Tensor units, Tensor "
      "packed, "
      "Tensor relu_bits, bool gradients) -> (Tensor, Tensor, Tensor)");
  m.def(
      "cpu_sums_by_length_running(Tensor grad, Tensor exponent, Tensor routing, Tensor blocks, Tensor units, Tensor "
      "packed, "
      "Tensor relu_bits, bool gradients) -> (Tensor, Tensor, Tensor)");
  m.def(
      "cpu_forward_running(Tensor y0, Tensor routing, Tensor blocks, Tensor units, Tensor scales, Tensor shifts, "
      "Tensor biases, Tensor packed, bool record) -> (Tensor, Tensor)");
  m.def(
      "cpu_backward_batch(Tensor grad, Tensor exponent, Tensor routing, Tensor blocks, Tensor units, Tensor packed, "
      "Tensor relu_bits, Tensor normalized, Tensor scales, bool gradients) -> (Tensor, Tensor, Tensor)");
  m.def(
      "cpu_sums_by_length_batch(Tensor grad, Tensor exponent, Tensor routing, Tensor blocks, Tensor units, "
      "Tensor packed, Tensor relu_bits, Tensor normalized, Tensor scales, bool gradients) -> (Tensor, Tensor, "
      "Tensor)");
  m.def(
      "cpu_forward_batch(Tensor y0, Tensor routing, Tensor blocks, Tensor units, Tensor scales, Tensor shifts, "
      "Tensor epsilons, Tensor packed, bool record) -> (Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(pathnet, CPU, m) {
  m.impl("cpu_pack", TORCH_BOX(&pathnet::cpu::pack));
  m.impl("cpu_backward_running", TORCH_BOX(&pathnet::cpu::backward_running));
  m.impl("cpu_sums_by_length_running", TORCH_BOX(&pathnet::cpu::sums_by_length_running));
  m.impl("cpu_forward_running", TORCH_BOX(&pathnet::cpu::forward_running));
  m.impl("cpu_backward_batch", TORCH_BOX(&pathnet::cpu::batch_walk<false>));
  m.impl("cpu_sums_by_length_batch", TORCH_BOX(&pathnet::cpu::batch_walk<true>));
  m.impl("cpu_forward_batch", TORCH_BOX(&pathnet::cpu::forward_batch));
}
