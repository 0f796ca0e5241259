// The threads of a block as fibers of one thread of the processor. Each runs until it waits for others. Warps are as
// uneven as they may be: one runs as far as it can before the next one begins, in an order that is another one for
// every block, so that what relies on an order, or lacks a barrier, shows.
#pragma once

#include <sched.h>
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

namespace emulated {

constexpr int kWarp = 32, kMostThreads = 1024;
constexpr size_t kStack = 256 * 1024;
constexpr int kPatience = 1000000;  // times that a block looks in vain at what another one is to write

// Threads that wait for each other; those that have ended are not waited for.
struct Barrier {
  int expected = 0, arrived = 0;
  unsigned round = 0;

  void pass_if_all() {
    if (arrived < expected || arrived == 0) return;
    arrived = 0;
    ++round;
  }
};

// Blocks that run at once; every thread of each arrives.
struct Cluster {
  unsigned expected = 0;
  std::atomic<unsigned> arrived{0}, round{0};
  std::atomic<char*> first{nullptr};  // where the first block's shared memory is
};

struct Fiber {
  std::unique_ptr<char[]> stack{new char[kStack]};
  ucontext_t beginning;
  jmp_buf place;
  bool fresh = true, done = false, polls = false;
  const Barrier* awaits = nullptr;
  unsigned round = 0, cluster_round = 0;
};

class Block {
 public:
  Barrier all;
  Cluster* cluster = nullptr;

  // Runs a kernel in every thread of one block. `enter` is called before a thread runs, with its number.
  void run(int threads, const std::function<void()>& kernel, const std::function<void(int)>& enter) {
    begin(threads, kernel);
    for (int left = threads, idle = 0; left > 0;) {
      polled_ = false;
      const bool moved =
          std::any_of(warp_order_.begin(), warp_order_.end(), [&](int w) { return pass(w, enter, left); });
      if (!moved && (!polled_ || ++idle > kPatience))
        throw std::runtime_error("threads wait for others that never come");
      if (moved)
        idle = 0;
      else
        sched_yield();
    }
  }

  // ---- for the running thread --------------------------------------------------------------------------------------
  void wait(Barrier& barrier) {
    Fiber& me = *fibers_[current_];
    me.awaits = &barrier, me.round = barrier.round;
    ++barrier.arrived;
    barrier.pass_if_all();
    if (barrier.round == me.round) leave();
  }

  // Lets the others run; for a loop that waits for another block.
  void poll() {
    fibers_[current_]->polls = true;
    leave();
  }

  void arrive() {
    if (!cluster) fail("a block without a cluster arrives in one");
    fibers_[current_]->cluster_round = cluster->round;
    if (++cluster->arrived == cluster->expected) {
      cluster->arrived = 0;
      ++cluster->round;
    }
  }

  void wait_for_cluster() {
    while (cluster->round == fibers_[current_]->cluster_round) poll();
  }

  // Every lane of the warp hands over a value; returns what lane `from` of it gave, whichever `from(lane)` says.
  template <class T>
  T exchange(T value, int from) {
    static_assert(sizeof(T) <= sizeof(Slot));
    const int warp = current_ / kWarp;
    Slot* slots = slots_[warps_[warp].round % 2];
    std::memcpy(&slots[current_], &value, sizeof value);
    wait(warps_[warp]);
    std::memcpy(&value, &slots[warp * kWarp + from], sizeof value);
    return value;
  }

  // Bit i: what lane i of the warp says; 0 for one that has ended.
  unsigned ballot(bool says) {
    const int warp = current_ / kWarp;
    const unsigned round = warps_[warp].round;
    unsigned& votes = votes_[warp][round % 2];
    if (warps_[warp].arrived == 0) votes = 0;
    votes |= unsigned(says) << (current_ % kWarp);
    wait(warps_[warp]);
    return votes;
  }

  bool any_of_all(bool says) {
    bool& any = any_[all.round % 2];
    if (all.arrived == 0) any = false;
    any |= says;
    wait(all);
    return any;
  }

