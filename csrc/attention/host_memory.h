// How many blocks a problem's kernels have, and what memory: the plan, the bias that is kept, both passes' own. Host code:
// api.cpp alone includes it.
#pragma once

#include "attention/host_problem.h"

namespace genrec::attention {

// Cells of dS for each head that are given room. Lengths are not known here: one and a half times what equal ones would
// take, so that sequences may differ. Those that find no room then have dS computed twice.
inline int64_t stored_cells(const genrec_attention_problem& p) {
  if (p.sequences == 0) return 0;
  const auto mean = [&](int64_t rows) { return static_cast<int>((rows + p.sequences - 1) / p.sequences); };
  const int queries = mean(p.query_rows), keys = larger(queries, mean(p.key_rows));
  const int contexts = p.contexts == nullptr ? 0 : keys - queries + 1;  // some, in the first cells
  const int64_t cells = int64_t{StoredSequence(queries, keys, contexts, p.causal != 0).cells()} * p.sequences;
  const int64_t most = most_stored() / (int64_t{kCellElements} * 2 * p.heads);
  const int64_t wanted = p.sequences > 1 ? cells + cells / 2 : cells;
  return wanted < most ? wanted : most;
}

// Rows of the tiles of stored dS, or of a stored bias; 0 where no kernel stores any. All store the same cells.
inline int stored_rows_of(const genrec_attention_problem& p) {
  int rows = 0;
  for (Bias bias : {Bias::kNone, Bias::kRelative}) {
    const BackwardInstance* one = find(kBackward, p, bias);
    if (one != nullptr) rows = larger(rows, one->blocks.stored_rows);
    const ForwardInstance* forward = find(kForward, p, bias);
    if (forward != nullptr && stores_bias(*forward, p)) rows = kCellQueries;
  }
  return rows;
}

inline PlanShape plan_shape(const genrec_attention_problem& p) {
  const ForwardInstance& forward = *find(kForward, p, Bias::kNone);
  const BackwardInstance& backward = *find(kBackward, p, Bias::kNone);
  const int stored_rows = stored_rows_of(p);
  PlanShape shape{{forward.blocks.queries, backward.blocks.keys, backward.blocks.listed_queries(), 0, 0, stored_rows},
                  {}, p.sequences, stored_rows > 0 ? stored_cells(p) : 0};
  const BackwardInstance* biased = find_biased(p);
  if (biased != nullptr && !same_tiles(*biased, backward)) {
    shape.size[kBiasedKeys] = biased->blocks.keys;
    shape.size[kBiasedQueries] = biased->blocks.listed_queries();
  }
  for (int which = 0; which < kPlanLists; ++which) {
    if (shape.size[which] == 0) continue;
    const int64_t rows = which == kBackwardKeys || which == kBiasedKeys ? p.key_rows : p.query_rows;
    shape.capacity[which] = list_capacity(rows, p.sequences, shape.size[which]);
  }
  return shape;
}

inline int32_t multiprocessors(int* count) {
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(count, cudaDevAttrMultiProcessorCount, device);
  return error == cudaSuccess ? 0 : fail("cudaGetDevice", error);
}

// A persistent kernel needs no more blocks than there may be units of work.
inline int blocks_for(int64_t tiles, int heads, int most) {
  const int64_t units = tiles * heads;
  return static_cast<int>(units < most ? units : most);
}

// The list of tiles that a pass goes over.
inline int list_of(const Backward& one, int pass) {
  const BackwardBlocks& blocks = one.kernel.blocks;
  if (pass == 0 && blocks.plain_keys) return kBackwardKeys;
  if (pass > 0 && pass <= blocks.stored_passes) return kStoredQueries;
  return !blocks.gathers() && pass == blocks.passes - 1 ? one.queries : one.keys;
}

// Blocks of the backward pass's launches: over tiles of keys, and over those of stored dS.
struct BackwardLaunches {
  int keys, stored;
};

// Without tables to sum the memory doesn't depend on them.
inline int32_t backward_launches(const genrec_attention_problem& p, const PlanShape& shape, BackwardLaunches* blocks) {
  int most = 0;
  if (multiprocessors(&most) != 0) return -1;
  *blocks = {blocks_for(shape.capacity[find_backward(p).keys], p.heads, most),
             blocks_for(shape.capacity[kStoredQueries], p.heads, most)};
  return 0;
}

// Of a stored bias, for all heads.
inline int64_t bias_bytes(const PlanShape& shape) { return shape.cells * kCellElements * 2; }

inline bool reads_bias(const BackwardInstance& one) { return one.bias == Bias::kRelative && one.blocks.stored_rows > 0; }

// Of the bias that the forward pass leaves for the backward pass, in the places that the plan gives both.
inline int64_t kept_bytes(const genrec_attention_problem& p, const PlanShape& shape) {
  const BackwardInstance* backward = find(kBackward, p, bias_kind(p));
  if (backward == nullptr || !reads_bias(*backward) || !stores_bias(*find(kForward, p, bias_kind(p)), p)) return 0;
  const int64_t bytes = bias_bytes(shape);
  return bytes <= most_kept() ? bytes : 0;
}

constexpr const char* kNothingKept = "memory was given to keep a bias in, where none is kept";

// The forward pass's memory: counters, the bias where none is kept.
struct ForwardMemory {
  int64_t zeroed = 64, bias_at = 128, bytes;

