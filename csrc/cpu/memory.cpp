#include "memory.h"

#include <sys/mman.h>

#include <cstdint>
#include <mutex>
#include <new>
#include <unordered_map>
#include <vector>

namespace pathnet::cpu {
namespace {

constexpr size_t kPage = 4096;
constexpr size_t kLine = 64;

struct Mapping {
  void* begin;
  size_t bytes;
};

class Memory {
 public:
  void* take(size_t bytes) {
    // Pages begin at equal places of the cache's sets, so buffers begin at different lines of their first page.
    bytes = (bytes + 2 * kPage - 1) / kPage * kPage;
    const std::lock_guard<std::mutex> lock(mutex_);
    Mapping mapping = {nullptr, bytes};
    std::vector<void*>& waiting = waiting_[bytes];
    if (!waiting.empty()) {
      mapping.begin = waiting.back();
      waiting.pop_back();
    } else {
      mapping.begin = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      if (mapping.begin == MAP_FAILED) throw std::bad_alloc();
    }
    constexpr size_t kStep = 11 * kLine;
    void* memory = static_cast<char*>(mapping.begin) + taken_++ * kStep % kPage;
    mappings_.emplace(memory, mapping);
    return memory;
  }

  void give_back(void* memory) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = mappings_.find(memory);
    const Mapping mapping = found->second;
    mappings_.erase(found);
    madvise(mapping.begin, mapping.bytes, MADV_FREE);
    waiting_[mapping.bytes].push_back(mapping.begin);
  }

 private:
  std::mutex mutex_;
  std::unordered_map<void*, Mapping> mappings_;
  std::unordered_map<size_t, std::vector<void*>> waiting_;  // by their bytes
  size_t taken_ = 0;
};

Memory& memory() {
  // Never destroyed: tensors may outlive static objects.
  static Memory* const memory = new Memory;
  return *memory;
}

}  // namespace

void* take_memory(size_t bytes) { return memory().take(bytes); }

void give_memory_back(void* data) { memory().give_back(data); }

}  // namespace pathnet::cpu
