// Tries the cpu kernels on random networks, for runs under a sanitizer: every walk, precision and instruction set of
// this processor, on one thread and on several, judged by plain loops. Without torch and Python, whose memory and
// threads a sanitizer would have to take on trust.
//
//   walks [trials] [first seed]
//
// Exit status 1, and one line that says where, at the first walk that gives a wrong result.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <new>
#include <string>
#include <thread>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/layout.h"
#include "trial.h"
#include "truth.h"

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#include <sanitizer/common_interface_defs.h>
#endif

// Fresh memory is made of NaNs, so that a kernel that reads what it has not written gives one.
extern "C" const char* __asan_default_options() {
  return "detect_leaks=1:detect_stack_use_after_return=1:max_malloc_fill_size=1073741824:malloc_fill_byte=255";
}
extern "C" const char* __ubsan_default_options() { return "print_stacktrace=1"; }
extern "C" const char* __tsan_default_options() { return "halt_on_error=1"; }

namespace {

using namespace pathnet;
using namespace pathnet::cpu;
using trial::Passed;
using trial::Trial;

// Rounding of a walk of float32 precision, some dozen times over.
constexpr double kFloat32 = 1e-4;
// bf16 has 8 bits: each number is off by up to 2^-9, a gradient as a vector by some of that for each convolution.
constexpr double kBfloat16 = 5e-2;
// Where terms cancel, what is left is as far off as the plain loop is in the same precision; by luck that may be
// less.
constexpr double kCancelled = 16;

// What is going on, for the line that is printed where it goes wrong.
std::string doing;

void say_what_was_going_on() { std::fprintf(stderr, "walks: in %s\n", doing.c_str()); }

[[noreturn]] void fail(const std::string& what) {
  std::printf("walks: %s: %s\n", doing.c_str(), what.c_str());
  std::exit(1);
}

template <class... Numbers>
std::string text(const char* format, Numbers... numbers) {
  char line[200];
  std::snprintf(line, sizeof(line), format, numbers...);
  return line;
}

// A heap block of its own that ends with the last element. Where `shifted`, the first lies no better aligned than its
// type asks for.
template <class T>
class Exact {
 public:
  Exact(size_t size, bool shifted, T value) : shift_(shifted), size_(size), own_(new T[size + shift_]) {
    std::fill_n(data(), size, value);
  }
  Exact(const std::vector<T>& values, bool shifted) : Exact(values.size(), shifted, T()) {
    std::copy(values.begin(), values.end(), data());
  }

  T* data() { return own_.get() + shift_; }
  const T* data() const { return own_.get() + shift_; }
  size_t size() const { return size_; }
  const T& operator[](size_t i) const { return data()[i]; }

  bool operator==(const Exact& other) const {
    return size_ == other.size_ && (size_ == 0 || std::memcmp(data(), other.data(), size_ * sizeof(T)) == 0);
  }
  bool operator!=(const Exact& other) const { return !(*this == other); }

 private:
  size_t shift_, size_;
  std::unique_ptr<T[]> own_;
};

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

// Packed weights begin at a line of the cache, as torch's memory does.
class Packed {
 public:
  Packed(const Kernels& kernels, const Plan& plan, Direction direction, bool fold)
      : own_(static_cast<uint8_t*>(::operator new(kernels.packed_size(plan, direction), std::align_val_t(64)))) {
    kernels.pack(plan, direction, fold, own_.get(), [] {});
  }
  const uint8_t* data() const { return own_.get(); }

 private:
  struct Free {
    void operator()(uint8_t* bytes) const { ::operator delete(bytes, std::align_val_t(64)); }
  };
  std::unique_ptr<uint8_t, Free> own_;
};

// Thrown out of a walk that is ended half way.
struct Ended {};

// Threads whose walk ends at their check of a number; without one, at its own end.
Team team_of(int threads, int64_t last_check = INT64_MAX) {
  const auto checks = std::make_shared<std::atomic<int64_t>>(0);
  const auto run = [threads](const std::function<void(int)>& work) {
    std::atomic<bool> ended{false};
    const auto guarded = [&](int worker) {
      try {
        work(worker);
      } catch (const Ended&) {
        ended = true;
      }
    };
    std::vector<std::thread> others;
    for (int worker = 1; worker < threads; ++worker) others.emplace_back(guarded, worker);
    guarded(0);
    for (std::thread& other : others) other.join();
    if (ended) throw Ended();
  };
  return {threads, run, [checks, last_check] {
            if (++*checks >= last_check) throw Ended();
          }};
}

struct Walked {
  Exact<float> values;
  Exact<int32_t> exponents;
  Exact<double> norms;

