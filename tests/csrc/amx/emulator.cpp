// AMX in software, for tests on processors without it: a library to preload (LD_PRELOAD). It decodes and executes
// every tile instruction that the processor refuses with SIGILL, and lets the program continue after it.
//
// A signal takes ten microseconds, fifty times longer than its instruction. So each place in the program raises at
// most one: after that a jump stands there, to a detour that calls the emulator. Each thread has its own eight tiles
// and its own configuration.
#include <dlfcn.h>
#include <signal.h>
#include <ucontext.h>

#include <atomic>
#include <cstdint>
#include <cstring>

#include "detours.h"
#include "tiles.h"

namespace {

using Sigaction = int (*)(int, const struct sigaction*, struct sigaction*);

Sigaction system_sigaction() {
  static const Sigaction original = reinterpret_cast<Sigaction>(dlsym(RTLD_NEXT, "sigaction"));
  return original;
}

struct sigaction displaced;  // the program's own action at SIGILL
std::atomic<bool> given_up;

void on_illegal_instruction(int number, siginfo_t* info, void* context) {
  const greg_t* registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  const bool sent = info->si_code <= 0;  // by kill or raise, not by an instruction
  if (!sent && amx::take_over(uint64_t(registers[REG_RIP]))) return;
  given_up = true;
  system_sigaction()(SIGILL, &displaced, nullptr);
  if (sent) raise(number);
}

__attribute__((constructor)) void install() {
  struct sigaction action = {};
  action.sa_sigaction = on_illegal_instruction;
  action.sa_flags = SA_SIGINFO | SA_NODEFER;
  system_sigaction()(SIGILL, &action, &displaced);
}

}  // namespace

#define EXPORTED extern "C" __attribute__((visibility("default")))

// Python's faulthandler, which pytest switches on, also handles SIGILL. It gets the signals that the emulator cannot
// handle.
EXPORTED int sigaction(int number, const struct sigaction* action, struct sigaction* old) noexcept {
  if (number != SIGILL || given_up) return system_sigaction()(number, action, old);
  const struct sigaction before = displaced;
  if (action != nullptr) displaced = *action;
  if (old != nullptr) *old = before;
  return 0;
}

EXPORTED bool pathnet_amx_emulated() { return true; }

// Returns the number of executed instructions of a name, 0 for an unknown name.
EXPORTED uint64_t pathnet_amx_count(const char* name) {
  for (int kind = 0; kind < amx::kKinds; ++kind) {
    if (std::strcmp(name, amx::kNames[kind]) == 0) return amx::executed(amx::Kind(kind));
  }
  return 0;
}

EXPORTED uint64_t pathnet_amx_executed() { return amx::executed(amx::kTdpbf16ps); }