  ForwardMemory(bool stored, const PlanShape& shape, bool kept)
      : bytes(stored && !kept ? bias_at + bias_bytes(shape) : zeroed) {}
};

// The backward pass's memory: counters, the order of sums, the sums of the tables, a part of zeros; the sums of dQ;
// dS; the relative bias, where dS is stored with one and none was kept. All before the sums of dQ is zeroed, and these,
// too, but where few sequences or none have any: kernels see to those then.
struct BackwardMemory {
  int64_t turns_at, position_at, time_at, zeros_at, sum_at, stored_at, bias_at, zeroed, bytes;
  // Of the tables' sums. The first copies are those of the pass over stored dS: one of the position table for each of its
  // blocks, or, where the order is fixed, for each warp that sums, as of the time table.
  struct Copies {
    int entries, stored, all;

    int64_t bytes() const { return aligned(int64_t{all} * entries * 4); }
  };
  Copies position, time;

  BackwardMemory(const genrec_attention_problem& p, const PlanShape& shape, bool deterministic, bool kept,
                 const BackwardLaunches& blocks) {
    const Backward one = find_backward(p);
    const bool stores = one.kernel.blocks.stored_rows > 0, gathers = one.kernel.blocks.gathers();
    const int64_t tiles = gathers ? shape.capacity[one.queries] * p.heads : 0;
    turns_at = 128;
    position_at = turns_at + (deterministic ? aligned(tiles * 2 * 4) : 0);
    const int stored = one.kernel.blocks.stored_tables, others = blocks.keys * one.kernel.blocks.tables;
    const auto copies = [&](bool wanted, int entries, int each) {
      return Copies{wanted ? entries : 0, blocks.stored * each, blocks.stored * each + others};
    };
    position = copies(p.bias.d_position != nullptr && p.bias.position != nullptr, 2 * p.bias.max_positions - 1,
                      deterministic || stored == 0 ? stored : 1);
    time = copies(p.bias.d_time != nullptr && p.bias.time != nullptr, p.bias.buckets, stored);
    time_at = position_at + position.bytes();
    zeros_at = time_at + time.bytes();
    sum_at = zeros_at + (stores ? kLargestPart * 2 : 0);
    stored_at = sum_at + aligned(tiles * shape.size[one.queries] * one.kernel.dim * 4);
    zeroed = stores ? sum_at : stored_at;
    bias_at = stored_at + (stores ? shape.cells * p.heads * kCellElements * 2 : 0);
    bytes = bias_at + (reads_bias(one.kernel) && !kept ? bias_bytes(shape) : 0);
  }

 private:
  static int64_t aligned(int64_t size) { return (size + 127) / 128 * 128; }
};

}  // namespace genrec::attention
