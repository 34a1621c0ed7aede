// The module pathnet._build: facts about the build, for `pathnet doctor` and tests.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "cpu/isa/isa.h"

namespace {

std::vector<std::string> supported() {
  std::vector<std::string> names;
  for (pathnet::cpu::Isa isa : pathnet::cpu::supported_isas()) names.push_back(pathnet::cpu::isa_name(isa));
  return names;
}

}  // namespace

PYBIND11_MODULE(_build, module) {
  module.doc() = "Facts about the native build.";
  module.attr("compiler") = PATHNET_COMPILER;
  module.attr("torch_version") = PATHNET_TORCH_VERSION;
  module.attr("torch_target") = PATHNET_TORCH_TARGET;
  module.attr("cuda_compiler") = PATHNET_CUDA_COMPILER;
  module.attr("cuda_architectures") = PATHNET_CUDA_ARCHITECTURES;
  module.attr("without_cuda") = PATHNET_WITHOUT_CUDA;
  module.def("instruction_sets", &supported, "The compiled instruction sets that this processor has, fastest first.");
  module.def(
      "selected_instruction_set", [] { return std::string(pathnet::cpu::isa_name(pathnet::cpu::selected_isa())); },
      "The instruction set that the kernels use; PATHNET_ISA in the environment names another.");
}
