// A plan in device memory: the lengths of the lists of tiles, then the lists, then the places of sequences' dS.
#pragma once

#include "attention/params.h"

namespace genrec::attention {

// The lists of the backward kernels with a bias are empty where their tiles are those of the ones without.
enum PlanList : int {
  kForwardQueries = 0,
  kBackwardKeys = 1,
  kBackwardQueries = 2,
  kBiasedKeys = 3,
  kBiasedQueries = 4,
  kStoredQueries = 5,  // of sequences whose dS is kept in memory
  kPlanLists = 6
};

// Sequences that share a stretch of a list (schedule.h). Kernels that compute a bias beside their products load less.
constexpr int together_in(int list) { return list == kBiasedKeys || list == kBiasedQueries ? 8 : 4; }

constexpr int64_t kPlanHeaderBytes = 64;

struct PlanShape {
  int size[kPlanLists];          // rows of a tile; 0: no list
  int64_t capacity[kPlanLists];  // tiles that a list has room for
  int sequences;
  int64_t cells;  // of dS for each head, that the backward pass has room for

  int64_t places_at() const {
    int64_t tiles = 0;
    for (int64_t list : capacity) tiles += list;
    return kPlanHeaderBytes + tiles * static_cast<int64_t>(sizeof(TileRecord));
  }
  int64_t bytes() const { return places_at() + (size[kStoredQueries] > 0 ? sequences * static_cast<int64_t>(sizeof(int)) : 0); }

  // Of a DsStore: where the cells of each sequence begin, and how many have none.
  const int* places(const void* plan) const {
    return reinterpret_cast<const int*>(static_cast<const char*>(plan) + places_at());
  }
  const int* without_place(const void* plan) const { return static_cast<const int*>(plan) + kPlanLists; }

  // Where list `which` of the plan at `plan` lies.
  WorkList list(const void* plan, int which) const {
    const char* tiles = static_cast<const char*>(plan) + kPlanHeaderBytes;
    for (int before = 0; before < which; ++before) tiles += capacity[before] * static_cast<int64_t>(sizeof(TileRecord));
    return {static_cast<const int*>(plan) + which, reinterpret_cast<const TileRecord*>(tiles)};
  }
};

cudaError_t make_plan(const Batch& batch, const MaskRule& rule, const PlanShape& shape, void* plan, cudaStream_t stream);

}  // namespace genrec::attention
