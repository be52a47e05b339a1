// Rings of shared-memory buffers between one producing thread and the consuming warpgroups, and ordered turns.
//
// Each buffer has a "full" barrier (one arrival: the producer's, with the bytes that the copy engine will bring) and an
// "empty" one (one arrival per consuming warpgroup). A barrier's phase flips with every completion; a fresh barrier is
// in phase 0, so waiting for phase parity 1 passes at once: the producer starts with parity 1, the consumers with 0,
// and both flip theirs when they wrap around.
#pragma once

#include "attention/device.h"

namespace genrec::attention {

// One lane of a warp arrives for all. compute-sanitizer's racecheck does not follow that: built with
// -DGENREC_ATTENTION_RACECHECK=ON, each lane arrives for itself.
#if defined(GENREC_EVERY_LANE_ARRIVES)
constexpr int kArrivalsPerWarp = 32;
#else
constexpr int kArrivalsPerWarp = 1;
#endif

template <int kStages>
struct Ring {
  FullBarrier full[kStages];
  EmptyBarrier empty[kStages];

  // Consumers are warps, which `release`; producers are single threads, or warps that `release` as well.
  __device__ void init(int consumers, int producers = 1) {
    for (int s = 0; s < kStages; ++s) {
      full[s].init(producers);
      empty[s].init(consumers * kArrivalsPerWarp);
    }
  }
  __device__ void init_between_warps(int consumers, int producers = 1) { init(consumers, producers * kArrivalsPerWarp); }
};

// A place in a ring. `kStart`: parity of the first wait, 1 for the producer, 0 for a consumer.
template <int kStages>
struct Place {
  int stage = 0;
  uint32_t parity;

  __device__ explicit Place(uint32_t start) : parity(start) {}

  __device__ void next() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// One thread of a warpgroup speaks for all 128. The warpgroup's own wgmma instructions must have completed in every
// warp before the buffer is given back, so each of the four warps arrives.
constexpr int kArrivalsPerWarpgroup = 4;

template <class Barrier>
__device__ inline void release(const Barrier& empty) {
  sync_warp();
  if (threadIdx.x % 32 < kArrivalsPerWarp) empty.arrive();
}

// Gives back a buffer that the warp's loads have read: `bits`, some of what each load brought. Such loads stand in one queue
// with matrix products, and arrivals overtake them: the buffer would be filled anew before it is read. This arrival needs the
// bits first.
template <class Barrier>
__device__ inline void release_read(const Barrier& empty, uint32_t bits) {
  release((&empty)[bits & unknown_zero()]);
}

// A single thread that counts as a warp. What it read before has been read: the compiler would move that behind.
__device__ inline void arrive_as_warp(const EmptyBarrier& empty) {
  keep_accesses();
  for (int n = 0; n < kArrivalsPerWarp; ++n) empty.arrive();
}

// Consumer warpgroups issue their matrix products in turn: while one has the tensor cores, the others compute SiLU.
// Turn w is the named barrier kFirstTurn + w; 128 threads wait for it, the 128 of the warpgroup before arrive.
constexpr uint32_t kFirstTurn = 1, kDsWritten = 5, kDsRead = 6, kTurnTaken = 7;

template <int kWarpgroups>
struct Turns {
  int own;

  __device__ explicit Turns(int warpgroup) : own(warpgroup) {
    if (kWarpgroups > 1 && own == kWarpgroups - 1) pass();
  }
  __device__ void wait() const {
    if (kWarpgroups > 1) sync_threads(kFirstTurn + own, 256);
  }
  __device__ void pass() const {
    if (kWarpgroups > 1) arrive_threads(kFirstTurn + (own + 1) % kWarpgroups, 256);
  }
  // The first warpgroup takes the last turn that was passed, so that no arrival is left over.
  __device__ void finish() const {
    if (own == 0) wait();
  }
};

}  // namespace genrec::attention
