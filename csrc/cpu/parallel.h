// Threads for work that is worth them. Every item is computed by one thread in one order, so results never depend on
// how many threads there are.
#pragma once

#include <omp.h>

#include <algorithm>
#include <cstdint>

namespace v05::cpu {

// Calls body(begin, end) over [0, items), cut into one contiguous piece per thread where `work` elements pay for
// threads.
template <class Body>
void parallel_for(int64_t items, int64_t work, int64_t work_per_thread, const Body& body) {
  int64_t wanted = std::min<int64_t>({items, work / work_per_thread, omp_get_max_threads()});
  if (wanted <= 1 || omp_in_parallel()) {
    if (items > 0) body(int64_t(0), items);
    return;
  }
#pragma omp parallel num_threads(static_cast<int>(wanted))
  {
    int64_t threads = omp_get_num_threads(), i = omp_get_thread_num();
    int64_t begin = items * i / threads, end = items * (i + 1) / threads;
    if (begin < end) body(begin, end);
  }
}

}  // namespace v05::cpu