  bool operator==(const Walked& other) const {
    return values == other.values && exponents == other.exponents && norms == other.norms;
  }
};

// What ForwardBatchWalk records.
struct Tape {
  Exact<uint8_t> relu_bits;
  Exact<float> normalized, scales;

  bool operator==(const Tape& other) const {
    return relu_bits == other.relu_bits && normalized == other.normalized && scales == other.scales;
  }
};

double norm_of(const double* values, size_t size) {
  double sum = 0;
  for (size_t i = 0; i < size; ++i) sum += values[i] * values[i];
  return std::sqrt(sum);
}

// A result in double, and what the loops in float32 make of it.
struct Truth {
  std::vector<double> values;
  std::vector<float> rounded;
};

struct Counts {
  int walks = 0;
  double worst = 0;  // errors relative to the norm, where the norm is the judge
};

// One network, and what one instruction set and precision makes of it.
class Judge {
 public:
  explicit Judge(uint64_t seed)
      : seed_(seed),
        trial_(trial::make_trial(seed)),
        shifted_(seed % 2),
        blocks_(trial_.blocks, false),
        units_(trial_.units, false),
        weights_(trial_.weights, shifted_),
        scales_(trial_.scales, shifted_),
        shifts_(trial_.shifts, shifted_),
        epsilons_(trial_.epsilons, shifted_),
        biases_(trial_.biases, shifted_),
        routing_(trial_.routing, shifted_),
        straight_(trial_.blocks.size() * 2, shifted_, 1.0f),
        y0_(trial_.y0, shifted_),
        grad_(trial_.grad, shifted_),
        exponent_(trial_.exponent, shifted_),
        relu_bits_(as_bits(trial_.relu_mask)) {}

  // Every walk whose code differs from that of `tried`, which may be null.
  void judge(Isa isa, bool bf16, const Kernels* tried) {
    kernels_ = kernels_of(isa, bf16);
    const std::string name =
        text("seed %llu, %s %s ", static_cast<unsigned long long>(seed_), isa_name(isa), bf16 ? "bf16" : "float32");
    tolerance_ = bf16 ? kBfloat16 : kFloat32;
    // A plain loop of bf16 numbers is as much farther off as they are shorter.
    cancelled_ = bf16 ? kCancelled * 0x1p16 : kCancelled;
    const bool running = !trial_.closed, batch = trial_.closed || !trial_.behind_relu;
    if (running && (!tried || tried->backward != kernels_.backward)) {
      backward(name + "backward");
      sums_by_length(name + "sums_by_length");
    }
    if (batch && (!tried || tried->batch_backward != kernels_.batch_backward ||
                  tried->batch_forward != kernels_.batch_forward)) {
      batch_walks(name);
    }
    tolerance_ = kFloat32;
    cancelled_ = kCancelled;
    if (running && (!tried || tried->forward != kernels_.forward)) forward(name + "forward");
  }

  static Counts counts[6];  // as `main` names them

 private:
  int64_t blocks() const { return int64_t(trial_.blocks.size()); }
  int64_t outputs() const { return trial_.routings * int64_t(trial_.grad.size()); }
  int several() const { return 2 + int(seed_ % 3); }

  Plan plan(const float* scales, const uint8_t* relu_bits) const {
    return {blocks_.data(),  blocks(), units_.data(), int64_t(trial_.units.size()),
            weights_.data(), scales,   relu_bits,     trial_.bits_stride};
  }

