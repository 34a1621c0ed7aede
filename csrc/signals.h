// Lets a signal end a pass early: Ctrl-C must not wait for hours of work in one call.
//
// Python runs a signal's handler in its main thread, between two instructions of Python code: not while that thread
// is inside a pass. So a pass in the main thread takes the GIL from time to time, and runs the handlers of pending
// signals. If one raises, the pass ends, and pathnet/native.py raises the handler's exception.
#pragma once

#include <atomic>
#include <cfenv>
#include <chrono>
#include <stdexcept>
#include <thread>

namespace pathnet {

// Longest time that a signal waits. Taking the GIL from a thread that runs Python code takes up to 5 ms.
constexpr std::chrono::milliseconds kSignalPeriod(100);

// Thrown out of a pass by its threads, whose results are then incomplete.
struct Interrupted : std::runtime_error {
  Interrupted() : std::runtime_error("interrupted by a signal") {}
};

// Watches for signals during one pass; constructed by the thread that calls it.
class Watch {
 public:
  Watch();

  // Every thread of the pass calls it often. Throws Interrupted to end the pass.
  void check() {
    if (ends_.load(std::memory_order_relaxed)) throw Interrupted();
    if (answers()) answer();
  }

  // Has the next `check` of every thread throw.
  void end() { ends_.store(true, std::memory_order_relaxed); }

  // Whether this is the caller's thread and signals are answered in it.
  bool answers() const { return answers_ && std::this_thread::get_id() == caller_; }

 private:
  // Runs the handlers of pending signals, unless it did so less than kSignalPeriod ago.
  void answer();

  std::atomic<bool> ends_{false};
  const std::thread::id caller_ = std::this_thread::get_id();
  const bool answers_;
  int64_t answered_;  // in milliseconds
  // The caller's floating-point environment: a pass flushes denormal numbers, which Python code must not.
  std::fenv_t environment_;
};

}  // namespace pathnet
