// The stream of weights from L2 to shared memory.
//
// Weights come in chunks (sixteen source channels, all taps: 4.6, 9.2, 18.4 KB in bf16 in stages 1, 2, 3) into a ring
// of two or three slots, asynchronously, prefetched one or two chunks ahead, across convolution and block boundaries.
// The one barrier before each chunk serves the ring and the images alike. Where slots for whole chunks do not fit, a
// chunk comes in slices: the columns of the kernel, whose products are the same, or its taps, each of which loads the
// source again. By taps, with two terms per number, shared memory takes 40 and 36 clocks for 24 and 12 products in
// stages 2 and 3, and the tensor cores of an A100 48 and 24 clocks at their peak, 77 and 39 at 62 % of it.
#pragma once

#include "execution.h"

namespace pathnet::cuda {

// The convolutions that a routing needs, in the order in which a pass through the network runs them.
template <bool kBackward>
class Route {
 public:
  PATHNET_DEVICE Route(const Program& program, const float* routing)
      : program_(program), routing_(routing), block_(kBackward ? program.block_count - 1 : 0), turn_(-1) {
    advance();
  }

  PATHNET_DEVICE bool ended() const { return block_ < 0 || block_ >= program_.block_count; }
  PATHNET_DEVICE const Conv& conv() const { return conv_of(program_.blocks()[block_], turn_); }

  PATHNET_DEVICE void advance() {
    for (++turn_; !ended(); ++turn_) {
      if (turn_ == 3) {
        block_ += kBackward ? -1 : 1;
        turn_ = -1;
        continue;
      }
      if (needed()) return;
    }
  }

 private:
  // Backward: the second convolution, the first, the projection. Forward: the first, the projection, the second.
  static PATHNET_DEVICE const Conv& conv_of(const BlockForm& form, int turn) {
    if (kBackward) return turn == 2 ? form.projection : form.units[1 - turn];
    return turn == 1 ? form.projection : form.units[turn / 2];
  }

  PATHNET_DEVICE bool needed() const {
    const bool projection = turn_ == (kBackward ? 2 : 1);
    if (!projection) return routing_[2 * block_ + 1] != 0.0f;
    return program_.blocks()[block_].skip == kProjection && routing_[2 * block_] != 0.0f;
  }

  const Program& program_;
  const float* routing_;
  int block_, turn_;
};

// Slices of weights in the order of their use, copied to a ring of slots ahead of it.
template <class Exec, bool kBackward>
class WeightStream {
 public:
  PATHNET_DEVICE WeightStream(Exec& exec, const Program& program, const uint8_t* weights, const float* routing)
      : exec_(exec),
        weights_(weights),
        route_(program, routing),
        slots_(program.slots),
        slot_bytes_(program.slot_bytes) {
    first_slot_ = filled_ = used_ = program.slot_byte(0);
    last_slot_ = program.slot_byte(slots_ - 1);
    enter();
    for (int slot = 0; slot + 1 < slots_; ++slot) copy_next();
  }

  // Returns the shared byte of the next slice. Everything that the thread block stored before is visible after it.
  PATHNET_DEVICE int next() {
    if (slots_ == 3) {
      exec_.template wait_copies<1>();
    } else {
      exec_.template wait_copies<0>();
    }
    exec_.barrier();
    if (slots_ == 2) copy_next();
    const int slot = used_;
    used_ = following(used_);
    return slot;
  }

  // To be called after a slice's product. With three slots the next copy starts here, where no warp waits for it.
  PATHNET_DEVICE void ahead() {
    if (slots_ == 3) copy_next();
  }

 private:
  PATHNET_DEVICE int following(int slot) const { return slot == last_slot_ ? first_slot_ : slot + slot_bytes_; }

  // Loads what the copies of the route's current convolution need from the program, once.
  PATHNET_DEVICE void enter() {
    if (route_.ended()) return;
    const Conv& conv = route_.conv();
    from_ = conv.weights_byte;
    bytes_ = conv.slice_bytes();
    slices_ = slices_left_ = conv.copies();
    reads_left_ = conv.reads;
  }

  PATHNET_DEVICE void copy_next() {
    if (!route_.ended()) {
      exec_.copy_async(filled_, weights_ + from_, bytes_);
      from_ += bytes_;
      if (--slices_left_ == 0) {
        slices_left_ = slices_;
        from_ -= slices_ * bytes_;
      }
      if (--reads_left_ == 0) {
        route_.advance();
        enter();
      }
    }
    filled_ = following(filled_);
    exec_.commit_copies();
  }

  Exec& exec_;
  const uint8_t* weights_;
  Route<kBackward> route_;
  const int slots_, slot_bytes_;
  int first_slot_, last_slot_, filled_, used_;                                // shared bytes; next to fill, to use
  int from_ = 0, bytes_ = 0, slices_ = 0, slices_left_ = 0, reads_left_ = 0;  // of the route's current convolution
};

}  // namespace pathnet::cuda