  // [batch][channels][height][width] of each unit as the kernels lay bits out, and back.
  template <class Then>
  void each_bit(const Then& then) const {
    for (size_t u = 0; u < trial_.units.size(); ++u) {
      const Unit& unit = trial_.units[u];
      if (unit.bits_offset < 0) continue;
      const int64_t pixels = unit.in_height * unit.in_width, groups = (unit.in_channels + 15) / 16;
      for (int64_t i = 0; i < trial_.batch * unit.in_channels * pixels; ++i) {
        const int64_t sample = i / pixels / unit.in_channels, channel = i / pixels % unit.in_channels;
        const int64_t byte =
            sample * trial_.bits_stride + unit.bits_offset + (i % pixels * groups * 16 + channel) / 8;
        then(u, size_t(i), size_t(byte), 1 << channel % 8);
      }
    }
  }

  Exact<uint8_t> as_bits(const std::vector<std::vector<uint8_t>>& masks) const {
    Exact<uint8_t> bits(trial_.batch * trial_.bits_stride, false, 0);
    each_bit([&](size_t u, size_t i, size_t byte, int bit) {
      if (masks[u][i]) bits.data()[byte] |= uint8_t(bit);
    });
    return bits;
  }

  // The same for normalized inputs: [batch][height][width][channels filled up to 16].
  std::vector<std::vector<float>> as_planes(const Exact<float>& normalized) const {
    std::vector<std::vector<float>> planes;
    const float* own = normalized.data();
    for (const Unit& unit : trial_.units) {
      planes.emplace_back();
      if (unit.scale_offset < 0) continue;
      const int64_t pixels = unit.in_height * unit.in_width, padded = (unit.in_channels + 15) / 16 * 16;
      for (int64_t s = 0; s < trial_.batch; ++s, own += pixels * padded) {
        for (int64_t c = 0; c < unit.in_channels; ++c) {
          for (int64_t i = 0; i < pixels; ++i) planes.back().push_back(own[i * padded + c]);
        }
      }
    }
    return planes;
  }

  template <class Walk>
  std::vector<Truth> truths(const Walk& walk) const {
    std::vector<Truth> made;
    for (int64_t r = 0; r < trial_.routings; ++r) {
      const float* routing = trial_.routing.data() + r * blocks() * 2;
      made.push_back({walk(double(), routing), walk(float(), routing)});
    }
    return made;
  }

  // Values [begin, begin + size) of a truth against own ones.
  template <class Own>
  void compare(Counts& counts, const std::string& which, const Truth& truth, size_t begin, size_t size,
               const Own& own) {
    double error = 0, rounding = 0;
    for (size_t i = 0; i < size; ++i) {
      error += std::pow(own(i) - truth.values[begin + i], 2);
      rounding += std::pow(double(truth.rounded[begin + i]) - truth.values[begin + i], 2);
    }
    error = std::sqrt(error);
    const double norm = norm_of(truth.values.data() + begin, size);
    const double allowed = tolerance_ * norm + cancelled_ * std::sqrt(rounding);
    // A NaN is not allowed either.
    if (!(error <= allowed)) {
      fail(text("%s: error %.2e, %.2e allowed, norm %.2e", which.c_str(), error, allowed, norm));
    }
    if (norm > 0) counts.worst = std::max(counts.worst, error / norm);
  }

  void judge_backward(Counts& counts, const Walked& walked, const std::vector<Truth>& truths, bool one_exponent) {
    const size_t size = trial_.y0.size() / trial_.batch;
    for (int64_t r = 0; r < int64_t(truths.size()); ++r) {
      const auto exponent_at = [&](int64_t s) {
        const int32_t given = trial_.exponent[one_exponent ? 0 : s];
        return walked.exponents[one_exponent ? r : r * trial_.batch + s] - given;
      };
      const auto judge = [&](int64_t first, int64_t last) {
        const std::string which = text("result %d, samples %d to %d", int(r), int(first), int(last - 1));
        compare(counts, which, truths[r], first * size, (last - first) * size, [&](size_t i) {
          return std::ldexp(double(walked.values[(r * trial_.batch + first) * size + i]),
                            exponent_at(first + int64_t(i / size)));
        });
      };
      // Statistics of a batch tie its samples together.
      if (one_exponent) judge(0, trial_.batch);
      for (int64_t s = 0; s < trial_.batch; ++s) {
        if (!one_exponent) judge(s, s + 1);
        std::vector<double> own(size);
        for (size_t i = 0; i < size; ++i) own[i] = walked.values[(r * trial_.batch + s) * size + i];
        const double norm =
            std::ldexp(walked.norms[r * trial_.batch + s], -exponent_at(s) - trial_.exponent[one_exponent ? 0 : s]);
        if (!(std::fabs(norm - norm_of(own.data(), size)) <= 1e-9 * norm)) {
          fail(text("result %d, sample %d: norm %.9e of a gradient of norm %.9e", int(r), int(s), norm,
                    norm_of(own.data(), size)));
        }
      }
    }
  }

