// Threads for work that is worth them. Every item is computed by one thread in one order, so results never depend on
// how many threads there are.
#pragma once

#ifdef _OPENMP
#include <omp.h>
#endif

#include <algorithm>
#include <cstdint>
#include <exception>

namespace v05::cpu {

// Calls body(begin, end) over [0, items), cut into one contiguous piece per thread where `work` elements pay for
// threads, and the compiler has OpenMP. What a body throws, such as std::bad_alloc, is thrown here again: leaving a
// region, it would end the process.
template <class Body>
void parallel_for(int64_t items, int64_t work, int64_t work_per_thread, const Body& body) {
#ifndef _OPENMP
  if (items > 0) body(int64_t(0), items);
#else
  int64_t wanted = std::min<int64_t>({items, work / work_per_thread, omp_get_max_threads()});
  if (wanted <= 1 || omp_in_parallel()) {
    if (items > 0) body(int64_t(0), items);
    return;
  }
  std::exception_ptr thrown;
#pragma omp parallel num_threads(static_cast<int>(wanted))
  {
    int64_t threads = omp_get_num_threads(), i = omp_get_thread_num();
    int64_t begin = items * i / threads, end = items * (i + 1) / threads;
    try {
      if (begin < end) body(begin, end);
    } catch (...) {
#pragma omp critical
      thrown = std::current_exception();
    }
  }
  if (thrown) std::rethrow_exception(thrown);
#endif
}

}  // namespace v05::cpu
