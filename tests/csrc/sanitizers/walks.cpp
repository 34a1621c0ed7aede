// Tries the cpu kernels on random networks, and on random blocks in training, for runs under a sanitizer: every pass,
// precision and instruction set of this processor, on one thread and on several, judged by plain loops. Without torch
// and Python, whose memory and threads a sanitizer would have to take on trust.
//
//   walks [trials] [first seed]
//
// Exit status 1, and one line that says where, at the first walk that gives a wrong result.

#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "network.h"
#include "report.h"
#include "training.h"

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#include <sanitizer/common_interface_defs.h>
#endif

// Fresh memory is made of NaNs, so a kernel that reads what it has not written gives one.
extern "C" const char* __asan_default_options() {
  return "detect_leaks=1:detect_stack_use_after_return=1:max_malloc_fill_size=1073741824:malloc_fill_byte=255";
}
extern "C" const char* __ubsan_default_options() { return "print_stacktrace=1"; }
extern "C" const char* __tsan_default_options() { return "halt_on_error=1"; }

int main(int count, char** arguments) {
  using namespace pathnet::cpu;
  const int trials = count > 1 ? std::atoi(arguments[1]) : 100;
  const int first = count > 2 ? std::atoi(arguments[2]) : 0;
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  __sanitizer_set_death_callback(trial::report_place);
#endif
  trial::AllCounts counts;
  trial::AllPassCounts pass_counts;
  const std::vector<Isa> isas = supported_isas();
  for (int seed = first; seed < first + trials; ++seed) {
    trial::Network network(seed, counts);
    for (Isa isa : isas) {
      const Kernels float32 = kernels_of(isa, false);
      network.try_kernels(isa, false, nullptr);
      // Where both precisions are one code, it has been tried.
      network.try_kernels(isa, true, &float32);
    }
    for (bool bf16 : {false, true}) {
      trial::Training training(seed, bf16, pass_counts);
      for (Isa isa : isas) training.try_kernels(isa);
    }
  }
  std::string names;
  for (Isa isa : isas) names += std::string(" ") + isa_name(isa);
  std::printf("walks: %d networks on%s\n", trials, names.c_str());
  const char* walks[trial::kKinds] = {"backward_running", "sums_by_length_running", "forward_running",
                                      "backward_batch",   "sums_by_length_batch",   "forward_batch"};
  for (int kind = 0; kind < trial::kKinds; ++kind) {
    std::printf("  %-22s %6d walks, largest error %.1e of the norm\n", walks[kind], counts[kind].walks,
                counts[kind].worst);
  }
  const char* passes[trial::kPasses] = {"train_forward", "train_backward", "train_forward bf16",
                                        "train_backward bf16"};
  for (int pass = 0; pass < trial::kPasses; ++pass) {
    std::printf("  %-22s %6d passes, largest error %.2f of the allowed one\n", passes[pass], pass_counts[pass].passes,
                pass_counts[pass].worst);
  }
  return 0;
}
