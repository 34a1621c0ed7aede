// The threads of torch at work on one pass.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>

#include "../signals.h"
#include "kernels.h"

namespace pathnet::cpu {

// As many threads as torch uses, on one pass, which a signal may end.
class Threads {
 public:
  Team team() {
    return {count_, [this](const std::function<void(int)>& work) { run(work); }, [this] { watch_.check(); }};
  }

 private:
  void run(const std::function<void(int)>& work) {
    running_ = count_;
    torch::stable::parallel_for(0, count_, 1, [&](int64_t begin, int64_t end) {
      keep([&] {
        for (int64_t worker = begin; worker < end; ++worker) work(int(worker));
      });
      leave(int(end - begin));
      // The caller's thread alone answers signals, even while other threads still work.
      if (watch_.answers()) keep([&] { wait(); });
    });
    if (thrown_) std::rethrow_exception(thrown_);
  }

  // Keeps the first exception of any thread, and ends the pass. Torch would not pass the cause on.
  template <class Work>
  void keep(const Work& work) {
    try {
      work();
    } catch (...) {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (!thrown_) thrown_ = std::current_exception();
      watch_.end();
    }
  }

  void leave(int workers) {
    if ((running_ -= workers) > 0) return;
    const std::lock_guard<std::mutex> lock(mutex_);
    all_done_.notify_one();
  }

  void wait() {
    const auto done = [&] { return running_ == 0; };
    // Usually the other threads finish within this time, which sleeping and waking up would take too.
    for (const auto until = std::chrono::steady_clock::now() + kSpin; std::chrono::steady_clock::now() < until;) {
      if (done()) return;
      std::this_thread::yield();
    }
    for (std::unique_lock<std::mutex> lock(mutex_); !all_done_.wait_for(lock, kSignalPeriod, done);) {
      lock.unlock();
      watch_.check();
      lock.lock();
    }
  }

  static constexpr std::chrono::microseconds kSpin{200};

  const int count_ = int(torch::stable::get_num_threads());
  Watch watch_;
  std::atomic<int> running_{0};
  std::mutex mutex_;
  std::condition_variable all_done_;
  std::exception_ptr thrown_;
};

}  // namespace pathnet::cpu
