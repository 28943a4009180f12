// Work on the threads that OpenMP has already: those that torch computes on and that vLLM has bound to cores.
#pragma once

#include <atomic>
#include <cstdint>

namespace alphaq {

// `run`: GOMP_parallel of the OpenMP library that the process has loaded.
struct Threads {
  void (*run)(void (*)(void*), void*, unsigned, unsigned);
  int32_t count;
};

// Call work(i) for every i below `units`, each on whichever thread is free.
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
  } shared{work, units, {0}};
  auto part = [](void* data) {
    Shared& shared = *static_cast<Shared*>(data);
    for (int64_t i; (i = shared.next.fetch_add(1, std::memory_order_relaxed)) < shared.units;) shared.work(i);
  };
  threads.run(part, &shared, units < threads.count ? units : threads.count, 0);
}

}  // namespace alphaq
