// Gradients of the relative bias's tables, summed beside the products by warps that have nothing else to do.
//
// The gradient dS of a tile's scores lies in shared memory, (queries, keys) in 16 bits, for dQ = dS K; these warps read it
// there, 64 x 64 pairs at a time (bias_blocks.h), and the consumers pay for no more than a barrier.
#pragma once

#include "attention/bias.h"
#include "attention/bias_blocks.h"
#include "attention/launch.h"

namespace genrec::attention {

// A step of the backward kernel: a tile of keys and one of queries. Written by the warp that prepares its bias.
struct BiasStep {
  TileRecord tile;  // of keys
  int unit;         // counts the tiles of keys; -1: there are no more steps
  int m;            // number of the query tile
  bool masked;      // whether some pairs are hidden
};

// How the warps share the work. Teams of up to two take turns by steps. Each warp of a team has 64 of the keys; or, where
// there is room for one copy of their memory only, one has the position table and the other the time table.
template <int kWarps, bool kSplitTables>
struct GradientTeams {
  static constexpr int kTeam = kWarps < 2 ? 1 : 2, kTeams = kWarps < 2 ? 1 : kWarps / kTeam;
  static constexpr int kCopies = kSplitTables ? 1 : kWarps;
  static constexpr int kBlocks = kSplitTables ? 2 : 1;  // of 64 keys for one warp, of the tile's 128
};

template <int kCopies, int kBlocks, int kBuffers>
struct GradientMemory {
  BlockMemory blocks[kCopies];
  int64_t times[kCopies][64 * kBlocks];  // of the warp's keys
  Ring<kBuffers> ds_ring;
};

template <class Shape>
struct BiasGradientWarp : BlockSums<Shape> {
  using Base = BlockSums<Shape>;
  using Base::p, Base::warp, Base::lane, Base::sums_time;
  using Teams = typename Shape::Teams;
  static constexpr int kKeys = Shape::kKeys;
  static constexpr bool kSplit = Shape::kSplitTables;
  static constexpr int kBlocks = Teams::kBlocks;
  static_assert(64 * kBlocks * (kSplit ? 1 : Teams::kTeam) == kKeys, "keys that no warp has");

  typename Shape::Shared& shared;
  int64_t (&times)[64 * kBlocks];

  __device__ BiasGradientWarp(const typename Shape::Params& params, typename Shape::Shared& memory, int number)
      : Base(params, memory.bias.buckets, memory.gradient.blocks[kSplit ? 0 : number], number), shared(memory),
        times(memory.gradient.times[kSplit ? 0 : number]) {}

  __device__ void run() {
    this->clear();
    int unit = -1;
    for (uint32_t n = warp / Teams::kTeam;; n += Teams::kTeams) {  // steps: all that is kept of the places in both rings
      const int stage = n % Shape::kBiasStages, buffer = n % Shape::kScoreBuffers;
      shared.bias.ring.full[stage].wait(n / Shape::kBiasStages % 2);
      const BiasStep& step = shared.steps[stage];
      if (step.unit < 0) break;
      if (step.unit != unit) {
        unit = step.unit;
        load_times(step.tile);
      }
      shared.gradient.ds_ring.full[buffer].wait(n / Shape::kScoreBuffers % 2);
      const char* scores = reinterpret_cast<const char*>(shared.ds[buffer]);
      CUTE_NO_UNROLL
      for (int b = 0; b < kBlocks; ++b) {
        CUTE_NO_UNROLL
        for (int queries = 0; queries < Shape::kQueries; queries += 64) {
          const int keys = first_key(b);
          const float scale = p.common.scales ? p.common.scales[step.tile.sequence] : p.common.scale;
          this->add_block(scores + queries / 64 * kKeys * 128 + keys * 128, shared.bias.tiles[stage], step.tile,
                          &times[64 * b], step.tile.first + keys, step.m * Shape::kQueries + queries, queries, scale);
        }
      }
      release(shared.bias.ring.empty[stage]);
      release(shared.gradient.ds_ring.empty[buffer]);
    }
    this->store();
  }

 private:
  // Of the warp's block `b`, in the tile of keys.
  __device__ int first_key(int b) const { return kSplit ? 64 * b : 64 * (b * Teams::kTeam + warp % Teams::kTeam); }

  __device__ void load_times(const TileRecord& tile) {
    if (!sums_time()) return;
    const TileTimes<false> all(p.bias, tile);
    CUTE_UNROLL
    for (int b = 0; b < kBlocks; ++b) {
      const int key = tile.first + first_key(b) + lane;
      const int64_t first = all.fixed(key), second = all.fixed(key + 32);
      times[64 * b + lane] = first, times[64 * b + lane + 32] = second;  // read by the same lane
    }
  }
};

// Adds copies up in a fixed order. A block has 32 entries: its 8 warps take a part of the copies each.
constexpr int kSumThreads = 256;

template <int kThreads>
__global__ void __launch_bounds__(kThreads) sum_tables_kernel(const SumParams p) {
  follow_kernel_before();
  GENREC_SHARED_MEMORY(memory);
  float(*parts)[32] = reinterpret_cast<float(*)[32]>(memory);
  constexpr int kWarps = kThreads / 32;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, entry = blockIdx.x * 32 + lane;
  float sum = 0.f;
  if (entry < p.entries) {
#pragma unroll 8
    for (int c = warp; c < p.count; c += kWarps) sum += p.copies[int64_t{c} * p.entries + entry];
  }
  parts[warp][lane] = sum;
  sync_block(kThreads);
  if (warp != 0 || entry >= p.entries) return;
  for (int w = 1; w < kWarps; ++w) sum += parts[w][lane];
  p.table[entry] = sum;
}

}  // namespace genrec::attention
