// Random numbers that are the same on every machine: the standard's distributions differ between libraries.
#pragma once

#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <random>

namespace trial {

class Dice {
 public:
  explicit Dice(uint64_t seed) : engine_(seed) {}

  int64_t below(int64_t end) { return int64_t(engine_() % uint64_t(end)); }
  int64_t between(int64_t first, int64_t last) { return first + below(last - first + 1); }
  bool chance(double probability) { return unit() < probability; }
  double unit() { return double(engine_() >> 11) * 0x1p-53; }
  float around_zero(double deviation) { return float((2 * unit() - 1) * std::sqrt(3.0) * deviation); }
  template <class T>
  T one_of(std::initializer_list<T> choices) {
    return choices.begin()[below(int64_t(choices.size()))];
  }

 private:
  std::mt19937_64 engine_;
};

}  // namespace trial
