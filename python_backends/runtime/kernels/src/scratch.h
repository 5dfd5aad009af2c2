// Memory that a thread keeps between calls.
#pragma once

#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace wicore {

class Scratch {
 public:
  // At least `bytes` bytes, 64-byte aligned, of undefined content; the last call's memory may be gone.
  uint8_t* at_least(int64_t bytes) {
    if (bytes > size_) {
      memory_.reset();
      size_ = 0;
      const int64_t unit = bytes < kHugePage ? 64 : kHugePage;
      const int64_t rounded = (bytes + unit - 1) / unit * unit;
      memory_.reset(static_cast<uint8_t*>(std::aligned_alloc(unit, rounded)));
      if (!memory_) throw std::bad_alloc();
      if (unit == kHugePage) madvise(memory_.get(), rounded, MADV_HUGEPAGE);
      size_ = bytes;
    }
    return memory_.get();
  }

 private:
  static constexpr int64_t kHugePage = 1 << 21;

  struct Free {
    void operator()(uint8_t* memory) const { std::free(memory); }
  };
  std::unique_ptr<uint8_t, Free> memory_;
  int64_t size_ = 0;
};

// For the thread that computes a node: what all of its tasks share.
inline Scratch& node_scratch() {
  thread_local Scratch scratch;
  return scratch;
}

// For one task.
inline Scratch& task_scratch() {
  thread_local Scratch scratch;
  return scratch;
}

}  // namespace wicore
