// Memory for a whole batch, aligned to a line of the cache and not set to zero.
//
// In the system's plain pages: those of 2 MB made no pass faster, and where memory is in pieces the system gathers
// them on first touch, which took up to a second for what one recorded batch keeps.
#pragma once

#include <cstddef>
#include <memory>
#include <new>

namespace pathnet::cpu {

struct FreeAligned {
  void operator()(float* values) const { ::operator delete(values, std::align_val_t(64)); }
};
using Large = std::unique_ptr<float, FreeAligned>;

inline Large make_large(size_t count) {
  return Large(static_cast<float*>(::operator new(count * sizeof(float), std::align_val_t(64))));
}

}  // namespace pathnet::cpu
