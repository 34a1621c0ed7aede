// Schemas and registration of the ops: the only file that includes torch, through its stable ABI, so that one build
// serves every torch from 2.11 on. An op checks and allocates; kernels only compute.

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <exception>
#include <mutex>
#include <stdexcept>
#include <thread>
#include <tuple>
#include <vector>

#include "checks.h"
#include "cpu/kernels.h"
#include "cuda/program.h"
#include "cuda/routed_backward.h"
#include "cuda/routed_forward.h"
#include "signals.h"

namespace pathnet {
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

// The tables of a plan, its shapes and offsets checked.
Plan checked_tables(const Tensor& blocks, const Tensor& units, const PlanSizes& sizes) {
  check_dtype("blocks", blocks, ScalarType::Long);
  check_dtype("units", units, ScalarType::Long);
  check_shape("blocks", blocks, {-1, kBlockFields});
  STD_TORCH_CHECK(blocks.size(0) >= 1, "blocks: expected at least one row, got none");
  check_shape("units", units, {-1, kUnitFields});
  const Plan plan = {reinterpret_cast<const Block*>(blocks.const_data_ptr<int64_t>()),
                     blocks.size(0),
                     reinterpret_cast<const Unit*>(units.const_data_ptr<int64_t>()),
                     units.size(0),
                     nullptr,
                     nullptr,
                     nullptr,
                     sizes.bits};
  check_plan(plan, sizes);
  return plan;
}

const float* checked_row(const char* name, const Tensor& row, int64_t size = -1) {
  check_dtype(name, row, ScalarType::Float);
  check_shape(name, row, {size});
  return row.const_data_ptr<float>();
}

// The same with what is packed: weights, and BN's factors.
Plan checked_plan(const Tensor& blocks, const Tensor& units, const Tensor& weights, const Tensor& scales) {
  const float *own_weights = checked_row("weights", weights), *own_scales = checked_row("scales", scales);
  Plan plan = checked_tables(blocks, units, {weights.numel(), scales.numel(), INT64_MAX});
  plan.weights = own_weights;
  plan.scales = own_scales;
  return plan;
}

// The threads that torch would use, on one walk, which a signal may end.
class Threads {
 public:
  cpu::Team team() {
    return {count_, [this](const std::function<void(int)>& work) { run(work); }, [this] { watch_.check(); }};
  }

 private:
  void run(const std::function<void(int)>& work) {
    running_ = count_;
    torch::stable::parallel_for(0, count_, 1, [&](int64_t begin, int64_t end) {
      keep([&] {
        for (int64_t worker = begin; worker < end; ++worker) work(int(worker));
      });
      leave(int(end - begin));
      // The caller's thread alone answers signals, also where the others have more to do.
      if (watch_.answers()) keep([&] { wait(); });
    });
    if (thrown_) std::rethrow_exception(thrown_);
  }

  // What a thread throws would reach the caller as a failure without a cause. Of several, the first is the cause.
  template <class Work>
  void keep(const Work& work) {
    try {
      work();
    } catch (...) {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (!thrown_) thrown_ = std::current_exception();
      watch_.end();
    }
  }

  void leave(int workers) {
    if ((running_ -= workers) > 0) return;
    const std::lock_guard<std::mutex> lock(mutex_);
    all_through_.notify_one();
  }

  void wait() {
    const auto through = [&] { return running_ == 0; };
    // Most often the others need no more than this, and to sleep and be woken takes as long.
    for (const auto until = std::chrono::steady_clock::now() + kSpin; std::chrono::steady_clock::now() < until;) {
      if (through()) return;
      std::this_thread::yield();
    }
    for (std::unique_lock<std::mutex> lock(mutex_); !all_through_.wait_for(lock, kSignalPeriod, through);) {
      lock.unlock();
      watch_.check();
      lock.lock();
    }
  }

  static constexpr std::chrono::microseconds kSpin{200};

