#include "signals.h"

#include <time.h>

// Functions of Python's stable ABI. They are null in a process without Python, where passes answer no signals.
extern "C" {
__attribute__((weak)) int PyGILState_Ensure();
__attribute__((weak)) void PyGILState_Release(int state);
__attribute__((weak)) int PyErr_CheckSignals();
__attribute__((weak)) void PyErr_Fetch(void** type, void** value, void** traceback);
__attribute__((weak)) void PyErr_Restore(void* type, void* value, void* traceback);
__attribute__((weak)) void Py_DecRef(void* object);
__attribute__((weak)) unsigned long PyThread_get_thread_ident();
}

namespace pathnet {
namespace {

// Python's identifier of its main thread; 0 until pathnet/native.py sets it.
std::atomic<unsigned long> main_thread{0};

// A handler's exception, until Python takes it. Only the main thread uses it, and only with the GIL.
struct Exception {
  void *type, *value, *traceback;
};
Exception raised = {nullptr, nullptr, nullptr};

bool in_main_thread() {
  const unsigned long main = main_thread.load(std::memory_order_relaxed);
  return main != 0 && PyThread_get_thread_ident() == main;
}

// A coarse clock, since every step of a pass reads it: a few nanoseconds per call.
int64_t milliseconds() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC_COARSE, &now);
  return int64_t(now.tv_sec) * 1000 + now.tv_nsec / 1000000;
}

void drop_raised() {
  for (void* object : {raised.type, raised.value, raised.traceback}) Py_DecRef(object);
  raised = {nullptr, nullptr, nullptr};
}

// Returns whether a handler has raised; its exception is then in `raised`.
bool run_handlers() {
  const int state = PyGILState_Ensure();
  const bool raises = PyErr_CheckSignals() != 0;
  if (raises) {
    drop_raised();
    PyErr_Fetch(&raised.type, &raised.value, &raised.traceback);
  }
  PyGILState_Release(state);
  return raises;
}

}  // namespace

Watch::Watch() : answers_(in_main_thread()), answered_(milliseconds()) {
  if (!answers_) return;
  std::fegetenv(&environment_);
  if (raised.type == nullptr) return;
  // Left by a pass that was called without pathnet/native.py; its caller got a RuntimeError.
  const int state = PyGILState_Ensure();
  drop_raised();
  PyGILState_Release(state);
}

void Watch::answer() {
  if (milliseconds() - answered_ < kSignalPeriod.count()) return;
  std::fenv_t walks;
  std::fegetenv(&walks);
  std::fesetenv(&environment_);
  const bool raises = run_handlers();
  std::fesetenv(&walks);
  answered_ = milliseconds();
  if (!raises) return;
  end();
  throw Interrupted();
}

}  // namespace pathnet

// For pathnet/native.py, which holds the GIL.
extern "C" {
// Makes the passes of this thread answer signals from now on.
__attribute__((visibility("default"))) void pathnet_answer_signals(unsigned long thread) {
  if (PyThread_get_thread_ident != nullptr) pathnet::main_thread = thread;
}

// Raises the exception that a handler raised during the last pass, if any.
__attribute__((visibility("default"))) void pathnet_raise_interruption() {
  pathnet::Exception& raised = pathnet::raised;
  if (raised.type == nullptr || !pathnet::in_main_thread()) return;
  PyErr_Restore(raised.type, raised.value, raised.traceback);
  raised = {nullptr, nullptr, nullptr};
}
}
