// The cpu engine's ops. An op checks and allocates; kernels only compute.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <tuple>

#include "../plan_checks.h"
#include "../signals.h"
#include "kernels.h"
#include "packed_plan.h"
#include "threads.h"

namespace pathnet::cpu {
namespace {

Addends checked_addends(const Tensor& addends, const Plan& plan, WalkKind kind) {
  if (is_batch(kind)) return {checked_row("epsilons", addends, plan.unit_count), plan.unit_count};
  if (addends.numel() == 0) return {nullptr, 0};
  int64_t outputs = 0;
  for (int64_t u = 0; u < plan.unit_count; ++u) outputs += plan.units[u].out_channels;
  return {checked_row("biases", addends, outputs), outputs};
}

Tensor pack(const Tensor& blocks, const Tensor& units, const Tensor& weights, const Tensor& scales,
            const Tensor& shifts, const Tensor& addends, int64_t walk, bool bf16) {
  STD_TORCH_CHECK(walk >= 0 && walk < kWalkKinds, "walk: expected 0 to ", kWalkKinds - 1, ", got ", walk);
  const WalkKind kind = WalkKind(walk);
  const Plan plan = checked_plan(blocks, units, weights, scales);
  check_closed(plan, is_batch(kind));
  const PlanParts parts = {
      plan, scales.numel(), checked_row("shifts", shifts, scales.numel()), checked_addends(addends, plan, kind), kind,
      bf16};
  Tensor packed;
  const auto allocate = [&](int64_t size) {
    packed = torch::stable::new_zeros(blocks, {size}, ScalarType::Byte);
    return packed.mutable_data_ptr<uint8_t>();
  };
  Watch watch;
  pack_plan(parts, allocate, [&] { watch.check(); });
  return packed;
}

UnpackedPlan checked_packed_plan(const Tensor& plan, WalkKind kind) {
  check_dtype("plan", plan, ScalarType::Byte);
  check_shape("plan", plan, {-1});
  check_alignment("plan", plan, sizeof(float));
  return unpack_plan(plan.const_data_ptr<uint8_t>(), plan.numel(), kind);
}

// Bytes of a sample's row of ReLU bits.
int64_t bits_stride(const Plan& plan) {
  int64_t stride = 0;
  for (int64_t u = 0; u < plan.unit_count; ++u) {
    const Unit& unit = plan.units[u];
    if (unit.bits_offset >= 0) stride = std::max(stride, unit.bits_offset + unit.bits_size());
  }
  return stride;
}

// The plan of a backward pass, with the ReLU bits of a record.
UnpackedPlan backward_plan(const Tensor& packed, WalkKind kind, const Tensor& relu_bits) {
  UnpackedPlan unpacked = checked_packed_plan(packed, kind);
  check_dtype("relu_bits", relu_bits, ScalarType::Byte);
  check_shape("relu_bits", relu_bits, {-1, -1});
  const int64_t stride = bits_stride(unpacked.plan);
  STD_TORCH_CHECK(relu_bits.size(1) >= stride, "relu_bits: expected at least ", stride, " bytes per sample, got ",
                  relu_bits.size(1));
  unpacked.plan.relu_bits = relu_bits.const_data_ptr<uint8_t>();
  unpacked.plan.bits_stride = relu_bits.size(1);
  return unpacked;
}

// The number of routings of a backward pass, and of its results for each sample.
struct Counts {
  int64_t routings, results;
};

// The sums by length have one routing, and one result for each length.
template <bool kSums>
Counts checked_routing(const Tensor& routing, const Plan& plan) {
  check_dtype("routing", routing, ScalarType::Float);
  if constexpr (kSums) {
    check_shape("routing", routing, {plan.block_count, 2});
    return {1, plan.block_count + 1};
  }
  check_shape("routing", routing, {-1, plan.block_count, 2});
  return {routing.size(0), routing.size(0)};
}

// The results of a backward pass. Without gradients the last two are empty, and their pointers null.
struct BackwardResult {
  Tensor norms, grad_input, exponent_input;
  bool gradients;

