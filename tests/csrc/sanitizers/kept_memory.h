// Tries the memory that training keeps, from several threads at once.
#pragma once

#include <cstdint>

namespace trial {

// Each thread takes blocks of random sizes, fills them, and gives them back, all in random order; none may share a
// byte with another's.
void try_kept_memory(uint64_t seed);

}  // namespace trial
