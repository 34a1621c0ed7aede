// The execution policy on the host: the kernels' own bodies in plain loops, for machines without a GPU. Tensor-core
// fragments are laid out as PTX defines them for ldmatrix.x4 and mma.m16n8k16.
//
// It also watches shared memory, and scratch and images in global memory, as a sanitizer would: an access out of
// bounds, a read of what was never written or is still being copied, a write to what is being copied from, and two
// warps that touch a word between two barriers, one of them writing.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <deque>
#include <string>
#include <vector>

#include "bf16.h"
#include "execution.h"

namespace pathnet::cuda {

// Memory of one thread block under watch, by words of four bytes: what was written, and by whom each was touched
// since the last barrier.
class WatchedMemory {
 public:
  static constexpr int kNobody = -1, kSeveral = -2, kAtomic = -3, kWholeBlock = -4;

  WatchedMemory(const char* name, size_t bytes) : name_(name), words_(bytes / 4) {}

  // Notes an access by a warp, or by one of the others above. Null, or what is wrong with it.
  const char* touch(int64_t byte, size_t bytes, bool writes, int warp, int64_t epoch) {
    if (!holds(byte, bytes)) return "access out of bounds";
    const char* wrong = nullptr;
    for (size_t w = size_t(byte) / 4; w <= (size_t(byte) + bytes - 1) / 4; ++w) {
      Word& word = words_[w];
      if (word.epoch != epoch) {
        word.epoch = epoch;
        word.reader = word.writer = kNobody;
      }
      const bool others_wrote = word.writer != kNobody && word.writer != warp;
      const bool others_read = word.reader != kNobody && word.reader != warp;
      if (!word.copied) {
        wrong = writes ? "write over a running copy" : "read of a running copy";
      } else if (writes && word.copies > 0) {
        wrong = "write to what is being copied";
      } else if (!writes && !word.written) {
        wrong = "read of what was never written";
      } else if (others_wrote || (writes && others_read)) {
        wrong = writes ? "race of a write" : "race of a read";
      }
      if (writes) {
        word.writer = warp;
        word.written = true;
      } else {
        word.reader = word.reader == kNobody || word.reader == warp ? warp : kSeveral;
      }
    }
    return wrong;
  }

  // Whether it holds what is accessed, aligned to its size up to four bytes.
  bool holds(int64_t byte, size_t bytes) const {
    return byte >= 0 && size_t(byte) + bytes <= words_.size() * 4 && byte % int64_t(std::min<size_t>(bytes, 4)) == 0;
  }

  // A copy that runs from now on, into words that were touched already.
  void copy(int64_t byte, size_t bytes) {
    for (size_t w = size_t(byte) / 4; w < (size_t(byte) + bytes) / 4; ++w) words_[w].copied = false;
  }
  // Only after a barrier may others than the copying thread read it.
  void arrive(int64_t byte, size_t bytes, int64_t epoch) {
    for (size_t w = size_t(byte) / 4; w < (size_t(byte) + bytes) / 4; ++w) {
      words_[w].epoch = epoch;
      words_[w].writer = kSeveral;
      words_[w].copied = true;
    }
  }
  // The same of a copy's source: from now on nobody may write it, and after the copy only behind a barrier.
  void lend(int64_t byte, size_t bytes) {
    for (size_t w = size_t(byte) / 4; w < (size_t(byte) + bytes) / 4; ++w) ++words_[w].copies;
  }
  void take_back(int64_t byte, size_t bytes, int64_t epoch) {
    for (size_t w = size_t(byte) / 4; w < (size_t(byte) + bytes) / 4; ++w) {
      Word& word = words_[w];
      if (word.epoch != epoch) word.writer = kNobody;
      word.epoch = epoch;
      word.reader = kSeveral;
      --word.copies;
    }
  }
  // What is in it is nobody's to read any more.
  void forget() {
    for (Word& word : words_) word.written = false;
  }

  const char* name() const { return name_; }

 private:
  struct Word {
    int64_t epoch = -1;
    int reader = kNobody, writer = kNobody;
    bool written = false, copied = true;
    int copies = 0;  // that read it
  };

  const char* name_;
  std::vector<Word> words_;
};

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
  struct Source {
    float of[16][16];  // pixel, channel
  };
  struct Weights {
    float of[16][8];  // channel summed over, channel produced
  };

  // `scratch`: what load_scratch and store_scratch may reach, `scratch_size` elements.
  HostExec(int shared_bytes, int64_t images_bytes, const float* scratch = nullptr, int64_t scratch_size = 0)
      : memory_(size_t(shared_bytes), 0xff),
        shared_("shared memory", size_t(shared_bytes)),
        images_memory_(size_t(images_bytes), 0xff),
        images_("the images", size_t(images_bytes)),
        scratch_begin_(scratch),
        scratch_("the scratch", size_t(scratch_size) * sizeof(float)) {}

  const std::string& finding() const { return finding_; }

