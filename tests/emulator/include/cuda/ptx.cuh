// The functions of csrc/cuda/ptx.cuh on the processor.
#pragma once

#include <cuda_runtime.h>

namespace v05::cuda {

inline float power_of_2(float x) {
  const float y = exp2f(x);
  return y < 1.17549435e-38f ? 0.0f : y;
}
inline float larger_or_nan(float x, float other) { return x < other ? other : x; }

inline void prefetch(const void*) {}

// Copies are late: what was begun is there only once it was waited for.
struct Copies {
  struct Copy {
    void* to;
    char bytes[16];
    int size;
  };
  std::vector<std::vector<Copy>> batches{{}};
};

inline Copies& copies_of_thread() {
  static thread_local std::vector<Copies> all(emulated::kMostThreads);
  return all[threadIdx.x];
}

template <int kBytes>
void copy_async(void* shared, const void* values) {
  if ((reinterpret_cast<uintptr_t>(shared) | reinterpret_cast<uintptr_t>(values)) % kBytes)
    emulated::block().fail("copy_async: an address is not a multiple of its bytes");
  Copies::Copy copy{shared, {}, kBytes};
  std::memcpy(copy.bytes, values, kBytes);
  copies_of_thread().batches.back().push_back(copy);
}

inline void commit_copies() { copies_of_thread().batches.emplace_back(); }

template <int kPending>
void wait_for_copies() {
  auto& batches = copies_of_thread().batches;  // the last one is not committed
  while (batches.size() > kPending + 1) {
    for (const Copies::Copy& copy : batches.front()) std::memcpy(copy.to, copy.bytes, copy.size);
    batches.erase(batches.begin());
  }
}

using Word = unsigned long long;
inline void post_word(Word* at, Word word) { __atomic_store_n(at, word, __ATOMIC_RELAXED); }
inline Word read_word(const Word* at) {
  emulated::block().poll();
  return __atomic_load_n(at, __ATOMIC_RELAXED);
}

inline void allow_next_launch() {}
inline void wait_for_last_launch() {}

inline void arrive_in_cluster() { emulated::block().arrive(); }
inline void wait_for_cluster() { emulated::block().wait_for_cluster(); }

// Shared memory lies at the same distance from the anchor of every block.
inline void store_in_first_block(double* shared, double value) {
  char* first = emulated::block().cluster->first;
  *reinterpret_cast<double*>(first + (reinterpret_cast<char*>(shared) - &emulated::anchor)) = value;
}

}  // namespace v05::cuda
