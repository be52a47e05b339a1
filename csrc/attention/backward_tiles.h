// What all backward kernels do with a tile: who sees it, dQ into its sums, P and dS into shared memory.
#pragma once

#include "attention/barriers.h"
#include "attention/mma.h"

namespace genrec::attention {

__device__ inline ColumnSight moved(const ColumnSight& s, int by) {
  return {s.hide0 - by, s.show0 - by, s.hide1 - by, s.show1 - by, s.end - by};
}

// One tile of dQ into the fp32 sum, in register order: 4 neighbouring elements of a thread are 16 bytes, the 128
// threads' lie side by side. With `turn`, key tiles add one after the other in rising order.
template <class Dq>
__device__ inline void add_dq(const Dq& dq, float* sum, int* turn, int rank, int warpgroup,
                              int thread = threadIdx.x % 128) {
  if (turn != nullptr) {
    if (thread == 0) await_turn(turn, rank);
    sync_threads(kTurnTaken + warpgroup, 128);
  }
  float* const to = settled(sum + thread * 4);
  cute::for_each(cute::make_seq<decltype(cute::size(dq))::value / 4>{}, [&](auto four) {
    constexpr int e = 4 * four;
    add_to_global<e * 128>(to, dq(e), dq(e + 1), dq(e + 2), dq(e + 3));
  });
  if (turn != nullptr) {
    fence_global();
    sync_threads(kTurnTaken + warpgroup, 128);
    if (thread == 0) pass_turn(turn);
  }
}

// The same by the copy engine: each warp's numbers lie side by side, and one of its threads starts the addition.
// `buffer`, `sum`: the warp's place in shared memory, and in the sums.
template <class Dq>
__device__ inline void add_dq_in_bulk(const Dq& dq, float* buffer, float* sum, int* turn, int rank, int warpgroup,
                                      int thread) {
  constexpr int kSize = decltype(cute::size(dq))::value;
  const int lane = thread % 32;
  if (lane == 0) wait_for_bulk_reads();  // of the last addition, long ago
  sync_warp();
  CUTE_UNROLL
  for (int e = 0; e < kSize; e += 4)
    reinterpret_cast<float4*>(buffer)[e / 4 * 32 + lane] = make_float4(dq(e), dq(e + 1), dq(e + 2), dq(e + 3));
  fence_shared_writes();
  sync_warp();
  if (turn != nullptr) {
    if (thread == 0) await_turn(turn, rank);
    sync_threads(kTurnTaken + warpgroup, 128);
  }
  if (lane == 0) add_in_bulk(sum, buffer, 32 * kSize * sizeof(float));
  if (turn != nullptr) {
    if (lane == 0) wait_for_bulk_sums();
    fence_global();
    sync_threads(kTurnTaken + warpgroup, 128);
    if (thread == 0) pass_turn(turn);
  }
}

// P^T or dS^T of 64 keys from `key` on and kQueries queries from `query` on, from registers to a (queries, kKeys)
// matrix, queries contiguous, for the tensor cores to read.
template <int kKeys, int kQueries, class Element, class Operand>
__device__ inline void write_scores(const Operand& scores, Element* to, int key, int query, Lane lane) {
  char* base = reinterpret_cast<char*>(to);
  const uint32_t* words = reinterpret_cast<const uint32_t*>(&scores(0));
  key += 16 * lane.warp + lane.lane % 16;
  query += lane.lane / 16 * 8;
  CUTE_UNROLL
  for (int g = 0; g < kQueries / 16; ++g) {  // 16 queries: two blocks of 8, each for the keys' two halves
    store_matrices(base + score_offset<kKeys>(query + 16 * g, key), words[4 * g], words[4 * g + 1], words[4 * g + 2],
                   words[4 * g + 3]);
  }
  fence_shared_writes();
}

}  // namespace genrec::attention