  static void hide(int32_t&) {}
  // Not the first, so that where a thread block's part of the scratch begins counts.
  static constexpr int kBlock = 1;
  int block() const { return kBlock; }
  // A new item finds what the last one left, but must not read it.
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
      // Not in order, so that what only works in order shows.
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
  // Atomic: warps may meet here between two barriers, but none may read or write the word otherwise.
  void raise_one(int byte, uint32_t value) {
    const int own = warp_;
    warp_ = kAtomic;
    store(byte, std::max(load<uint32_t>(byte), value));
    warp_ = own;
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
    images_.lend(from, size_t(bytes));
    open_.push_back({byte, bytes, images_memory_.data() + from, from});
  }
  void commit_copies() {
    groups_.push_back(open_);
    open_.clear();
  }
  template <int pending>
  void wait_copies() {
    while (groups_.size() > size_t(pending)) {
      for (const Copy& copy : groups_.front()) arrive(copy);
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
  // As tensor cores add: the products and the accumulator are cut to a common power of two, kFraction bits below the
  // largest of them, and their sum toward zero to float32. Every addition shrinks what it adds to (Ootomo and Yokota,
  // "Recovering single precision accuracy from Tensor Cores", 2022, section 3), which rounding to nearest would hide.
  template <class Result>
  void multiply(const Result& result, const Source& a, const Weights& b) {
    for (int row = 0; row < 16; ++row) {
      float terms[17][8];
      uint32_t largest[8] = {};
      for (int column = 0; column < 8; ++column) {
        terms[16][column] = result(row % 8 * 4 + column / 2)[row / 8 * 2 + column % 2];
      }
      for (int k = 0; k < 16; ++k) {
        for (int column = 0; column < 8; ++column) terms[k][column] = a.of[row][k] * b.of[k][column];
      }
      for (int k = 0; k < 17; ++k) {
        for (int column = 0; column < 8; ++column) {
          largest[column] = std::max(largest[column], to_bits(terms[k][column]) & 0x7f800000u);
        }
      }
      for (int column = 0; column < 8; ++column) {
        float& sum = result(row % 8 * 4 + column / 2)[row / 8 * 2 + column % 2];
        const int exponent = int(largest[column] >> 23);
        if (exponent <= kFraction || exponent == 255) {
          sum = 0.0f;
          for (int k = 0; k < 17; ++k) sum += terms[k][column];
          continue;
        }
        const float up = from_bits(uint32_t(127 + 127 + kFraction - exponent) << 23);
        int32_t total = 0;
        for (int k = 0; k < 17; ++k) total += int32_t(terms[k][column] * up);
        sum = float(std::ldexp(cut(total), exponent - 127 - kFraction));
      }
    }
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
  static float from_bits(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
  }
  static uint32_t to_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    return bits;
  }
  static float larger_magnitude(float a, float b) { return std::fmax(a, std::fabs(b)); }
  static float multiply_add(float a, float b, float c) { return std::fma(a, b, c); }
  static double scaled_root(double square, int exponent) { return std::ldexp(std::sqrt(square), exponent); }

 private:
  static constexpr int kAtomic = WatchedMemory::kAtomic, kWholeBlock = WatchedMemory::kWholeBlock;

  static constexpr int kFraction = 25;

  // Toward zero to the 24 bits of float32.
  static double cut(double value) {
    uint64_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    bits &= ~((uint64_t(1) << 29) - 1);
    std::memcpy(&value, &bits, sizeof(value));
    return value;
  }

  struct Copy {
    int byte, bytes;
    const uint8_t* from;
    int image;  // byte of the images that it is, or -1 for weights
  };

  bool touch(int byte, size_t bytes, bool writes) { return judge(shared_, byte, bytes, writes); }

  // Units as a GPU reads and writes them: aligned to their size.
  bool touch_image(int byte, size_t bytes, bool writes) {
    if (byte % int(bytes) != 0) report("misaligned access", images_, byte);
    return judge(images_, byte, bytes, writes);
  }

  bool touch_scratch(const float* at, size_t bytes, bool writes) {
    return judge(scratch_, (at - scratch_begin_) * int64_t(sizeof(float)), bytes, writes);
  }

  // Whether the access is within bounds.
  bool judge(WatchedMemory& memory, int64_t byte, size_t bytes, bool writes) {
    const char* wrong = memory.touch(byte, bytes, writes, warp_, epoch_);
    if (wrong != nullptr) report(wrong, memory, byte);
    return memory.holds(byte, bytes);
  }

  static int copying_warp(int offset) { return offset / kUnitBytes % kThreads / kWarpSize; }

  // Whether a copy has room.
  bool begin_copy(int byte, int bytes) {
    if (byte % kUnitBytes != 0 || bytes % kUnitBytes != 0) report("misaligned copy", shared_, byte);
    for (int i = 0; i < bytes; i += kUnitBytes) {
      warp_ = copying_warp(i);
      if (!touch(byte + i, kUnitBytes, true)) return false;
      std::memset(memory_.data() + byte + i, 0xff, kUnitBytes);
      shared_.copy(byte + i, kUnitBytes);
    }
    warp_ = kWholeBlock;
    return true;
  }

  void arrive(const Copy& copy) {
    std::memcpy(memory_.data() + copy.byte, copy.from, size_t(copy.bytes));
    shared_.arrive(copy.byte, size_t(copy.bytes), epoch_);
    if (copy.image >= 0) images_.take_back(copy.image, size_t(copy.bytes), epoch_);
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
