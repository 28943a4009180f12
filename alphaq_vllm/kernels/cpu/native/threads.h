// Work on the threads that OpenMP has already: those that torch computes on and that vLLM has bound to cores.
#pragma once

#include <atomic>
#include <cstdint>
#include <new>

namespace alphaq {

// `run`: GOMP_parallel of the OpenMP library that the process has loaded.
struct Threads {
  void (*run)(void (*)(void*), void*, unsigned, unsigned);
  int32_t count;
};

// Call work(i) for every i below `units`, each on whichever thread is free. Throws std::bad_alloc if one of them did.
template <typename Work>
void parallel(const Threads& threads, int64_t units, Work work) {
  if (units <= 1 || threads.count <= 1) {
    for (int64_t i = 0; i < units; ++i) work(i);
    return;
  }
  struct Shared {
    Work& work;
    int64_t units;
    std::atomic<int64_t> next;
    std::atomic<bool> failed;
  } shared{work, units, {0}, {false}};
  auto part = [](void* data) {
    Shared& shared = *static_cast<Shared*>(data);
    // No exception may leave a thread of OpenMP's.
    try {
      for (int64_t i; (i = shared.next.fetch_add(1, std::memory_order_relaxed)) < shared.units;) shared.work(i);
    } catch (const std::bad_alloc&) {
      shared.failed = true;
    }
  };
  threads.run(part, &shared, units < threads.count ? units : threads.count, 0);
  if (shared.failed) throw std::bad_alloc();
}

}  // namespace alphaq