  double* norms_data() { return norms.mutable_data_ptr<double>(); }
  float* grad_data() { return gradients ? grad_input.mutable_data_ptr<float>() : nullptr; }
  int32_t* exponent_data() { return gradients ? exponent_input.mutable_data_ptr<int32_t>() : nullptr; }
  std::tuple<Tensor, Tensor, Tensor> tensors() const { return {norms, grad_input, exponent_input}; }
};

// `exponents`: per routing, one per sample or one for the batch.
BackwardResult backward_result(const Plan& plan, const Tensor& grad, const Tensor& exponent, int64_t batch,
                               int64_t exponents, int64_t results, bool gradients) {
  check_dtype("grad", grad, ScalarType::Float);
  check_dtype("exponent", exponent, ScalarType::Int);
  const Block &first = plan.blocks[0], &last = plan.blocks[plan.block_count - 1];
  check_shape("grad", grad, {batch, last.out_channels, last.out_height, last.out_width});
  check_shape("exponent", exponent, {exponents});
  const int64_t rows = gradients ? results : 0;
  return {torch::stable::new_empty(grad, {results, batch}, ScalarType::Double),
          torch::stable::new_empty(grad, {rows, batch, first.in_channels, first.in_height, first.in_width}),
          torch::stable::new_zeros(exponent, {rows, exponents}), gradients && rows > 0};
}

template <bool kSums>
std::tuple<Tensor, Tensor, Tensor> backward_running(const Tensor& grad, const Tensor& exponent, const Tensor& routing,
                                                    const Tensor& packed, const Tensor& relu_bits, bool gradients) {
  const UnpackedPlan unpacked = backward_plan(packed, WalkKind::kBackwardRunning, relu_bits);
  const Plan& plan = unpacked.plan;
  const int64_t batch = relu_bits.size(0);
  const Counts counts = checked_routing<kSums>(routing, plan);
  BackwardResult result = backward_result(plan, grad, exponent, batch, batch, counts.results, gradients);
  const BackwardRunningWalk walk = {plan,
                                    unpacked.weights,
                                    grad.const_data_ptr<float>(),
                                    exponent.const_data_ptr<int32_t>(),
                                    routing.const_data_ptr<float>(),
                                    batch,
                                    counts.routings,
                                    result.norms_data(),
                                    result.grad_data(),
                                    result.exponent_data()};
  const auto kernel = kSums ? unpacked.kernels.sums_by_length_running : unpacked.kernels.backward_running;
  if (batch > 0 && counts.routings > 0) kernel(walk, Threads().team());
  return result.tensors();
}

template <bool kSums>
std::tuple<Tensor, Tensor, Tensor> backward_batch(const Tensor& grad, const Tensor& exponent, const Tensor& routing,
                                                  const Tensor& packed, const Tensor& relu_bits,
                                                  const Tensor& normalized, const Tensor& scales, bool gradients) {
  UnpackedPlan unpacked = backward_plan(packed, WalkKind::kBackwardBatch, relu_bits);
  Plan& plan = unpacked.plan;
  const int64_t batch = relu_bits.size(0);
  plan.scales = checked_row("scales", scales, unpacked.scale_count);
  const Counts counts = checked_routing<kSums>(routing, plan);
  BackwardResult result = backward_result(plan, grad, exponent, batch, 1, counts.results, gradients);
  const BackwardBatchWalk walk = {plan,
                                  unpacked.weights,
                                  checked_row("normalized", normalized, normalized_size(plan, batch)),
                                  grad.const_data_ptr<float>(),
                                  *exponent.const_data_ptr<int32_t>(),
                                  routing.const_data_ptr<float>(),
                                  batch,
                                  counts.routings,
                                  result.norms_data(),
                                  result.grad_data(),
                                  result.exponent_data()};
  const auto kernel = kSums ? unpacked.kernels.sums_by_length_batch : unpacked.kernels.backward_batch;
  if (batch > 0 && counts.routings > 0) kernel(walk, Threads().team());
  return result.tensors();
}

// The plan of a forward pass, whose other arguments are checked too.
UnpackedPlan forward_plan(const Tensor& y0, const Tensor& routing, const Tensor& packed, WalkKind kind, bool record) {
  UnpackedPlan unpacked = checked_packed_plan(packed, kind);
  Plan& plan = unpacked.plan;
  plan.bits_stride = bits_stride(plan);
  check_dtype("y0", y0, ScalarType::Float);
  check_dtype("routing", routing, ScalarType::Float);
  const Block& first = plan.blocks[0];
  check_shape("y0", y0, {-1, first.in_channels, first.in_height, first.in_width});
  check_shape("routing", routing, {-1, plan.block_count, 2});
  STD_TORCH_CHECK(!record || routing.size(0) == 1, "routing: expected one to record, got ", routing.size(0));
  // A module that is left out has no ReLU bits to record.
  for (int64_t b = 0; record && b < plan.block_count; ++b) {
    STD_TORCH_CHECK(routing.const_data_ptr<float>()[2 * b + 1] != 0.0f,
                    "routing: expected no residual module left out if the pass is recorded, got 0 in row ", b);
  }
  return unpacked;
}

Tensor empty_output(const Plan& plan, const Tensor& y0, const Tensor& routing) {
  const Block& last = plan.blocks[plan.block_count - 1];
  return torch::stable::new_empty(y0,
                                  {routing.size(0), y0.size(0), last.out_channels, last.out_height, last.out_width});
}

Tensor empty_bits(const Plan& plan, const Tensor& y0, bool record) {
  return torch::stable::new_zeros(y0, {record ? y0.size(0) : 0, plan.bits_stride}, ScalarType::Byte);
}

std::tuple<Tensor, Tensor> forward_running(const Tensor& y0, const Tensor& routing, const Tensor& packed,
                                           bool record) {
  const UnpackedPlan unpacked = forward_plan(y0, routing, packed, WalkKind::kForwardRunning, record);
  const Plan& plan = unpacked.plan;
  Tensor output = empty_output(plan, y0, routing), relu_bits = empty_bits(plan, y0, record);
  const ForwardRunningWalk walk = {plan,
                                   unpacked.weights,
                                   unpacked.shifts,
                                   unpacked.addends,
                                   y0.const_data_ptr<float>(),
                                   routing.const_data_ptr<float>(),
                                   y0.size(0),
                                   routing.size(0),
                                   output.mutable_data_ptr<float>(),
                                   record ? relu_bits.mutable_data_ptr<uint8_t>() : nullptr};
  if (walk.batch > 0 && walk.routings > 0) unpacked.kernels.forward_running(walk, Threads().team());
  return {output, relu_bits};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward_batch(const Tensor& y0, const Tensor& routing,
                                                         const Tensor& packed, bool record) {
  const UnpackedPlan unpacked = forward_plan(y0, routing, packed, WalkKind::kForwardBatch, record);
  const Plan& plan = unpacked.plan;
  const int64_t batch = y0.size(0);
  Tensor output = empty_output(plan, y0, routing), relu_bits = empty_bits(plan, y0, record);
  Tensor normalized = torch::stable::new_empty(y0, {record ? normalized_size(plan, batch) : 0});
  Tensor scales = torch::stable::new_zeros(y0, {record ? unpacked.scale_count : 0});
  const ForwardBatchWalk walk = {plan,
                                 unpacked.weights,
                                 unpacked.shifts,
                                 unpacked.addends,
                                 y0.const_data_ptr<float>(),
                                 routing.const_data_ptr<float>(),
                                 batch,
                                 routing.size(0),
                                 output.mutable_data_ptr<float>(),
                                 record ? relu_bits.mutable_data_ptr<uint8_t>() : nullptr,
                                 record ? normalized.mutable_data_ptr<float>() : nullptr,
                                 record ? scales.mutable_data_ptr<float>() : nullptr};
  if (walk.batch > 0 && walk.routings > 0) unpacked.kernels.forward_batch(walk, Threads().team());
  return {output, relu_bits, normalized, scales};
}

}  // namespace
}  // namespace pathnet::cpu

STABLE_TORCH_LIBRARY(pathnet, m) {
  m.def(
      "cpu_pack(Tensor blocks, Tensor units, Tensor weights, Tensor scales, Tensor shifts, Tensor addends, int walk, "
      "bool bf16) -> Tensor");
  m.def(
      "cpu_backward_running(Tensor grad, Tensor exponent, Tensor routing, Tensor plan, Tensor relu_bits, "
      "bool gradients) -> (Tensor, Tensor, Tensor)");
  m.def(
      "cpu_sums_by_length_running(Tensor grad, Tensor exponent, Tensor routing, Tensor plan, Tensor relu_bits, "
      "bool gradients) -> (Tensor, Tensor, Tensor)");
  m.def("cpu_forward_running(Tensor y0, Tensor routing, Tensor plan, bool record) -> (Tensor, Tensor)");
  m.def(
      "cpu_backward_batch(Tensor grad, Tensor exponent, Tensor routing, Tensor plan, Tensor relu_bits, "
      "Tensor normalized, Tensor scales, bool gradients) -> (Tensor, Tensor, Tensor)");
  m.def(
      "cpu_sums_by_length_batch(Tensor grad, Tensor exponent, Tensor routing, Tensor plan, Tensor relu_bits, "
      "Tensor normalized, Tensor scales, bool gradients) -> (Tensor, Tensor, Tensor)");
  m.def("cpu_forward_batch(Tensor y0, Tensor routing, Tensor plan, bool record) -> (Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(pathnet, CPU, m) {
  m.impl("cpu_pack", TORCH_BOX(&pathnet::cpu::pack));
  m.impl("cpu_backward_running", TORCH_BOX(&pathnet::cpu::backward_running<false>));
  m.impl("cpu_sums_by_length_running", TORCH_BOX(&pathnet::cpu::backward_running<true>));
  m.impl("cpu_forward_running", TORCH_BOX(&pathnet::cpu::forward_running));
  m.impl("cpu_backward_batch", TORCH_BOX(&pathnet::cpu::backward_batch<false>));
  m.impl("cpu_sums_by_length_batch", TORCH_BOX(&pathnet::cpu::backward_batch<true>));
  m.impl("cpu_forward_batch", TORCH_BOX(&pathnet::cpu::forward_batch));
}
