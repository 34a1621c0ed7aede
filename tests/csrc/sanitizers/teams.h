// The threads of a walk, which may end it half way, as a signal would.
#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#include "cpu/kernels.h"

namespace trial {

// Thrown out of a walk that is ended half way.
struct Ended {};

// Threads whose walk ends at the check of this number, counted from 1 over all threads.
inline pathnet::cpu::Team team_of(int threads, int64_t last_check = INT64_MAX) {
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
    std::vector<std::thread> helpers;
    for (int worker = 1; worker < threads; ++worker) helpers.emplace_back(guarded, worker);
    guarded(0);
    for (std::thread& helper : helpers) helper.join();
    if (ended) throw Ended();
  };
  return {threads, run, [checks, last_check] {
            if (++*checks >= last_check) throw Ended();
          }};
}

}  // namespace trial