  void judge_forward(Counts& counts, const Exact<float>& output, const std::vector<Truth>& truths, int64_t together) {
    const size_t size = trial_.grad.size() / trial_.batch;
    for (size_t r = 0; r < truths.size(); ++r) {
      for (int64_t s = 0; s < trial_.batch; s += together) {
        compare(counts, text("routing %d, sample %d", int(r), int(s)), truths[r], s * size, together * size,
                [&](size_t i) { return double(output[(r * trial_.batch + s) * size + i]); });
      }
    }
  }

  // Runs a walk on one thread and on several, which must agree bit by bit; gives back what one made.
  template <class Result>
  Result on_threads(Counts& counts, const std::string& name, const std::function<Result(const Team&)>& walk) {
    const auto run = [&](int threads) {
      doing = name + text(", %d threads", threads);
      ++counts.walks;
      return walk(team_of(threads));
    };
    Result one = run(1);
    // Whoever ends a walk gets nothing of it, and leaves nothing behind.
    for (int64_t last_check : {int64_t(1), int64_t(2 + seed_ % 50)}) {
      doing = name + text(", %d threads that end at check %d", several(), int(last_check));
      try {
        walk(team_of(several(), last_check));
        if (last_check == 1) fail("the walk went on");
      } catch (const Ended&) {
      }
    }
    if (!(run(several()) == one)) fail("not what one thread gives");
    doing = name;
    return one;
  }

  void backward(const std::string& name) {
    doing = name;
    Counts& counts = Judge::counts[0];
    const Plan own = plan(scales_.data(), relu_bits_.data());
    const Packed packed(kernels_, own, Direction::kBackward, true);
    const Walked walked = on_threads<Walked>(counts, name, [&](const Team& team) {
      Walked made = blank(trial_.routings, trial_.batch);
      BackwardRunningWalk job = {
          own,          packed.data(),   grad_.data(),      exponent_.data(),   routing_.data(),
          trial_.batch, trial_.routings, made.norms.data(), made.values.data(), made.exponents.data()};
      job.plan.weights = job.plan.scales = nullptr;
      kernels_.backward(job, team);
      norms_alone(team, made.norms, job, kernels_.backward);
      return made;
    });
    if (backward_.empty()) {
      backward_ = truths([&](auto zero, const float* routing) {
        return trial::backward<decltype(zero)>(trial_, routing, trial_.relu_mask, trial_.scales, nullptr);
      });
    }
    judge_backward(counts, walked, backward_, false);
  }

  // For each length the sum over its paths, each walked by itself; the factors are those of the first routing.
  template <class Walk>
  std::vector<Truth> sums(const Walk& walk) const {
    std::vector<Truth> made(blocks() + 1,
                            Truth{std::vector<double>(trial_.y0.size()), std::vector<float>(trial_.y0.size())});
    for (int64_t code = 0; code < int64_t(1) << blocks(); ++code) {
      std::vector<float> path(trial_.routing.begin(), trial_.routing.begin() + blocks() * 2);
      int64_t length = 0;
      for (int64_t b = 0; b < blocks(); ++b) {
        const bool through = code >> b & 1;
        path[2 * b + !through] = 0.0f;
        length += through;
      }
      const std::vector<double> exact = walk(double(), path.data());
      const std::vector<float> rounded = walk(float(), path.data());
      for (size_t i = 0; i < exact.size(); ++i) {
        made[length].values[i] += exact[i];
        made[length].rounded[i] += rounded[i];
      }
    }
    return made;
  }

