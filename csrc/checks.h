// Checks of an op's arguments. Every message names the argument: "name: expected X, got Y".
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <string>
#include <vector>

namespace pathnet {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string shape_of(const Tensor& tensor) {
  std::string text = "[";
  for (int64_t d = 0; d < tensor.dim(); ++d) text += (d ? ", " : "") + std::to_string(tensor.size(d));
  return text + "]";
}

inline void check_type(const char* name, const Tensor& tensor, ScalarType dtype) {
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, name, ": expected ", torch::headeronly::toString(dtype), ", got ",
                  torch::headeronly::toString(tensor.scalar_type()));
}

inline void check_dtype(const char* name, const Tensor& tensor, ScalarType dtype) {
  check_type(name, tensor, dtype);
  STD_TORCH_CHECK(tensor.is_contiguous(), name, ": expected a contiguous tensor, got strides of another layout");
}

// For a tensor that kernels read in words of `bytes`, wider than its elements; a slice may begin between two words.
inline void check_alignment(const char* name, const Tensor& tensor, int64_t bytes) {
  const int64_t beyond = int64_t(reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % uintptr_t(bytes));
  STD_TORCH_CHECK(beyond == 0, name, ": expected data aligned to ", bytes, " bytes, got it ", beyond, " bytes off");
}

// A negative size stands for any size.
inline void check_shape(const char* name, const Tensor& tensor, const std::vector<int64_t>& sizes) {
  bool fits = tensor.dim() == int64_t(sizes.size());
  std::string expected = "[";
  for (size_t d = 0; d < sizes.size(); ++d) {
    fits = fits && (sizes[d] < 0 || tensor.size(d) == sizes[d]);
    expected += (d ? ", " : "") + (sizes[d] < 0 ? std::string("*") : std::to_string(sizes[d]));
  }
  STD_TORCH_CHECK(fits, name, ": expected shape ", expected, "], got ", shape_of(tensor));
}

inline const float* checked_row(const char* name, const Tensor& row, int64_t size = -1) {
  check_dtype(name, row, ScalarType::Float);
  check_shape(name, row, {size});
  return row.const_data_ptr<float>();
}

}  // namespace pathnet
