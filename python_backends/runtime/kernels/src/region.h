// One parallel region of several phases: threads are woken once, however many steps a computation has.
#pragma once

#include <immintrin.h>
#include <sched.h>

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

namespace wicore {

// Phases run one after the other. The tasks of a phase are cut into one range per thread, so that a thread reads
// neighbouring weights; who has finished its own range helps with the others, so that a thread that comes late or never
// delays nobody. Invariant: a phase starts when all tasks of the one before it are done, and what they wrote is visible
// then.
class Region {
 public:
  explicit Region(int threads) : threads_(threads) {}

  void add(int64_t tasks, std::function<void(int64_t)> work) {
    phases_.push_back(std::make_unique<Phase>(tasks, threads_, std::move(work)));
  }

  // Whether more than one thread could find work.
  bool parallel() const {
    for (const auto& phase : phases_) {
      if (phase->tasks > 1) return threads_ > 1;
    }
    return false;
  }

  int threads() const { return threads_; }

  // Called by every thread that takes part, at most `threads` of them. Returns when all phases are done.
  void run() {
    const int self = entered_.fetch_add(1, std::memory_order_relaxed);
    for (const auto& phase : phases_) {
      for (int i = 0; i < threads_; ++i) phase->work_through((self + i) % threads_);
      for (int spins = 0; phase->done.load(std::memory_order_acquire) < phase->tasks; ++spins) {
        spins < kSpins ? _mm_pause() : static_cast<void>(sched_yield());
      }
    }
  }

 private:
  // Others finish within a task's time, some microseconds, unless they lost their core.
  static constexpr int kSpins = 2000;

  struct alignas(64) Range {
    std::atomic<int64_t> next{0};
    int64_t end = 0;
  };

  struct Phase {
    Phase(int64_t count, int threads, std::function<void(int64_t)> function)
        : tasks(count), work(std::move(function)), ranges(threads) {
      for (int64_t i = 0; i < threads; ++i) {
        ranges[i].next = count * i / threads;
        ranges[i].end = count * (i + 1) / threads;
      }
    }

    void work_through(int index) {
      Range& range = ranges[index];
      int64_t finished = 0;
      for (int64_t task = range.next++; task < range.end; task = range.next++, ++finished) work(task);
      if (finished) done.fetch_add(finished, std::memory_order_release);
    }

    int64_t tasks;
    std::function<void(int64_t)> work;
    std::vector<Range> ranges;
    alignas(64) std::atomic<int64_t> done{0};
  };

  int threads_;
  std::atomic<int> entered_{0};
  std::vector<std::unique_ptr<Phase>> phases_;
};

}  // namespace wicore
