// The execution policy on the host: the kernels' bodies in plain loops, for machines without a GPU.
//
// It also watches shared memory, and scratch and images in global memory, as a sanitizer would. It reports an access
// out of bounds, a read of a word that was never written or is still being copied, a write to a word that is being
// copied from, and two warps that access one word between two barriers if one of them writes.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <deque>
#include <string>
#include <vector>

#include "bf16.h"
#include "execution.h"
#include "tensor_core.h"
#include "watched_memory.h"

namespace pathnet::cuda {

class HostExec {
 public:
  template <class T>
  struct PerLane {
    T of[kWarpSize];
    PerLane() = default;
    explicit PerLane(const T& start) { std::fill_n(of, kWarpSize, start); }
    T& operator[](int lane) { return of[lane]; }
  };
  template <class T>
  struct PerWarp {
    std::vector<T> of = std::vector<T>(kWarps);
    T& operator[](int warp) { return of[size_t(warp)]; }
  };
  using Source = HostSource;
  using Weights = HostWeights;

  // `scratch` is the thread block's part of the scratch: `scratch_size` elements that load_scratch and store_scratch
  // may access.
  HostExec(int shared_bytes, int64_t images_bytes, const float* scratch = nullptr, int64_t scratch_size = 0)
      : memory_(size_t(shared_bytes), 0xff),
        shared_("shared memory", size_t(shared_bytes)),
        images_memory_(size_t(images_bytes), 0xff),
        images_("the images", size_t(images_bytes)),
        scratch_begin_(scratch),
        scratch_("the scratch", size_t(scratch_size) * sizeof(float)) {}

  const std::string& finding() const { return finding_; }

  static void hide(int32_t&) {}
  // The twin runs the second thread block, so that a wrong start of its part of the scratch is seen.
  static constexpr int kBlock = 1;
  int block() const { return kBlock; }
  // A new item must not read what the last one left in memory.
  int take(int32_t* counter) {
    shared_.forget();
    images_.forget();
    scratch_.forget();
    return (*counter)++;
  }
  void barrier() { ++epoch_; }

  template <class F>
  void warps(const F& f) {
    for (int i = 0; i < kWarps; ++i) {
      // Out of order, so that code which works only in order fails.
      warp_ = (i * 5 + int(epoch_) * 3) % kWarps;
      f(warp_);
    }
    warp_ = kWholeBlock;
  }
  template <class F>
  void threads(const F& f) {
    for (int thread = kThreads - 1; thread >= 0; --thread) {
      warp_ = thread / kWarpSize;
      f(thread);
    }
    warp_ = kWholeBlock;
  }
  template <class F>
  void lanes(const F& f) {
    for (int lane = 0; lane < kWarpSize; ++lane) f(lane);
  }

  template <class T>
  T load(int byte) {
    T value{};
    if (!touch(byte, sizeof(T), false)) return value;
    std::memcpy(&value, memory_.data() + byte, sizeof(T));
    return value;
  }
  template <class T>
  T uniform_load(int byte) {
    return load<T>(byte);
  }
  template <class T>
  void store(int byte, T value) {
    if (touch(byte, sizeof(T), true)) std::memcpy(memory_.data() + byte, &value, sizeof(T));
  }
  void clear_unit(int byte) {
    if (touch(byte, kUnitBytes, true)) std::memset(memory_.data() + byte, 0, kUnitBytes);
  }

  uint32_t load_image(int byte) {
    uint32_t value = 0;
    if (touch_image(byte, sizeof(value), false)) std::memcpy(&value, images_memory_.data() + byte, sizeof(value));
    return value;
  }
  void store_image(int byte, uint32_t value) {
    if (touch_image(byte, sizeof(value), true)) std::memcpy(images_memory_.data() + byte, &value, sizeof(value));
  }
  void clear_image_unit(int byte) {
    if (touch_image(byte, kUnitBytes, true)) std::memset(images_memory_.data() + byte, 0, kUnitBytes);
  }

  template <class T>
  T load_scratch(const float* from) {
    T value{};
    if (touch_scratch(from, sizeof(T), false)) std::memcpy(&value, from, sizeof(T));
    return value;
  }
  template <class T>
  void store_scratch(float* to, const T& value) {
    if (touch_scratch(to, sizeof(T), true)) std::memcpy(to, &value, sizeof(T));
  }

  void raise(int byte, PerLane<float>& values) {
    raise_one(byte, to_bits(*std::max_element(values.of, values.of + kWarpSize)));
  }
  // Atomic: several warps may raise one word between two barriers, but none may access it otherwise.
  void raise_one(int byte, uint32_t value) {
    const int warp = warp_;
    warp_ = kAtomic;
    store(byte, std::max(load<uint32_t>(byte), value));
    warp_ = warp;
  }
  double sum(PerLane<double>& values) const {
    double of[kWarpSize];
    std::copy_n(values.of, kWarpSize, of);
    for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
      for (int lane = 0; lane < distance; ++lane) of[lane] += of[lane + distance];
    }
    return of[0];
  }

  void copy_async(int byte, const uint8_t* from, int bytes) {
    if (reinterpret_cast<uintptr_t>(from) % kUnitBytes != 0) report("copy from a misaligned address", shared_, byte);
    if (begin_copy(byte, bytes)) open_.push_back({byte, bytes, from, -1});
  }
  void copy_image_async(int byte, int from, int bytes) {
    if (!begin_copy(byte, bytes)) return;
    for (int i = 0; i < bytes; i += kUnitBytes) {
      warp_ = copying_warp(i);
      if (!touch_image(from + i, kUnitBytes, false)) return;
    }
    warp_ = kWholeBlock;
    images_.begin_copy_from(from, size_t(bytes));
    open_.push_back({byte, bytes, images_memory_.data() + from, from});
  }
  void commit_copies() {
    groups_.push_back(open_);
    open_.clear();
  }
  template <int pending>
  void wait_copies() {
    while (groups_.size() > size_t(pending)) {
      for (const Copy& copy : groups_.front()) end_copy(copy);
      groups_.pop_front();
    }
  }

