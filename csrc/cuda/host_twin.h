// The execution policy on the host: the kernels' own bodies in plain loops, for machines without a GPU. Tensor-core
// fragments are laid out as PTX defines them for ldmatrix.x4 and mma.m16n8k16.
//
// It also watches shared memory, and the images in global memory, as a sanitizer would: an access out of bounds, a
// read of what was never written or is still being copied, a write to what is being copied from, and two warps that
// touch a word between two barriers, one of them writing.
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

  HostExec(int shared_bytes, int64_t images_bytes)
      : shared_("shared memory", size_t(shared_bytes)), images_("the images", size_t(images_bytes)) {}

  const std::string& finding() const { return finding_; }

  static void hide(int32_t&) {}
  int block() const { return 0; }
  // A new item finds what the last one left, but must not read it.
  int take(int32_t* counter) {
    for (Watched* memory : {&shared_, &images_}) {
      for (Word& word : memory->words) word.written = false;
    }
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
    return load_from<T>(shared_, byte);
  }
  template <class T>
  T uniform_load(int byte) {
    return load<T>(byte);
  }
  template <class T>
  void store(int byte, T value) {
    store_to(shared_, byte, value);
  }
  void clear_unit(int byte) { store(byte, Unit{}); }

  uint32_t load_image(int byte) { return load_from<uint32_t>(images_, byte); }
  void store_image(int byte, uint32_t value) { store_to(images_, byte, value); }
  void clear_image_unit(int byte) { store_to(images_, byte, Unit{}); }

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
    if (reinterpret_cast<uintptr_t>(from) % kUnitBytes != 0) report("misaligned copy of weights to", shared_, byte);
    if (begin_copy(byte, bytes)) open_.push_back({byte, bytes, from, -1});
  }
  void copy_image_async(int byte, int from, int bytes) {
    if (!begin_copy(byte, bytes)) return;
    for (int i = 0; i < bytes; i += kUnitBytes) {
      warp_ = copying_warp(i);
      if (!touch(images_, from + i, kUnitBytes, false)) return;
      for (int word = 0; word < kUnitBytes / 4; ++word) ++images_.words[size_t(from + i) / 4 + size_t(word)].copies;
    }
    warp_ = kWholeBlock;
    open_.push_back({byte, bytes, nullptr, from});
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
      if (touch(shared_, byte, kUnitBytes, false)) std::memcpy(values, shared_.bytes.data() + byte, kUnitBytes);
      for (int i = 0; i < 8; ++i) source.of[row][first + i] = from_bf16(values[i]);
    }
  }
  template <class Address>
  void load_weights(Weights& weights, const Address& address) {
    for (int lane = 0; lane < kWarpSize; ++lane) {
      const int byte = address(lane);
      uint16_t values[4] = {};
      if (touch(shared_, byte, 8, false)) std::memcpy(values, shared_.bytes.data() + byte, 8);
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
  static constexpr int kNobody = -1, kSeveral = -2, kAtomic = -3, kWholeBlock = -4;

  static constexpr int kFraction = 25;

  // Toward zero to the 24 bits of float32.
  static double cut(double value) {
    uint64_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    bits &= ~((uint64_t(1) << 29) - 1);
    std::memcpy(&value, &bits, sizeof(value));
    return value;
  }

  // Who touched a word of four bytes since the last barrier.
  struct Word {
    int64_t epoch = -1;
    int reader = kNobody, writer = kNobody;
    bool written = false, copied = true;
    int copies = 0;  // that read it and have not arrived
  };
  struct Watched {
    const char* name;
    std::vector<uint8_t> bytes;
    std::vector<Word> words;

    Watched(const char* name, size_t size) : name(name), bytes(size, 0xff), words(size / 4) {}
  };
  struct Unit {
    uint8_t of[kUnitBytes] = {};
  };
  // From weights, or from byte `image` of the images.
  struct Copy {
    int byte, bytes;
    const uint8_t* weights;
    int image;
  };

  template <class T>
  T load_from(Watched& memory, int byte) {
    T value{};
    if (touch(memory, byte, sizeof(T), false)) std::memcpy(&value, memory.bytes.data() + byte, sizeof(T));
    return value;
  }
  template <class T>
  void store_to(Watched& memory, int byte, T value) {
    if (touch(memory, byte, sizeof(T), true)) std::memcpy(memory.bytes.data() + byte, &value, sizeof(T));
  }

  // Accesses are aligned to their own size, as a GPU's have to be.
  bool touch(Watched& memory, int byte, size_t bytes, bool writes) {
    if (byte < 0 || size_t(byte) + bytes > memory.bytes.size()) {
      report("access outside of", memory, byte);
      return false;
    }
    if (byte % int(bytes) != 0) report("misaligned access to", memory, byte);
    for (size_t w = size_t(byte) / 4; w <= (size_t(byte) + bytes - 1) / 4; ++w) {
      Word& word = memory.words[w];
      if (word.epoch != epoch_) {
        word.epoch = epoch_;
        word.reader = word.writer = kNobody;
      }
      if (!word.copied) report(writes ? "write over a running copy in" : "read of a running copy in", memory, byte);
      if (writes && word.copies > 0) report("write to what is being copied from", memory, byte);
      if (!writes && !word.written) report("read of what was never written in", memory, byte);
      const bool others_wrote = word.writer != kNobody && word.writer != warp_;
      const bool others_read = word.reader != kNobody && word.reader != warp_;
      if (others_wrote || (writes && others_read)) {
        report(writes ? "race of a write in" : "race of a read in", memory, byte);
      }
      if (writes) {
        word.writer = warp_;
        word.written = true;
      } else {
        word.reader = word.reader == kNobody || word.reader == warp_ ? warp_ : kSeveral;
      }
    }
    return true;
  }

  static int copying_warp(int offset) { return offset / kUnitBytes % kThreads / kWarpSize; }

  bool begin_copy(int byte, int bytes) {
    for (int i = 0; i < bytes; i += kUnitBytes) {
      warp_ = copying_warp(i);
      if (!touch(shared_, byte + i, kUnitBytes, true)) return false;
      std::memset(shared_.bytes.data() + byte + i, 0xff, kUnitBytes);
      for (int word = 0; word < kUnitBytes / 4; ++word) {
        shared_.words[size_t(byte + i) / 4 + size_t(word)].copied = false;
      }
    }
    warp_ = kWholeBlock;
    return true;
  }

  void arrive(const Copy& copy) {
    const uint8_t* from = copy.weights == nullptr ? images_.bytes.data() + copy.image : copy.weights;
    std::memcpy(shared_.bytes.data() + copy.byte, from, size_t(copy.bytes));
    for (int i = 0; i < copy.bytes / 4; ++i) {
      Word& word = shared_.words[size_t(copy.byte) / 4 + size_t(i)];
      // Only after a barrier may others than the copying thread read it.
      word.epoch = epoch_;
      word.writer = kSeveral;
      word.copied = true;
      if (copy.weights != nullptr) continue;
      Word& source = images_.words[size_t(copy.image) / 4 + size_t(i)];
      // Nor may they write what it was copied from.
      if (source.epoch != epoch_) source.writer = kNobody;
      source.epoch = epoch_;
      source.reader = kSeveral;
      --source.copies;
    }
  }

  void report(const char* what, const Watched& memory, int byte) {
    if (finding_.empty()) finding_ = std::string(what) + " " + memory.name + " at byte " + std::to_string(byte);
  }

  Watched shared_, images_;
  std::vector<Copy> open_;
  std::deque<std::vector<Copy>> groups_;
  std::string finding_;
  int64_t epoch_ = 0;
  int warp_ = kWholeBlock;
};

}  // namespace pathnet::cuda