  void sums_by_length(const std::string& name) {
    doing = name;
    Counts& counts = Judge::counts[4];
    const Plan own = plan(scales_.data(), relu_bits_.data());
    const Packed packed(kernels_, own, Direction::kBackward, true);
    const Walked walked = on_threads<Walked>(counts, name, [&](const Team& team) {
      Walked made = blank(blocks() + 1, trial_.batch);
      BackwardRunningWalk job = {
          own, packed.data(),     grad_.data(),       exponent_.data(),     routing_.data(), trial_.batch,
          1,   made.norms.data(), made.values.data(), made.exponents.data()};
      job.plan.weights = job.plan.scales = nullptr;
      kernels_.sums_by_length(job, team);
      norms_alone(team, made.norms, job, kernels_.sums_by_length);
      return made;
    });
    if (sums_.empty()) {
      sums_ = sums([&](auto zero, const float* routing) {
        return trial::backward<decltype(zero)>(trial_, routing, trial_.relu_mask, trial_.scales, nullptr);
      });
    }
    judge_backward(counts, walked, sums_, false);
  }

  void forward(const std::string& name) {
    doing = name;
    Counts& counts = Judge::counts[1];
    const Plan own = plan(scales_.data(), nullptr);
    const Packed packed(kernels_, own, Direction::kForward, false);
    const auto walk = [&](const Team& team, const Exact<float>& routing, int64_t routings, uint8_t* relu_bits) {
      Exact<float> output(routings * trial_.grad.size(), shifted_, kNan);
      ForwardRunningWalk job = {
          own,           packed.data(),  shifts_.data(), biases_.size() ? biases_.data() : nullptr,
          y0_.data(),    routing.data(), trial_.batch,   routings,
          output.data(), relu_bits};
      job.plan.weights = nullptr;
      kernels_.forward(job, team);
      return output;
    };
    const auto output = on_threads<Exact<float>>(
        counts, name, [&](const Team& team) { return walk(team, routing_, trial_.routings, nullptr); });
    if (forward_.empty()) {
      forward_ = truths([&](auto zero, const float* routing) {
        return trial::forward<decltype(zero)>(trial_, routing, false, nullptr);
      });
    }
    judge_forward(counts, output, forward_, 1);
    Exact<float> recorded(0, false, 0);
    const auto relu_bits = on_threads<Exact<uint8_t>>(counts, name + ", recorded", [&](const Team& team) {
      Exact<uint8_t> bits(trial_.batch * trial_.bits_stride, false, 0);
      recorded = walk(team, straight_, 1, bits.data());
      return bits;
    });
    Truths truth = straight_truth(false);
    judge_forward(counts, recorded, {truth.output}, 1);
    judge_bits(relu_bits, truth);
  }

