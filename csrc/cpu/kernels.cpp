// Compiled once for each instruction set, in the namespace PATHNET_ISA_NAMESPACE; `kernels_of` chooses among them.

#include "kernels.h"

#include "training/backward.h"
#include "training/forward.h"
#include "walk/backward_batch.h"
#include "walk/backward_running.h"
#include "walk/forward_batch.h"
#include "walk/forward_running.h"
#include "walk/sums_by_length_batch.h"
#include "walk/sums_by_length_running.h"

namespace pathnet::cpu {
namespace PATHNET_ISA_NAMESPACE {
namespace {

template <class Convolver>
int64_t size_of(const Network& network) {
  int64_t elements = 0;
  for (const Convolution& convolution : network.convolutions) elements += Convolver::packed_size(convolution);
  return elements * int64_t(sizeof(typename Convolver::Element));
}

template <class Convolver>
void pack_into(const Network& network, uint8_t* bytes, const std::function<void()>& check) {
  auto* packed = reinterpret_cast<typename Convolver::Element*>(bytes);
  for (const Convolution& convolution : network.convolutions) {
    check();
    Convolver::pack(convolution, packed);
    packed += Convolver::packed_size(convolution);
  }
}

template <class Convolver>
int64_t packed_size(const Plan& plan, Direction direction) {
  const Network network = make_network(plan, direction == Direction::kBackward, false);
  return direction == Direction::kBackward ? size_of<Convolver>(network) : size_of<ForwardConvolver>(network);
}

template <class Convolver>
void pack(const Plan& plan, Direction direction, bool fold_scales, uint8_t* bytes,
          const std::function<void()>& check) {
  const Network network = make_network(plan, direction == Direction::kBackward, fold_scales);
  if (direction == Direction::kBackward) {
    pack_into<Convolver>(network, bytes, check);
  } else {
    pack_into<ForwardConvolver>(network, bytes, check);
  }
}

template <class Convolver, class Training, class Stored>
Kernels kernels_with() {
  return {packed_size<Convolver>,
          pack<Convolver>,
          walk_backward_running<Convolver>,
          walk_sums_by_length_running<Convolver>,
          walk_forward_running<ForwardConvolver>,
          walk_backward_batch<Convolver>,
          walk_sums_by_length_batch<Convolver>,
          walk_forward_batch<ForwardConvolver>,
          train_forward<Training, Stored>,
          train_backward<Training, Stored>};
}

}  // namespace

Kernels kernels(bool bf16) {
  if (bf16) return kernels_with<Bfloat16, TrainingBfloat16, Bf16>();
  return kernels_with<Float32, TrainingFloat32, float>();
}

}  // namespace PATHNET_ISA_NAMESPACE
}  // namespace pathnet::cpu
