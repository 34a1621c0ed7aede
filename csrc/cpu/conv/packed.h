// The place of each convolution's weights in the bytes that `pack` writes.
#pragma once

#include <vector>

#include "convolver.h"

namespace pathnet::cpu {
namespace PATHNET_ISA_NAMESPACE {
namespace {

template <class Convolver>
class Packed {
 public:
  using Element = typename Convolver::Element;

  Packed(const Network& network, const uint8_t* bytes) {
    const Element* weights = reinterpret_cast<const Element*>(bytes);
    for (const Convolution& convolution : network.convolutions) {
      weights_.push_back(weights);
      weights += Convolver::packed_size(convolution);
    }
  }

  const Element* operator[](int64_t unit) const { return weights_[unit]; }

 private:
  std::vector<const Element*> weights_;
};

}  // namespace
}  // namespace PATHNET_ISA_NAMESPACE
}  // namespace pathnet::cpu
