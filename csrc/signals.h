// Lets a signal end a walk half way: Ctrl-C must not wait for hours of work in one call.
//
// Python runs a signal's handler in its main thread, between two of its own instructions: not while that thread is
// inside a walk. So a walk that the main thread has called takes the GIL from time to time and runs the handlers of
// the signals that have come. Where one raises, the walk ends, and pathnet/native.py raises what the handler raised.
#pragma once

#include <atomic>
#include <cfenv>
#include <chrono>
#include <stdexcept>
#include <thread>

namespace pathnet {

// How long a signal may wait. Taking the GIL from a thread that computes in Python takes up to 5 ms.
constexpr std::chrono::milliseconds kSignalPeriod(100);

// Thrown out of a walk by its threads; what the walk has written is worth nothing.
struct Interrupted : std::runtime_error {
  Interrupted() : std::runtime_error("interrupted by a signal") {}
};

// One walk's watch for signals, made by the thread that calls the walk.
class Watch {
 public:
  Watch();

  // For every thread of the walk, often. Throws Interrupted where the walk is to end.
  void check() {
    if (ends_.load(std::memory_order_relaxed)) throw Interrupted();
    if (answers()) answer();
  }

  // Makes the other threads' next `check` throw.
  void end() { ends_.store(true, std::memory_order_relaxed); }

  // Whether this is the caller's thread and signals are answered in it.
  bool answers() const { return answers_ && std::this_thread::get_id() == caller_; }

 private:
  // Runs the handlers of the signals that have come, unless it did so less than kSignalPeriod ago.
  void answer();

  std::atomic<bool> ends_{false};
  const std::thread::id caller_ = std::this_thread::get_id();
  const bool answers_;
  int64_t answered_;  // in milliseconds
  // The caller's: a walk's own flushes denormal numbers, which Python code must not.
  std::fenv_t environment_;
};

}  // namespace pathnet