  void wait_for_warp() { wait(warps_[current_ / kWarp]); }
  int lane() const { return current_ % kWarp; }

  [[noreturn]] void fail(const std::string& what) {
    error_ = what;
    fibers_[current_]->done = true;
    for (;;) leave();
  }

 private:
  struct Slot {
    alignas(16) char bytes[16];
  };

  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<int> warp_order_, lane_order_;
  std::mt19937 random_{1};
  Barrier warps_[kMostThreads / kWarp];
  Slot slots_[2][kMostThreads];
  unsigned votes_[kMostThreads / kWarp][2];
  bool any_[2];
  int threads_ = 0, current_ = 0;
  bool polled_ = false;  // whether a thread of the last warps waits for another block
  std::string error_;
  const std::function<void()>* kernel_ = nullptr;
  jmp_buf scheduler_;
#ifdef __SANITIZE_ADDRESS__
  ucontext_t scheduler_context_;
#endif

  static Block*& running() {
    static thread_local Block* block = nullptr;
    return block;
  }

  void begin(int threads, const std::function<void()>& kernel) {
    threads_ = threads, kernel_ = &kernel, error_.clear(), all = {threads, 0, 0};
    for (int warp = 0; warp * kWarp < threads; ++warp) warps_[warp] = {std::min(kWarp, threads - warp * kWarp), 0, 0};
    while (int(fibers_.size()) < threads) fibers_.push_back(std::make_unique<Fiber>());
    for (int t = 0; t < threads; ++t) {
      Fiber& fiber = *fibers_[t];
      fiber.fresh = true, fiber.done = false, fiber.awaits = nullptr;
      getcontext(&fiber.beginning);
      fiber.beginning.uc_stack = {fiber.stack.get(), 0, kStack};
      fiber.beginning.uc_link = nullptr;
      makecontext(&fiber.beginning, &Block::live, 0);
    }
    shuffle(warp_order_, (threads + kWarp - 1) / kWarp);
    shuffle(lane_order_, kWarp);
    running() = this;
  }

  void shuffle(std::vector<int>& order, int count) {
    order.resize(count);
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), random_);
  }

  // Lets every lane of a warp that does not wait run on; whether there was one.
  bool pass(int warp, const std::function<void(int)>& enter, int& left) {
    bool moved = false;
    for (const int lane : lane_order_) {
      const int t = warp * kWarp + lane;
      if (t >= threads_) continue;
      Fiber& fiber = *fibers_[t];
      if (fiber.done || (fiber.awaits && fiber.awaits->round == fiber.round)) continue;
      fiber.awaits = nullptr, fiber.polls = false, current_ = t;
      enter(t);
      resume(fiber);
      if (!error_.empty()) throw std::runtime_error(error_);
      (fiber.polls ? polled_ : moved) = true;
      left -= fiber.done;
    }
    return moved;
  }

  static void live() {
    Block& block = *running();
    (*block.kernel_)();
    const int me = block.current_;
    block.fibers_[me]->done = true;
    for (Barrier* barrier : {&block.all, &block.warps_[me / kWarp]}) {
      --barrier->expected;
      barrier->pass_if_all();
    }
    for (;;) block.leave();
  }

  // A jump saves no mask of signals, which a switch of contexts asks the system for; but AddressSanitizer needs those.
#ifdef __SANITIZE_ADDRESS__
  void resume(Fiber& fiber) { swapcontext(&scheduler_context_, &fiber.beginning); }
  void leave() { swapcontext(&fibers_[current_]->beginning, &scheduler_context_); }
#else
  void resume(Fiber& fiber) {
    if (_setjmp(scheduler_)) return;
    if (!fiber.fresh) _longjmp(fiber.place, 1);
    fiber.fresh = false;
    setcontext(&fiber.beginning);
  }

  void leave() {
    if (!_setjmp(fibers_[current_]->place)) _longjmp(scheduler_, 1);
  }
#endif
};

inline Block& block() {
  static thread_local Block own;
  return own;
}

// Of the thread of the processor that runs a block: shared memory lies at the same distance from it in each.
inline thread_local char anchor = 0;

}  // namespace emulated
