// The cpu engine's ops for training: one residual block's forward pass, and the gradients of its input and
// parameters.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#include "../plan_checks.h"
#include "kernels.h"
#include "threads.h"

namespace pathnet::cpu {
namespace {

using Tensors = std::vector<Tensor>;

// What both ops take of a block.
struct BlockArguments {
  const Tensors &weights, &norms;
  const std::vector<int64_t>& strides;
  const std::vector<double>&epsilons, &coefficients;
  int64_t pad_before;

  int64_t units() const { return int64_t(epsilons.size()); }
};

// A block's tables, and the pass's view of it.
struct CheckedBlock {
  std::vector<Unit> units;
  Block row;
  TrainingBlock block;
};

// Whether memory is that of a dense [B, H, W, C]; where a size is 1 its stride does not matter.
void check_channels_last(const char* name, const Tensor& tensor, ScalarType dtype) {
  check_type(name, tensor, dtype);
  STD_TORCH_CHECK(tensor.dim() == 4, name, ": expected shape [B, C, H, W], got ", shape_of(tensor));
  int64_t stride = 1;
  for (int64_t d : {1, 3, 2, 0}) {
    STD_TORCH_CHECK(tensor.size(d) == 1 || tensor.stride(d) == stride, name,
                    ": expected a dense tensor in channels_last, got other strides");
    stride *= tensor.size(d);
  }
}

int64_t side_out(int64_t side, int64_t stride) { return (side + stride - 1) / stride; }

const float* norm_row(const Tensor& row, int64_t channels) { return checked_row("norms", row, channels); }

// Checks the block against x [B, C, H, W], and fills in its tables.
void check_block(const BlockArguments& arguments, const Tensor& x, CheckedBlock& checked) {
  const ScalarType dtype = x.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16, "x: expected Float or BFloat16, got ",
                  torch::headeronly::toString(dtype));
  check_channels_last("x", x, dtype);
  STD_TORCH_CHECK(x.numel() > 0, "x: expected a tensor that is not empty, got shape ", shape_of(x));
  const int64_t count = arguments.units(), weights = int64_t(arguments.weights.size());
  STD_TORCH_CHECK(count >= 1, "epsilons: expected one per unit, got none");
  STD_TORCH_CHECK(weights == count || weights == count + 1, "weights: expected ", count, " or, with a projection, ",
                  count + 1, ", got ", weights);
  STD_TORCH_CHECK(int64_t(arguments.strides.size()) == weights, "strides: expected ", weights, ", got ",
                  arguments.strides.size());
  const int64_t rows = int64_t(arguments.norms.size());
  STD_TORCH_CHECK(rows == 2 * count || rows == 4 * count, "norms: expected ", 2 * count,
                  " or, with running statistics, ", 4 * count, ", got ", rows);
  STD_TORCH_CHECK(arguments.coefficients.size() == 2, "coefficients: expected 2, got ",
                  arguments.coefficients.size());
  const float a = float(arguments.coefficients[0]), c = float(arguments.coefficients[1]);
  STD_TORCH_CHECK(std::isfinite(a) && std::isfinite(c) && c != 0.0f,
                  "coefficients: expected finite numbers, the second not 0, got ", a, " and ", c);
  TrainingBlock& block = checked.block;
  Unit unit = {};
  unit.out_channels = x.size(1);
  unit.out_height = x.size(2);
  unit.out_width = x.size(3);
  int64_t stride = 1;
  for (int64_t u = 0; u < weights; ++u) {
    const Tensor& weight = arguments.weights[u];
    const bool projection = u == count;
    check_dtype("weights", weight, ScalarType::Float);
    check_shape("weights", weight, {-1, projection ? x.size(1) : unit.out_channels, -1, -1});
    const int64_t kernel = weight.size(2), step = arguments.strides[u];
    STD_TORCH_CHECK(weight.size(3) == kernel && kernel % 2 == 1 && weight.size(0) > 0,
                    "weights: expected square kernels of an odd side, got shape ", shape_of(weight));
    STD_TORCH_CHECK(step >= 1 && step <= kLargestSize, "strides: expected 1 to ", kLargestSize, ", got ", step);
    STD_TORCH_CHECK(!projection || (kernel == 1 && step == stride && weight.size(0) == unit.out_channels),
                    "weights: expected a projection to what the units give, with their stride, got shape ",
                    shape_of(weight), " and stride ", step);
    Unit next = {};
    next.in_channels = projection ? x.size(1) : unit.out_channels;
    next.in_height = projection ? x.size(2) : unit.out_height;
    next.in_width = projection ? x.size(3) : unit.out_width;
    next.out_channels = weight.size(0);
    next.out_height = side_out(next.in_height, step);
    next.out_width = side_out(next.in_width, step);
    next.kernel = kernel;
    next.stride = step;
    next.padding = kernel / 2;
    next.scale_offset = projection ? -1 : 0;
    next.bits_offset = projection ? -1 : 0;
    for (int64_t size : {next.in_channels, next.in_height, next.in_width, next.out_channels, kernel}) {
      STD_TORCH_CHECK(size <= kLargestSize, "x: expected sizes up to ", kLargestSize, ", got ", size);
    }
    checked.units.push_back(next);
    block.weights.push_back(weight.const_data_ptr<float>());
    if (projection) continue;
    stride = std::min(stride * step, kLargestSize);
    const Tensor* norm = arguments.norms.data() + u * rows / count;
    const bool running = rows == 4 * count;
    block.norms.push_back({norm_row(norm[0], next.in_channels), norm_row(norm[1], next.in_channels),
                           running ? norm_row(norm[2], next.in_channels) : nullptr,
                           running ? norm_row(norm[3], next.in_channels) : nullptr, arguments.epsilons[u]});
    block.widest = std::max(block.widest, next.in_channels);
    unit = next;
  }
  const bool projects = weights > count, same = x.size(1) == unit.out_channels && x.size(2) == unit.out_height &&
                                                x.size(3) == unit.out_width && stride == 1;
  const int64_t added = unit.out_channels - x.size(1), before = arguments.pad_before;
  const bool pads = !projects && !same && a != 0.0f;
  STD_TORCH_CHECK(!pads || (before >= 0 && before <= added), "pad_before: expected 0 to ", added, ", got ", before);
  checked.row = {0,
                 count,
                 projects ? kProjection
                 : pads   ? kPad
                          : kIdentity,
                 projects ? count : -1,
                 x.size(1),
                 x.size(2),
                 x.size(3),
                 unit.out_channels,
                 unit.out_height,
                 unit.out_width,
                 pads ? before : 0};
  block.plan = {&checked.row, 1, checked.units.data(), weights, nullptr, nullptr, nullptr, 0};
  block.a = a;
  block.c = c;
  block.batch = x.size(0);
  block.bf16 = dtype == ScalarType::BFloat16;
}

Tensor new_channels_last(const Tensor& like, int64_t batch, int64_t channels, int64_t height, int64_t width) {
  const Tensor dense = torch::stable::new_empty(like, {batch, height, width, channels});
  return torch::stable::transpose(torch::stable::transpose(dense, 2, 3), 1, 2);
}

int64_t inner_size(const TrainingBlock& block) { return block.inner_start(block.units()); }

std::tuple<Tensor, Tensor, Tensor> fused_residual(const Tensor& x, const Tensors& weights, const Tensors& norms,
                                                  const std::vector<int64_t>& strides,
                                                  const std::vector<double>& epsilons,
                                                  const std::vector<double>& coefficients, int64_t pad_before) {
  CheckedBlock checked = {};
  check_block({weights, norms, strides, epsilons, coefficients, pad_before}, x, checked);
  const TrainingBlock& block = checked.block;
  const Block& row = checked.row;
  Tensor output = new_channels_last(x, block.batch, row.out_channels, row.out_height, row.out_width);
  Tensor inner = torch::stable::new_empty(x, {inner_size(block)});
  Tensor statistics = torch::stable::new_zeros(x, {block.units(), 2, block.widest}, ScalarType::Float);
  const TrainingForward job = {block, x.const_data_ptr(), output.mutable_data_ptr(), inner.mutable_data_ptr(),
                               statistics.mutable_data_ptr<float>()};
  kernels_of(selected_isa(), block.bf16).train_forward(job, Threads().team());
  return {output, inner, statistics};
}

Tensors fused_residual_backward(const Tensor& grad, const Tensor& x, const Tensor& inner, const Tensor& statistics,
                                const Tensors& weights, const Tensors& norms, const std::vector<int64_t>& strides,
                                const std::vector<double>& epsilons, const std::vector<double>& coefficients,
                                int64_t pad_before) {
  CheckedBlock checked = {};
  check_block({weights, norms, strides, epsilons, coefficients, pad_before}, x, checked);
  const TrainingBlock& block = checked.block;
  const Block& row = checked.row;
  check_channels_last("grad", grad, x.scalar_type());
  check_shape("grad", grad, {block.batch, row.out_channels, row.out_height, row.out_width});
  check_dtype("inner", inner, x.scalar_type());
  check_shape("inner", inner, {inner_size(block)});
  check_dtype("statistics", statistics, ScalarType::Float);
  check_shape("statistics", statistics, {block.units(), 2, block.widest});
  TrainingBackward job = {block,
                          grad.const_data_ptr(),
                          x.const_data_ptr(),
                          inner.const_data_ptr(),
                          statistics.const_data_ptr<float>(),
                          nullptr,
                          {},
                          {},
                          {}};
  Tensors grads = {new_channels_last(x, block.batch, row.in_channels, row.in_height, row.in_width)};
  job.x_grad = grads[0].mutable_data_ptr();
  for (const Tensor& weight : weights) {
    grads.push_back(
        torch::stable::new_empty(weight, {weight.size(0), weight.size(1), weight.size(2), weight.size(3)}));
    job.weight_grads.push_back(grads.back().mutable_data_ptr<float>());
  }
  for (int64_t u = 0; u < block.units(); ++u) {
    for (std::vector<float*>* rows : {&job.gain_grads, &job.bias_grads}) {
      grads.push_back(torch::stable::new_empty(norms[0], {checked.units[u].in_channels}));
      rows->push_back(grads.back().mutable_data_ptr<float>());
    }
  }
  kernels_of(selected_isa(), block.bf16).train_backward(job, Threads().team());
  return grads;
}

}  // namespace
}  // namespace pathnet::cpu

STABLE_TORCH_LIBRARY_FRAGMENT(pathnet, m) {
  m.def(
      "cpu_fused_residual(Tensor x, Tensor[] weights, Tensor[] norms, int[] strides, float[] epsilons, "
      "float[] coefficients, int pad_before) -> (Tensor, Tensor, Tensor)");
  m.def(
      "cpu_fused_residual_backward(Tensor grad, Tensor x, Tensor inner, Tensor statistics, Tensor[] weights, "
      "Tensor[] norms, int[] strides, float[] epsilons, float[] coefficients, int pad_before) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(pathnet, CPU, m) {
  m.impl("cpu_fused_residual", TORCH_BOX(&pathnet::cpu::fused_residual));
  m.impl("cpu_fused_residual_backward", TORCH_BOX(&pathnet::cpu::fused_residual_backward));
}