  void batch_walks(const std::string& prefix) {
    const std::string name = prefix + "batch_forward";
    doing = name;
    Counts& counts = Judge::counts[3];
    const Plan own = plan(scales_.data(), nullptr);
    const Packed packed(kernels_, own, Direction::kForward, false);
    const double tolerance = tolerance_, cancelled = cancelled_;
    // As for `forward`: of float32 precision always.
    tolerance_ = kFloat32;
    cancelled_ = kCancelled;
    const auto walk = [&](const Team& team, const Exact<float>& routing, int64_t routings, Tape* tape) {
      Exact<float> output(routings * trial_.grad.size(), shifted_, kNan);
      ForwardBatchWalk job = {own,
                              packed.data(),
                              shifts_.data(),
                              epsilons_.data(),
                              y0_.data(),
                              routing.data(),
                              trial_.batch,
                              routings,
                              output.data(),
                              tape ? tape->relu_bits.data() : nullptr,
                              tape ? tape->normalized.data() : nullptr,
                              tape ? tape->scales.data() : nullptr};
      job.plan.weights = nullptr;
      kernels_.batch_forward(job, team);
      return output;
    };
    const auto output = on_threads<Exact<float>>(
        counts, name, [&](const Team& team) { return walk(team, routing_, trial_.routings, nullptr); });
    if (batch_forward_.empty()) {
      batch_forward_ = truths([&](auto zero, const float* routing) {
        return trial::forward<decltype(zero)>(trial_, routing, true, nullptr);
      });
    }
    judge_forward(counts, output, batch_forward_, trial_.batch);
    Exact<float> recorded(0, false, 0);
    const Tape tape = on_threads<Tape>(counts, name + ", recorded", [&](const Team& team) {
      Tape made = {{size_t(trial_.batch * trial_.bits_stride), false, 0},
                   {size_t(normalized_size(own, trial_.batch)), shifted_, kNan},
                   {trial_.scales.size(), shifted_, kNan}};
      recorded = walk(team, straight_, 1, &made);
      return made;
    });
    Truths truth = straight_truth(true);
    judge_forward(counts, recorded, {truth.output}, trial_.batch);
    judge_bits(tape.relu_bits, truth);
    const std::vector<std::vector<float>> normalized = as_planes(tape.normalized);
    for (size_t u = 0; u < normalized.size(); ++u) {
      compare(counts, text("normalized inputs of unit %d", int(u)),
              {truth.exact.normalized[u], truth.rounded.normalized[u]}, 0, normalized[u].size(),
              [&](size_t i) { return double(normalized[u][i]); });
    }
    compare(counts, "scales", {truth.exact.scales, truth.rounded.scales}, 0, tape.scales.size(),
            [&](size_t i) { return double(tape.scales[i]); });
    tolerance_ = tolerance;
    cancelled_ = cancelled;
    batch_backward(prefix + "batch_backward", tape, normalized);
  }

  void batch_backward(const std::string& name, const Tape& tape, const std::vector<std::vector<float>>& normalized) {
    doing = name;
    Counts& counts = Judge::counts[2];
    const Plan own = plan(tape.scales.data(), tape.relu_bits.data());
    const Packed packed(kernels_, own, Direction::kBackward, false);
    const auto walk = [&](const std::string& which, int64_t routings, int64_t results,
                          void (*kernel)(const BackwardBatchWalk&, const Team&), Counts& own_counts) {
      return on_threads<Walked>(own_counts, which, [&](const Team& team) {
        Walked made = blank(results, 1);
        BackwardBatchWalk job = {own,
                                 packed.data(),
                                 tape.normalized.data(),
                                 grad_.data(),
                                 exponent_[0],
                                 routing_.data(),
                                 trial_.batch,
                                 routings,
                                 made.norms.data(),
                                 made.values.data(),
                                 made.exponents.data()};
        job.plan.weights = nullptr;
        kernel(job, team);
        norms_alone(team, made.norms, job, kernel);
        return made;
      });
    };
    const Walked walked = walk(name, trial_.routings, trial_.routings, kernels_.batch_backward, counts);
    // The walk is linear given what was recorded: its own bits and normalized inputs, which are judged by themselves.
    std::vector<std::vector<uint8_t>> masks = trial_.relu_mask;
    each_bit([&](size_t u, size_t i, size_t byte, int bit) { masks[u][i] = (tape.relu_bits[byte] & bit) != 0; });
    const std::vector<float> scales(tape.scales.data(), tape.scales.data() + tape.scales.size());
    const auto truth = [&](auto zero, const float* routing) {
      return trial::backward<decltype(zero)>(trial_, routing, masks, scales, &normalized);
    };
    judge_backward(counts, walked, truths(truth), true);
    const Walked summed =
        walk(name + ", sums by length", 1, blocks() + 1, kernels_.batch_sums_by_length, Judge::counts[5]);
    judge_backward(Judge::counts[5], summed, sums(truth), true);
  }

  Walked blank(int64_t results, int64_t exponents) const {
    return {{size_t(results * int64_t(trial_.y0.size())), shifted_, kNan},
            {size_t(results * exponents), shifted_, INT32_MIN},
            {size_t(results * trial_.batch), shifted_, double(kNan)}};
  }

