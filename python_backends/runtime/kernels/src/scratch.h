// Memory that a thread keeps between calls.
#pragma once

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
      memory_.reset(static_cast<uint8_t*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64)));
      if (!memory_) throw std::bad_alloc();
      size_ = bytes;
    }
    return memory_.get();
  }

 private:
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
