// Memory of many megabytes: in pages of 2 MB where the system gives them, since with 4 KB each stretch of a batch
// costs a walk through the page tables, and its first touch a fault.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace pathnet {

// To be called before the memory is touched; a wish, whose refusal changes nothing.
inline void prefer_huge_pages(void* memory, size_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t kPage = uintptr_t(2) << 20;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(memory);
  const uintptr_t first = (begin + kPage - 1) / kPage * kPage, last = (begin + bytes) / kPage * kPage;
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)memory;
  (void)bytes;
#endif
}

struct FreeAligned {
  void operator()(float* values) const { ::operator delete(values, std::align_val_t(64)); }
};
using Large = std::unique_ptr<float, FreeAligned>;

inline Large make_large(size_t count) {
  const size_t bytes = count * sizeof(float);
  Large made(static_cast<float*>(::operator new(bytes, std::align_val_t(64))));
  prefer_huge_pages(made.get(), bytes);
  return made;
}

}  // namespace pathnet