  template <class Address>
  void load_source(Source& source, const Address& address) {
    for (int lane = 0; lane < kWarpSize; ++lane) {
      const int byte = address(lane), matrix = lane / 8, row = matrix % 2 * 8 + lane % 8, first = matrix / 2 * 8;
      uint16_t values[8] = {};
      if (byte % kUnitBytes != 0) report("misaligned ldmatrix", shared_, byte);
      if (touch(byte, kUnitBytes, false)) std::memcpy(values, memory_.data() + byte, kUnitBytes);
      for (int i = 0; i < 8; ++i) source.of[row][first + i] = from_bf16(values[i]);
    }
  }
  template <class Address>
  void load_weights(Weights& weights, const Address& address) {
    for (int lane = 0; lane < kWarpSize; ++lane) {
      const int byte = address(lane);
      uint16_t values[4] = {};
      if (byte % 8 != 0) report("misaligned read of weights", shared_, byte);
      if (touch(byte, 8, false)) std::memcpy(values, memory_.data() + byte, 8);
      for (int i = 0; i < 4; ++i) weights.of[lane % 4 * 2 + i % 2 + i / 2 * 8][lane / 4] = from_bf16(values[i]);
    }
  }
  template <class Result>
  void multiply(const Result& result, const Source& a, const Weights& b) {
    multiply_accumulate(result, a, b);
  }

  template <int bytes>
  static uint32_t load_bits(const uint8_t* from) {
    uint32_t bits = 0;
    std::memcpy(&bits, from, bytes);
    return bits;
  }
  template <int bytes>
  static void store_bits(uint8_t* to, uint32_t bits) {
    std::memcpy(to, &bits, bytes);
  }

  static uint32_t to_bf16(float low, float high) { return uint32_t(cuda::to_bf16(high)) << 16 | cuda::to_bf16(low); }
  static float low(uint32_t pair) { return from_bits(pair << 16); }
  static float high(uint32_t pair) { return from_bits(pair & 0xffff0000u); }
  static float from_bits(uint32_t bits) { return float_of_bits(bits); }
  static uint32_t to_bits(float value) { return bits_of_float(value); }
  static float larger_magnitude(float a, float b) { return std::fmax(a, std::fabs(b)); }
  static float multiply_add(float a, float b, float c) { return std::fma(a, b, c); }
  static double scaled_root(double square, int exponent) { return std::ldexp(std::sqrt(square), exponent); }

 private:
  static constexpr int kAtomic = WatchedMemory::kAtomic, kWholeBlock = WatchedMemory::kWholeBlock;

  struct Copy {
    int byte, bytes;
    const uint8_t* from;
    int image;  // byte of the images that is copied from, or -1 for weights
  };

  bool touch(int byte, size_t bytes, bool writes) { return check(shared_, byte, bytes, writes); }

  // A GPU requires accesses aligned to their size.
  bool touch_image(int byte, size_t bytes, bool writes) {
    if (byte % int(bytes) != 0) report("misaligned access", images_, byte);
    return check(images_, byte, bytes, writes);
  }

  bool touch_scratch(const float* at, size_t bytes, bool writes) {
    return check(scratch_, (at - scratch_begin_) * int64_t(sizeof(float)), bytes, writes);
  }

  // Reports what is wrong with an access; returns whether it is within bounds.
  bool check(WatchedMemory& memory, int64_t byte, size_t bytes, bool writes) {
    const char* wrong = memory.touch(byte, bytes, writes, warp_, epoch_);
    if (wrong != nullptr) report(wrong, memory, byte);
    return memory.holds(byte, bytes);
  }

  static int copying_warp(int offset) { return offset / kUnitBytes % kThreads / kWarpSize; }

  // Fills a copy's destination with a pattern until it ends; returns whether it is within bounds.
  bool begin_copy(int byte, int bytes) {
    if (byte % kUnitBytes != 0 || bytes % kUnitBytes != 0) report("misaligned copy", shared_, byte);
    for (int i = 0; i < bytes; i += kUnitBytes) {
      warp_ = copying_warp(i);
      if (!touch(byte + i, kUnitBytes, true)) return false;
      std::memset(memory_.data() + byte + i, 0xff, kUnitBytes);
      shared_.begin_copy_into(byte + i, kUnitBytes);
    }
    warp_ = kWholeBlock;
    return true;
  }

  void end_copy(const Copy& copy) {
    std::memcpy(memory_.data() + copy.byte, copy.from, size_t(copy.bytes));
    shared_.end_copy_into(copy.byte, size_t(copy.bytes), epoch_);
    if (copy.image >= 0) images_.end_copy_from(copy.image, size_t(copy.bytes), epoch_);
  }

  void report(const char* what, const WatchedMemory& memory, int64_t byte) {
    if (finding_.empty()) finding_ = what + (" at byte " + std::to_string(byte)) + " of " + memory.name();
  }

  std::vector<uint8_t> memory_;
  WatchedMemory shared_;
  std::vector<uint8_t> images_memory_;
  WatchedMemory images_;
  const float* scratch_begin_;
  WatchedMemory scratch_;
  std::vector<Copy> open_;
  std::deque<std::vector<Copy>> groups_;
  std::string finding_;
  int64_t epoch_ = 0;
  int warp_ = kWholeBlock;
};

}  // namespace pathnet::cuda