  const int count_ = int(torch::stable::get_num_threads());
  Watch watch_;
  std::atomic<int> running_{0};
  std::mutex mutex_;
  std::condition_variable all_through_;
  std::exception_ptr thrown_;
};

// What stands before packed weights: which kernels they are for.
struct PackedHeader {
  int64_t isa, direction, folded, bf16;
};
constexpr int64_t kHeaderBytes = 64;
static_assert(sizeof(PackedHeader) <= kHeaderBytes, "the weights behind it are aligned");

Tensor cpu_pack(const Tensor& blocks, const Tensor& units, const Tensor& weights, const Tensor& scales, bool backward,
                bool fold_scales, bool bf16) {
  const Plan plan = checked_plan(blocks, units, weights, scales);
  if (fold_scales) check_closed(plan, false);
  const cpu::Isa isa = cpu::selected_isa();
  const cpu::Direction direction = backward ? cpu::Direction::kBackward : cpu::Direction::kForward;
  const cpu::Kernels kernels = cpu::kernels_of(isa, bf16);
  const int64_t size = kHeaderBytes + kernels.packed_size(plan, direction);
  Tensor packed = torch::stable::new_zeros(blocks, {size}, ScalarType::Byte);
  uint8_t* bytes = packed.mutable_data_ptr<uint8_t>();
  *reinterpret_cast<PackedHeader*>(bytes) = {int64_t(isa), int64_t(direction), fold_scales, bf16};
  Watch watch;
  kernels.pack(plan, direction, fold_scales, bytes + kHeaderBytes, [&] { watch.check(); });
  return packed;
}

struct Checked {
  cpu::Kernels kernels;
  const uint8_t* weights;
};

Checked checked_packed(const Tensor& packed, const Plan& plan, cpu::Direction direction, bool folded) {
  check_dtype("packed", packed, ScalarType::Byte);
  check_shape("packed", packed, {-1});
  check_alignment("packed", packed, sizeof(float));
  STD_TORCH_CHECK(packed.numel() >= kHeaderBytes, "packed: expected what cpu_pack made, got ", packed.numel(),
                  " bytes");
  PackedHeader header;
  std::memcpy(&header, packed.const_data_ptr<uint8_t>(), sizeof(header));
  const cpu::Isa isa = cpu::selected_isa();
  STD_TORCH_CHECK(header.isa == int64_t(isa), "packed: expected weights for the instruction set ", cpu::isa_name(isa),
                  ", got another's");
  STD_TORCH_CHECK(header.direction == int64_t(direction) && (header.folded != 0) == folded,
                  "packed: expected weights for this walk, got another's");
  const cpu::Kernels kernels = cpu::kernels_of(isa, header.bf16 != 0);
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

cpu::BackwardWalk backward_walk(const Plan& plan, const Checked& checked, const Tensor& grad, const Tensor& exponent,
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

std::tuple<Tensor, Tensor, Tensor> routed_backward(const Tensor& grad, const Tensor& exponent, const Tensor& routing,
                                                   const Tensor& blocks, const Tensor& units, const Tensor& packed,
                                                   const Tensor& relu_bits, bool gradients) {
  check_dtype("relu_bits", relu_bits, ScalarType::Byte);
  check_shape("relu_bits", relu_bits, {-1, -1});
  Plan plan = checked_tables(blocks, units, {INT64_MAX, INT64_MAX, relu_bits.size(1)});
  plan.relu_bits = relu_bits.const_data_ptr<uint8_t>();
  check_closed(plan, false);
  const Checked checked = checked_packed(packed, plan, cpu::Direction::kBackward, true);
  const int64_t routings = checked_routings(routing, plan);
  BackwardResult made = backward_result(plan, grad, exponent, relu_bits.size(0), routings, relu_bits, gradients);
  const cpu::BackwardWalk job = backward_walk(plan, checked, grad, exponent, routing, routings, made);
  if (made.batch > 0 && routings > 0) checked.kernels.backward(job, Threads().team());
  return {made.norms, made.grad_input, made.exponent_input};
}

std::tuple<Tensor, Tensor, Tensor> sums_by_length(const Tensor& grad, const Tensor& exponent, const Tensor& routing,
                                                  const Tensor& blocks, const Tensor& units, const Tensor& packed,
                                                  const Tensor& relu_bits, bool gradients) {
  check_dtype("relu_bits", relu_bits, ScalarType::Byte);
  check_shape("relu_bits", relu_bits, {-1, -1});
  Plan plan = checked_tables(blocks, units, {INT64_MAX, INT64_MAX, relu_bits.size(1)});
  plan.relu_bits = relu_bits.const_data_ptr<uint8_t>();
  check_closed(plan, false);
  const Checked checked = checked_packed(packed, plan, cpu::Direction::kBackward, true);
  const int64_t routings = checked_factors(routing, plan);
  BackwardResult made =
      backward_result(plan, grad, exponent, relu_bits.size(0), plan.block_count + 1, relu_bits, gradients);
  const cpu::BackwardWalk job = backward_walk(plan, checked, grad, exponent, routing, routings, made);
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
  const Checked checked = checked_packed(packed, plan, cpu::Direction::kBackward, false);
  const int64_t routings = kSums ? checked_factors(routing, plan) : checked_routings(routing, plan);
  const int64_t results = kSums ? plan.block_count + 1 : routings;
  BackwardResult made = backward_result(plan, grad, exponent, 1, results, relu_bits, gradients);
  const cpu::BatchBackwardWalk job = {plan,
                                      checked.weights,
                                      checked_row("normalized", normalized, cpu::normalized_size(plan, made.batch)),
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

std::tuple<Tensor, Tensor> routed_forward(const Tensor& y0, const Tensor& routing, const Tensor& blocks,
                                          const Tensor& units, const Tensor& scales, const Tensor& shifts,
                                          const Tensor& biases, const Tensor& packed, bool record) {
  const Plan plan = forward_plan(y0, routing, blocks, units, scales, shifts, record);
  check_closed(plan, false);
  int64_t outputs = 0;
  for (int64_t u = 0; u < plan.unit_count; ++u) outputs += plan.units[u].out_channels;
  const float* own_biases = biases.numel() == 0 ? nullptr : checked_row("biases", biases, outputs);
  const Checked checked = checked_packed(packed, plan, cpu::Direction::kForward, false);
  Tensor output = empty_output(plan, y0, routing);
  Tensor relu_bits = torch::stable::new_zeros(y0, {record ? y0.size(0) : 0, plan.bits_stride}, ScalarType::Byte);
  const cpu::ForwardWalk job = {plan,
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

std::tuple<Tensor, Tensor, Tensor, Tensor> batch_forward(const Tensor& y0, const Tensor& routing,
                                                         const Tensor& blocks, const Tensor& units,
                                                         const Tensor& scales, const Tensor& shifts,
                                                         const Tensor& epsilons, const Tensor& packed, bool record) {
  const Plan plan = forward_plan(y0, routing, blocks, units, scales, shifts, record);
  check_closed(plan, true);
  const Checked checked = checked_packed(packed, plan, cpu::Direction::kForward, false);
  const int64_t batch = y0.size(0);
  Tensor output = empty_output(plan, y0, routing);
  Tensor relu_bits = torch::stable::new_zeros(y0, {record ? batch : 0, plan.bits_stride}, ScalarType::Byte);
  Tensor normalized = torch::stable::new_empty(y0, {record ? cpu::normalized_size(plan, batch) : 0});
  Tensor batch_scales = torch::stable::new_zeros(scales, {record ? scales.numel() : 0});
  const cpu::BatchForwardWalk job = {plan,
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

// The whole-path kernels' program and packed weights; made on the host.
std::tuple<Tensor, Tensor> cuda_plan(const Tensor& blocks, const Tensor& units, const Tensor& weights,
                                     const Tensor& scales, bool backward, int64_t parts, int64_t shared_bytes) {
  STD_TORCH_CHECK(parts == 1 || parts == 2, "parts: expected 1 or 2 bf16 terms a number, got ", parts);
  STD_TORCH_CHECK(backward || parts == 2, "parts: expected 2 for the walk forward, got ", parts);
  STD_TORCH_CHECK(shared_bytes > 0 && shared_bytes <= kLargestShared, "shared_bytes: expected 1 to ", kLargestShared,
                  ", got ", shared_bytes);
  const Plan plan = checked_plan(blocks, units, weights, scales);
  std::vector<int32_t> made;
  try {
    made = cuda::make_program(plan, backward, int(parts), int(shared_bytes));
  } catch (const std::invalid_argument& refusal) {
    STD_TORCH_CHECK(false, "blocks: ", refusal.what());
  }
  Tensor numbers = torch::stable::new_empty(blocks, {int64_t(made.size())}, ScalarType::Int);
  std::copy(made.begin(), made.end(), numbers.mutable_data_ptr<int32_t>());
  const cuda::Program& program = *reinterpret_cast<const cuda::Program*>(made.data());
  Tensor packed = torch::stable::new_empty(blocks, {program.weights_bytes}, ScalarType::Byte);
  cuda::pack_program_weights(plan, program, packed.mutable_data_ptr<uint8_t>());
  return {numbers, packed};
}

const cuda::Program& checked_program(const Tensor& program) {
  check_dtype("program", program, ScalarType::Int);
  STD_TORCH_CHECK(program.is_cpu(), "program: expected a tensor on the CPU");
  STD_TORCH_CHECK(cuda::is_program(program.const_data_ptr<int32_t>(), program.numel()),
                  "program: expected what cuda_plan made, got other numbers");
  return *reinterpret_cast<const cuda::Program*>(program.const_data_ptr<int32_t>());
}

const cuda::Program& checked_program(const Tensor& program, bool backward) {
  const cuda::Program& checked = checked_program(program);
  STD_TORCH_CHECK((checked.backward != 0) == backward, "program: expected one for the walk ",
                  backward ? "back" : "forward", ", got the other");
  return checked;
}

// What both walks check: tensors of the network, and the routings.
void check_walk(const cuda::Program& program, const Tensor& program_numbers, const Tensor& device_program,
                const Tensor& weights, const Tensor& routing, const Tensor& order, const Tensor& like) {
  check_dtype("device_program", device_program, ScalarType::Int);
  check_shape("device_program", device_program, {program_numbers.numel()});
  check_dtype("weights", weights, ScalarType::Byte);
  check_shape("weights", weights, {program.weights_bytes});
  check_alignment("weights", weights, cuda::kUnitBytes);
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
  cuda::PathBackward job;
  Tensor norms, grad_input, exponent_input, counter;
};

// Whole rows of a sample's ReLU bits each, or the part of longer ones that some blocks have.
void check_bits(const Tensor& relu_bits, int64_t batch, int64_t bytes) {
  check_type("relu_bits", relu_bits, ScalarType::Byte);
  check_shape("relu_bits", relu_bits, {batch, bytes});
  check_alignment("relu_bits", relu_bits, cuda::kMostBits);
  STD_TORCH_CHECK(relu_bits.stride(1) == 1 && (batch < 2 || relu_bits.stride(0) % cuda::kMostBits == 0),
                  "relu_bits: expected contiguous rows a multiple of ", cuda::kMostBits,
                  " bytes apart, got strides of ", relu_bits.stride(0), " and ", relu_bits.stride(1));
}

BackwardTensors backward_tensors(const Tensor& grad, const Tensor& exponent, const Tensor& starts,
                                 const Tensor& routing, const Tensor& order, const Tensor& program_numbers,
                                 const Tensor& device_program, const Tensor& weights, const Tensor& relu_bits,
                                 bool wanted) {
  const cuda::Program& program = checked_program(program_numbers, true);
  const cuda::Image &in = program.blocks()[0].in, &out = program.blocks()[program.block_count - 1].out;
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
  made.job = {reinterpret_cast<const cuda::Program*>(device_program.const_data_ptr<int32_t>()),
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

std::tuple<Tensor, Tensor, Tensor> cuda_routed_backward_twin(const Tensor& grad, const Tensor& exponent,
                                                             const Tensor& starts, const Tensor& routing,
                                                             const Tensor& order, const Tensor& program,
                                                             const Tensor& device_program, const Tensor& weights,
                                                             const Tensor& relu_bits, bool gradients) {
  BackwardTensors made = backward_tensors(grad, exponent, starts, routing, order, program, device_program, weights,
                                          relu_bits, gradients);
  if (made.job.paths > 0 && made.job.batch > 0) {
    const std::string finding = cuda::run_routed_backward(made.job);
    STD_TORCH_CHECK(finding.empty(), "cuda_routed_backward: ", finding);
  }
  return {made.norms, made.grad_input, made.exponent_input};
}

struct ForwardTensors {
  cuda::PathForward job;
  Tensor output, relu_bits, counter, scratch;
};

// `thread_blocks` of the scratch; the kernel's launcher and the twin know how many they run.
template <class Blocks>
ForwardTensors forward_tensors(const Tensor& y0, const Tensor& routing, const Tensor& order,
                               const Tensor& program_numbers, const Tensor& device_program, const Tensor& weights,
                               const Tensor& affine, bool record, const Blocks& thread_blocks) {
  const cuda::Program& program = checked_program(program_numbers, false);
  const cuda::Image &in = program.blocks()[0].in, &out = program.blocks()[program.block_count - 1].out;
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
  made.job = {reinterpret_cast<const cuda::Program*>(device_program.const_data_ptr<int32_t>()),
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

std::tuple<Tensor, Tensor> cuda_routed_forward_twin(const Tensor& y0, const Tensor& routing, const Tensor& order,
                                                    const Tensor& program, const Tensor& device_program,
                                                    const Tensor& weights, const Tensor& affine, bool record) {
  // The twin runs as the second thread block.
  const auto two = [](const cuda::Program&, int) { return int64_t(2); };
  ForwardTensors made = forward_tensors(y0, routing, order, program, device_program, weights, affine, record, two);
  if (made.job.paths > 0 && made.job.batch > 0) {
    const std::string finding = cuda::run_routed_forward(made.job);
    STD_TORCH_CHECK(finding.empty(), "cuda_routed_forward: ", finding);
  }
  return {made.output, made.relu_bits};
}

// What shared memory a program asks for, and how it makes do with it.
std::tuple<int64_t, int64_t, int64_t, int64_t> cuda_form(const Tensor& program_numbers) {
  const cuda::Program& program = checked_program(program_numbers);
  return {program.samples, program.most_windows(), program.most_slices(), program.shared_bytes};
}

// Bytes of a sample's row of ReLU bits.
int64_t cuda_bits_bytes(const Tensor& program_numbers) { return checked_program(program_numbers, true).bits_bytes; }

// The bits that a whole-path kernel recorded of one unit's ReLU, a byte each.
Tensor cuda_unpack_bits(const Tensor& relu_bits, const Tensor& program_numbers, int64_t block, int64_t unit) {
  const cuda::Program& program = checked_program(program_numbers, true);
  check_dtype("relu_bits", relu_bits, ScalarType::Byte);
  check_shape("relu_bits", relu_bits, {-1, program.bits_bytes});
  STD_TORCH_CHECK(relu_bits.is_cpu(), "relu_bits: expected a tensor on the CPU");
  STD_TORCH_CHECK(block >= 0 && block < program.block_count, "block: expected 0 to ", program.block_count - 1,
                  ", got ", block);
  STD_TORCH_CHECK(unit == 0 || unit == 1, "unit: expected 0 or 1, got ", unit);
  const cuda::Conv& conv = program.blocks()[block].units[unit];
  const cuda::Image& image = conv.target;
  Tensor bits = torch::stable::new_empty(relu_bits, {relu_bits.size(0), image.channels, image.height, image.width});
  uint8_t* out = bits.mutable_data_ptr<uint8_t>();
  for (int64_t sample = 0; sample < relu_bits.size(0); ++sample) {
    const uint8_t* own = relu_bits.const_data_ptr<uint8_t>() + sample * program.bits_bytes + conv.bits_byte;
    for (int c = 0; c < image.channels; ++c) {
      for (int y = 0; y < image.height; ++y) {
        for (int x = 0; x < image.width; ++x) {
          const int index = cuda::bit_index(image, c, y, x);
          *out++ = own[index / 8] >> index % 8 & 1;
        }
      }
    }
  }
  return bits;
}

#ifdef PATHNET_CUDA
// Memory for the images of so many thread blocks; empty where they lie in shared memory.
Tensor images_scratch(const Tensor& like, const cuda::Program& program, int64_t blocks) {
  return torch::stable::new_empty(like, {blocks, program.images_scratch()}, ScalarType::Byte);
}

std::tuple<Tensor, Tensor, Tensor> cuda_routed_backward(const Tensor& grad, const Tensor& exponent,
                                                        const Tensor& starts, const Tensor& routing,
                                                        const Tensor& order, const Tensor& program,
                                                        const Tensor& device_program, const Tensor& weights,
                                                        const Tensor& relu_bits, bool gradients) {
  const torch::stable::accelerator::DeviceGuard guard(grad.get_device_index());
  BackwardTensors made = backward_tensors(grad, exponent, starts, routing, order, program, device_program, weights,
                                          relu_bits, gradients);
  const cuda::Program& checked = checked_program(program, true);
  const int items = made.job.paths * cuda::ceil_div(made.job.batch, checked.samples);
  int blocks = 0;
  const char* error = cuda::routed_backward_blocks(checked, items, blocks);
  STD_TORCH_CHECK(error == nullptr, "cuda_routed_backward: ", error);
  Tensor images = images_scratch(grad, checked, blocks);
  made.job.images = images.mutable_data_ptr<uint8_t>();
  error = cuda::launch_routed_backward(made.job, checked, blocks, current_stream(grad));
  STD_TORCH_CHECK(error == nullptr, "cuda_routed_backward: the launch failed: ", error);
  return {made.norms, made.grad_input, made.exponent_input};
}

std::tuple<Tensor, Tensor> cuda_routed_forward(const Tensor& y0, const Tensor& routing, const Tensor& order,
                                               const Tensor& program, const Tensor& device_program,
                                               const Tensor& weights, const Tensor& affine, bool record) {
  const torch::stable::accelerator::DeviceGuard guard(y0.get_device_index());
  const auto resident = [](const cuda::Program& program, int items) {
    int blocks = 0;
    const char* error = cuda::routed_forward_blocks(program, items, blocks);
    STD_TORCH_CHECK(error == nullptr, "cuda_routed_forward: ", error);
    return int64_t(blocks);
  };
  ForwardTensors made =
      forward_tensors(y0, routing, order, program, device_program, weights, affine, record, resident);
  const cuda::Program& checked = checked_program(program, false);
  Tensor images = images_scratch(y0, checked, made.scratch.size(0));
  made.job.images = images.mutable_data_ptr<uint8_t>();
  const char* error = cuda::launch_routed_forward(made.job, checked, int(made.scratch.size(0)), current_stream(y0));
  STD_TORCH_CHECK(error == nullptr, "cuda_routed_forward: the launch failed: ", error);
  return {made.output, made.relu_bits};
}
#endif

}  // namespace
}  // namespace pathnet

STABLE_TORCH_LIBRARY(pathnet, m) {
  m.def(
      "cpu_pack(Tensor blocks, Tensor units, Tensor weights, Tensor scales, bool backward, bool fold_scales, "
      "bool bf16) -> Tensor");
  m.def(
      "routed_backward(Tensor grad, Tensor exponent, Tensor routing, Tensor blocks, Tensor units, Tensor packed, "
      "Tensor relu_bits, bool gradients) -> (Tensor, Tensor, Tensor)");
  m.def(
      "sums_by_length(Tensor grad, Tensor exponent, Tensor routing, Tensor blocks, Tensor units, Tensor packed, "
      "Tensor relu_bits, bool gradients) -> (Tensor, Tensor, Tensor)");
  m.def(
      "routed_forward(Tensor y0, Tensor routing, Tensor blocks, Tensor units, Tensor scales, Tensor shifts, "
      "Tensor biases, Tensor packed, bool record) -> (Tensor, Tensor)");
  m.def(
      "batch_backward(Tensor grad, Tensor exponent, Tensor routing, Tensor blocks, Tensor units, Tensor packed, "
      "Tensor relu_bits, Tensor normalized, Tensor scales, bool gradients) -> (Tensor, Tensor, Tensor)");
  m.def(
      "batch_sums_by_length(Tensor grad, Tensor exponent, Tensor routing, Tensor blocks, Tensor units, "
      "Tensor packed, Tensor relu_bits, Tensor normalized, Tensor scales, bool gradients) -> (Tensor, Tensor, "
      "Tensor)");
  m.def(
      "batch_forward(Tensor y0, Tensor routing, Tensor blocks, Tensor units, Tensor scales, Tensor shifts, "
      "Tensor epsilons, Tensor packed, bool record) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "cuda_plan(Tensor blocks, Tensor units, Tensor weights, Tensor scales, bool backward, int parts, "
      "int shared_bytes) -> (Tensor, Tensor)");
  m.def("cuda_form(Tensor program) -> (int, int, int, int)");
  m.def("cuda_bits_bytes(Tensor program) -> int");
  m.def("cuda_unpack_bits(Tensor relu_bits, Tensor program, int block, int unit) -> Tensor");
  m.def(
      "cuda_routed_backward(Tensor grad, Tensor exponent, Tensor starts, Tensor routing, Tensor order, Tensor "
      "program, "
      "Tensor device_program, Tensor weights, Tensor relu_bits, bool gradients) -> (Tensor, Tensor, Tensor)");
  m.def(
      "cuda_routed_forward(Tensor y0, Tensor routing, Tensor order, Tensor program, Tensor device_program, "
      "Tensor weights, Tensor affine, bool record) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(pathnet, CPU, m) {
  m.impl("cpu_pack", TORCH_BOX(&pathnet::cpu_pack));
  m.impl("routed_backward", TORCH_BOX(&pathnet::routed_backward));
  m.impl("sums_by_length", TORCH_BOX(&pathnet::sums_by_length));
  m.impl("routed_forward", TORCH_BOX(&pathnet::routed_forward));
  m.impl("batch_backward", TORCH_BOX(&pathnet::batch_walk<false>));
  m.impl("batch_sums_by_length", TORCH_BOX(&pathnet::batch_walk<true>));
  m.impl("batch_forward", TORCH_BOX(&pathnet::batch_forward));
  m.impl("cuda_plan", TORCH_BOX(&pathnet::cuda_plan));
  m.impl("cuda_form", TORCH_BOX(&pathnet::cuda_form));
  m.impl("cuda_bits_bytes", TORCH_BOX(&pathnet::cuda_bits_bytes));
  m.impl("cuda_unpack_bits", TORCH_BOX(&pathnet::cuda_unpack_bits));
  m.impl("cuda_routed_backward", TORCH_BOX(&pathnet::cuda_routed_backward_twin));
  m.impl("cuda_routed_forward", TORCH_BOX(&pathnet::cuda_routed_forward_twin));
}

#ifdef PATHNET_CUDA
STABLE_TORCH_LIBRARY_IMPL(pathnet, CUDA, m) {
  m.impl("cuda_routed_backward", TORCH_BOX(&pathnet::cuda_routed_backward));
  m.impl("cuda_routed_forward", TORCH_BOX(&pathnet::cuda_routed_forward));
}
#endif
