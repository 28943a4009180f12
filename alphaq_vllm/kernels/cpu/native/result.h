// What the functions of the library return.
#pragma once

#include <new>

namespace alphaq {

enum Result { DONE, UNKNOWN_EXPERT, OUT_OF_MEMORY };

// What `work` returns, for callers that know no exceptions.
template <typename Work>
Result result_of(Work work) {
  try {
    return work();
  } catch (const std::bad_alloc&) {
    return OUT_OF_MEMORY;
  }
}

}  // namespace alphaq
