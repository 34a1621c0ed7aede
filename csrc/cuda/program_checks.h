// Checks of the ops' arguments against a program of cuda_pack.
#pragma once

#include <cstring>
#include <vector>

#include "../checks.h"
#include "program.h"
#include "routed_backward.h"

namespace pathnet::cuda {

// Memory transactions of a GPU; what follows the program begins at a multiple.
constexpr int64_t kLineBytes = 128;

// Where the weights begin in the packed bytes, after a copy of the program.
inline int64_t weights_byte(const Program& program) {
  const int64_t bytes = program_size(program.block_count) * int64_t(sizeof(int32_t));
  return (bytes + kLineBytes - 1) / kLineBytes * kLineBytes;
}

inline const Program& checked_program(const Tensor& program) {
  check_dtype("program", program, ScalarType::Int);
  STD_TORCH_CHECK(program.is_cpu(), "program: expected a tensor on the CPU");
  STD_TORCH_CHECK(is_program(program.const_data_ptr<int32_t>(), program.numel()),
                  "program: expected what cuda_pack made, got other numbers");
  return *reinterpret_cast<const Program*>(program.const_data_ptr<int32_t>());
}

inline const Program& checked_program(const Tensor& program, bool backward) {
  const Program& checked = checked_program(program);
  STD_TORCH_CHECK((checked.backward != 0) == backward, "program: expected one for the ",
                  backward ? "backward" : "forward", " pass, got the other");
  return checked;
}

inline void check_device(const char* name, const Tensor& tensor, const Tensor& like) {
  STD_TORCH_CHECK(tensor.device() == like.device(), name,
                  ": expected all tensors but program on one device, got another");
}

// The program and weights as the kernels read them. Only the twin compares the copy of the program with the
// original: reading it back from a GPU would synchronise.
struct PackedProgram {
  const Program* program;
  const uint8_t* weights;
};

inline PackedProgram checked_packed(const Tensor& packed, const Program& program, const Tensor& like) {
  check_dtype("packed", packed, ScalarType::Byte);
  check_shape("packed", packed, {weights_byte(program) + program.weights_bytes});
  check_alignment("packed", packed, kUnitBytes);
  check_device("packed", packed, like);
  const uint8_t* bytes = packed.const_data_ptr<uint8_t>();
  STD_TORCH_CHECK(!packed.is_cpu() || std::memcmp(bytes, &program, program_size(program.block_count) * 4) == 0,
                  "packed: expected a copy of program in front of the weights, got other numbers");
  return {reinterpret_cast<const Program*>(bytes), bytes + weights_byte(program)};
}

// The number of paths.
inline int64_t checked_routing(const Tensor& routing, const Program& program, int64_t batch, const Tensor& like) {
  check_dtype("routing", routing, ScalarType::Float);
  check_shape("routing", routing, {-1, program.block_count, 2});
  check_device("routing", routing, like);
  const int64_t paths = routing.size(0);
  STD_TORCH_CHECK(paths * batch <= INT32_MAX / 2, "routing: expected at most 2^30 paths times samples, got ",
                  paths * batch);
  return paths;
}

inline const int32_t* checked_numbers(const char* name, const Tensor& numbers, const std::vector<int64_t>& sizes,
                                      const Tensor& like) {
  check_dtype(name, numbers, ScalarType::Int);
  check_shape(name, numbers, sizes);
  check_device(name, numbers, like);
  return numbers.const_data_ptr<int32_t>();
}

// Rows of ReLU bits, one per sample: whole, or a block's columns of longer ones.
inline void check_bits(const Tensor& relu_bits, int64_t batch, int64_t bytes, const Tensor& like) {
  check_type("relu_bits", relu_bits, ScalarType::Byte);
  check_shape("relu_bits", relu_bits, {batch, bytes});
  check_alignment("relu_bits", relu_bits, kMaxLoadBytes);
  check_device("relu_bits", relu_bits, like);
  STD_TORCH_CHECK(relu_bits.stride(1) == 1 && (batch < 2 || relu_bits.stride(0) % kMaxLoadBytes == 0),
                  "relu_bits: expected contiguous rows a multiple of ", kMaxLoadBytes,
                  " bytes apart, got strides of ", relu_bits.stride(0), " and ", relu_bits.stride(1));
}

}  // namespace pathnet::cuda
