// Memory that reports races, as a sanitizer would.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace pathnet::cuda {

// Memory of one thread block, watched in words of four bytes: which were written, and which warp accessed each since
// the last barrier. An epoch is the time between two barriers.
class WatchedMemory {
 public:
  // Who accessed a word, if not one warp by its number. Accesses by one and the same of them do not race.
  static constexpr int kNobody = -1, kSeveral = -2, kAtomic = -3, kWholeBlock = -4;

  WatchedMemory(const char* name, size_t bytes) : name_(name), words_(bytes / 4) {}

  // Notes an access by a warp, or by kAtomic or kWholeBlock. Returns what is wrong with it, or null.
  const char* touch(int64_t byte, size_t bytes, bool writes, int warp, int64_t epoch) {
    if (!holds(byte, bytes)) return "access out of bounds";
    const char* wrong = nullptr;
    for (size_t w = size_t(byte) / 4; w <= (size_t(byte) + bytes - 1) / 4; ++w) {
      Word& word = words_[w];
      if (word.epoch != epoch) {
        word.epoch = epoch;
        word.reader = word.writer = kNobody;
      }
      const bool written_elsewhere = word.writer != kNobody && word.writer != warp;
      const bool read_elsewhere = word.reader != kNobody && word.reader != warp;
      if (!word.copied) {
        wrong = writes ? "write over a running copy" : "read of a running copy";
      } else if (writes && word.copies > 0) {
        wrong = "write to what is being copied";
      } else if (!writes && !word.written) {
        wrong = "read of what was never written";
      } else if (written_elsewhere || (writes && read_elsewhere)) {
        wrong = writes ? "race of a write" : "race of a read";
      }
      if (writes) {
        word.writer = warp;
        word.written = true;
      } else {
        word.reader = word.reader == kNobody || word.reader == warp ? warp : kSeveral;
      }
    }
    return wrong;
  }

  // Returns whether an access is within the memory, aligned to its size up to four bytes.
  bool holds(int64_t byte, size_t bytes) const {
    return byte >= 0 && size_t(byte) + bytes <= words_.size() * 4 && byte % int64_t(std::min<size_t>(bytes, 4)) == 0;
  }

  // Begins a copy into words that were touched already.
  void begin_copy_into(int64_t byte, size_t bytes) {
    for (size_t w = size_t(byte) / 4; w < (size_t(byte) + bytes) / 4; ++w) words_[w].copied = false;
  }
  // Ends a copy. Threads other than the copying one may read it only after a barrier.
  void end_copy_into(int64_t byte, size_t bytes, int64_t epoch) {
    for (size_t w = size_t(byte) / 4; w < (size_t(byte) + bytes) / 4; ++w) {
      words_[w].epoch = epoch;
      words_[w].writer = kSeveral;
      words_[w].copied = true;
    }
  }
  // Begins a copy of these words. Nobody may write them while it runs.
  void begin_copy_from(int64_t byte, size_t bytes) {
    for (size_t w = size_t(byte) / 4; w < (size_t(byte) + bytes) / 4; ++w) ++words_[w].copies;
  }
  // Ends a copy of these words. They may be written only after a barrier.
  void end_copy_from(int64_t byte, size_t bytes, int64_t epoch) {
    for (size_t w = size_t(byte) / 4; w < (size_t(byte) + bytes) / 4; ++w) {
      Word& word = words_[w];
      if (word.epoch != epoch) word.writer = kNobody;
      word.epoch = epoch;
      word.reader = kSeveral;
      --word.copies;
    }
  }
  // Declares all contents stale: reading them is an error until they are written again.
  void forget() {
    for (Word& word : words_) word.written = false;
  }

  const char* name() const { return name_; }

 private:
  struct Word {
    int64_t epoch = -1;
    int reader = kNobody, writer = kNobody;
    bool written = false, copied = true;
    int copies = 0;  // running copies that read it
  };

  const char* name_;
  std::vector<Word> words_;
};

}  // namespace pathnet::cuda