  // Where gradients are not wanted, their norms are the same.
  template <class Job>
  void norms_alone(const Team& team, const Exact<double>& norms, Job job, void (*walk)(const Job&, const Team&)) {
    if (seed_ % 4 != 0) return;
    Exact<double> alone(norms.size(), shifted_, double(kNan));
    job.norms = alone.data();
    job.grad_input = nullptr;
    job.exponent_input = nullptr;
    walk(job, team);
    if (alone != norms) fail("norms are others without the gradients");
  }

  // Of the network itself, with what passes through it.
  struct Truths {
    Truth output;
    Passed<double> exact;
    Passed<float> rounded;
  };

  Truths& straight_truth(bool batch_statistics) {
    std::unique_ptr<Truths>& made = straight_truths_[batch_statistics];
    if (!made) {
      made = std::make_unique<Truths>();
      made->output = {trial::forward<double>(trial_, straight_.data(), batch_statistics, &made->exact),
                      trial::forward<float>(trial_, straight_.data(), batch_statistics, &made->rounded)};
    }
    return *made;
  }

  // A bit may be another only where its number is zero but for rounding. Beyond the channels all are zero.
  void judge_bits(const Exact<uint8_t>& relu_bits, const Truths& truth) {
    std::vector<double> sizes;
    for (const std::vector<double>& values : truth.exact.before_relu) {
      sizes.push_back(norm_of(values.data(), values.size()) / std::sqrt(double(values.size())));
    }
    std::vector<uint8_t> left(relu_bits.data(), relu_bits.data() + relu_bits.size());
    each_bit([&](size_t u, size_t i, size_t byte, int bit) {
      const double value = truth.exact.before_relu[u][i];
      const double rounding = std::fabs(double(truth.rounded.before_relu[u][i]) - value);
      left[byte] &= uint8_t(~bit);
      if (((relu_bits[byte] & bit) != 0) == (value > 0)) return;
      if (!(std::fabs(value) <= kFloat32 * sizes[u] + kCancelled * rounding)) {
        fail(text("ReLU bit %d of unit %d: %d for %.3e", int(i), int(u), value <= 0, value));
      }
    });
    for (uint8_t byte : left) {
      if (byte != 0) fail("ReLU bits beyond the channels");
    }
  }

  const uint64_t seed_;
  const Trial trial_;
  const bool shifted_;
  const Exact<Block> blocks_;
  const Exact<Unit> units_;
  const Exact<float> weights_, scales_, shifts_, epsilons_, biases_, routing_, straight_, y0_, grad_;
  const Exact<int32_t> exponent_;
  const Exact<uint8_t> relu_bits_;
  Kernels kernels_;
  double tolerance_, cancelled_;
  std::vector<Truth> backward_, sums_, forward_, batch_forward_;
  std::unique_ptr<Truths> straight_truths_[2];
};

Counts Judge::counts[6];

}  // namespace

int main(int count, char** arguments) {
  const int trials = count > 1 ? std::atoi(arguments[1]) : 100;
  const int first = count > 2 ? std::atoi(arguments[2]) : 0;
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  __sanitizer_set_death_callback(say_what_was_going_on);
#else
  (void)say_what_was_going_on;
#endif
  const std::vector<Isa> isas = supported_isas();
  for (int seed = first; seed < first + trials; ++seed) {
    Judge judge(seed);
    for (Isa isa : isas) {
      const Kernels float32 = kernels_of(isa, false);
      judge.judge(isa, false, nullptr);
      // Where both precisions are one code, it has been tried.
      judge.judge(isa, true, &float32);
    }
  }
  std::string names;
  for (Isa isa : isas) names += std::string(" ") + isa_name(isa);
  std::printf("walks: %d networks on%s\n", trials, names.c_str());
  const char* walks[] = {"backward",      "forward",        "batch_backward",
                         "batch_forward", "sums_by_length", "batch_sums_by_length"};
  for (int w = 0; w < 6; ++w) {
    std::printf("  %-20s %6d walks, largest error %.1e of the norm\n", walks[w], Judge::counts[w].walks,
                Judge::counts[w].worst);
  }
  return 0;
}
