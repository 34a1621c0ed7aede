// Where the program is, for the line that it prints when something is wrong.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <string>

namespace trial {

inline std::string doing;

inline void report_place() { std::fprintf(stderr, "walks: in %s\n", doing.c_str()); }

[[noreturn]] inline void fail(const std::string& fault) {
  std::printf("walks: %s: %s\n", doing.c_str(), fault.c_str());
  std::exit(1);
}

template <class... Numbers>
std::string text(const char* format, Numbers... numbers) {
  char line[200];
  std::snprintf(line, sizeof(line), format, numbers...);
  return line;
}

}  // namespace trial
