// Independent tasks on the threads that XLA computes with.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>

#include "xla/ffi/api/ffi.h"

namespace dynmoe {

constexpr int64_t kTasksOfThread = 4;  // at least, so that all threads end at about the same time

// Calls task(i) for all i below count, and returns when all are done.
//
// The caller works too.  It waits for threads that are at work on a task alone, never for one that
// the pool has yet to provide: all of the pool may be waiting like this.
template <typename Task>
void for_each_task(xla::ffi::ThreadPool& pool, int64_t count, const Task& task) {
  struct State {
    const Task* task;
    int64_t count;
    std::atomic<int64_t> next{0}, done{0};

    void work() {
      for (int64_t i; (i = next.fetch_add(1)) < count;) {
        (*task)(i);
        if (done.fetch_add(1) + 1 == count) done.notify_all();
      }
    }
  };
  auto state = std::make_shared<State>();
  state->task = &task;
  state->count = count;
  const int64_t helpers = std::min(count, pool.num_threads()) - 1;
  for (int64_t i = 0; i < helpers; i++) pool.Schedule([state] { state->work(); });
  state->work();
  for (int64_t done; (done = state->done.load()) < count;) state->done.wait(done);
}

}  // namespace dynmoe
