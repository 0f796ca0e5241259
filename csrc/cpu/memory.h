// Advice to the system about memory that a kernel is about to fill.
#pragma once

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace v05::cpu {

// Asks for large pages under a large output that is about to be written: fresh memory comes a page fault at a time, and
// with small pages those faults take longer than writing a gradient does. Only advice: contents and results are the
// same.
inline void prefer_large_pages(void* begin, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kLargePage = uintptr_t(1) << 21;
  uintptr_t first = (reinterpret_cast<uintptr_t>(begin) + kLargePage - 1) & ~(kLargePage - 1);
  uintptr_t last = (reinterpret_cast<uintptr_t>(begin) + static_cast<uintptr_t>(bytes)) & ~(kLargePage - 1);
  if (last >= first + 8 * kLargePage) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)begin, (void)bytes;
#endif
}

}  // namespace v05::cpu
