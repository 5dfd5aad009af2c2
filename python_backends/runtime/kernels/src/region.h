// One parallel region of several phases: threads are woken once, however many steps a computation has.
#pragma once

#include <immintrin.h>
#include <sched.h>

#include <atomic>
#include <cstdint>
#include <functional>
#include <vector>

namespace wicore {

// Phases run one after the other; the tasks of a phase are claimed by whichever threads are there. A thread that comes
// late or never delays nobody: the others do its work. Invariant: a phase starts when all tasks of the one before it are
// done, and what they wrote is visible then.
class Region {
 public:
  void add(int64_t tasks, std::function<void(int64_t)> work) { phases_.emplace_back(tasks, std::move(work)); }

  // Whether more than one thread could find work.
  bool parallel() const {
    for (const Phase& phase : phases_) {
      if (phase.tasks > 1) return true;
    }
    return false;
  }

  // Called by every thread that takes part. Returns when all phases are done.
  void run() {
    for (Phase& phase : phases_) {
      for (int64_t task = phase.next++; task < phase.tasks; task = phase.next++) {
        phase.work(task);
        phase.done.fetch_add(1, std::memory_order_release);
      }
      for (int spins = 0; phase.done.load(std::memory_order_acquire) < phase.tasks; ++spins) {
        spins < kSpins ? _mm_pause() : static_cast<void>(sched_yield());
      }
    }
  }

 private:
  // Others finish within a task's time, tens of microseconds, unless they lost their core.
  static constexpr int kSpins = 2000;

  struct Phase {
    Phase(int64_t count, std::function<void(int64_t)> function) : tasks(count), work(std::move(function)) {}
    Phase(Phase&& other) noexcept : tasks(other.tasks), work(std::move(other.work)) {}
    int64_t tasks;
    std::function<void(int64_t)> work;
    alignas(64) std::atomic<int64_t> next{0};
    alignas(64) std::atomic<int64_t> done{0};
  };

  std::vector<Phase> phases_;
};

}  // namespace wicore
