// Sums over the blocks of a grid that runs as a whole, in a fixed order: each block posts its own, every block reads
// all. A number lies in one word with the round it belongs to, so that a reader needs no other sign that it is there.
#pragma once

#include <cstring>

#include "cuda/ptx.cuh"
#include "cuda/reduce.cuh"

namespace v05::cuda {

constexpr int kMostBlocks = kWarp;  // a lane reads what a block says
constexpr int kPosted = 8;          // numbers of a block in a round
constexpr int kLanesEach = kWarp / kPosted;

// For one warp of each of at most kMostBlocks blocks. Rounds count from 1. A block that posts for a round has read the
// last one, hence two sets of words suffice, all 0 before the first round.
template <class T>
struct Mailbox {
  static constexpr int kParts = sizeof(T) / sizeof(unsigned);  // words of a number
  static constexpr int kOfBlock = kPosted * kParts;
  static constexpr int kWords = 2 * kMostBlocks * kOfBlock;

  Word* words;

  // The sum of number `threadIdx.x % kWarp / kLanesEach`, of which every such lane has the block's.
  __device__ T sum(T own, unsigned round) const {
    const int lane = threadIdx.x % kWarp;
    Word* set = words + (round % 2) * kMostBlocks * kOfBlock;
    if (lane % kLanesEach < kParts) {
      unsigned parts[kParts];
      std::memcpy(parts, &own, sizeof own);
      const unsigned part = lane % kLanesEach ? parts[kParts - 1] : parts[0];
      post_word(set + blockIdx.x * kOfBlock + lane / kLanesEach * kParts + lane % kLanesEach, Word(round) << 32 | part);
    }
    T numbers[kPosted] = {};
    if (lane < gridDim.x) read(set + lane * kOfBlock, round, numbers);
    return warp_sums(numbers);
  }

 private:
  __device__ static void read(const Word* at, unsigned round, T (&numbers)[kPosted]) {
    Word read[kOfBlock];
    for (bool complete = false; !complete;) {
      complete = true;
#pragma unroll
      for (int i = 0; i < kOfBlock; ++i) read[i] = read_word(at + i);
#pragma unroll
      for (int i = 0; i < kOfBlock; ++i) complete = complete && unsigned(read[i] >> 32) == round;
    }
#pragma unroll
    for (int i = 0; i < kPosted; ++i) {
      unsigned parts[kParts];
#pragma unroll
      for (int part = 0; part < kParts; ++part) parts[part] = unsigned(read[i * kParts + part]);
      std::memcpy(&numbers[i], parts, sizeof(T));
    }
  }
};

}  // namespace v05::cuda
