// dS of whole sequences in device memory, between the pass that gives dK and dV and the one that gives dQ.
//
// Where D = 256, dQ is the work of a pass of its own. Computing dS again there costs two products of three, and Q, dO and V
// once more; two bytes a pair, written in one pass and read in the next, cost neither: the device's memory has nothing
// else to do. So a sequence's dS lies in cells of 192 queries x 64 keys, each cut into parts, the first pass's tiles (of 64
// keys). Cells that a causal mask hides have no place. Sequences that don't fit the room that the host gives are computed
// again (backward_queries.h).
#pragma once

#include "attention/schedule.h"

namespace genrec::attention {

constexpr int kCellQueries = 192, kCellKeys = 64, kCellElements = kCellQueries * kCellKeys;

// How a cell is cut: `kRows` queries are a tile of the pass that writes.
template <int kRows_>
struct CellParts {
  static constexpr int kRows = kRows_, kCount = kCellQueries / kRows, kElements = kRows * kCellKeys;
  static_assert(kCount * kRows == kCellQueries, "a cell is a whole number of parts");
};

constexpr int kLargestPart = 64 * kCellKeys;  // elements

struct DsStore {
  void* data;
  const int* first;  // (sequences,): cells of the sequences before for each head, or -1: no place. Null: no store
  const int* left;   // how many sequences have no place
  const void* zeros;  // a part of a cell
};

// `Store`: a DsStore, or a BiasStore, whose places are the same.
template <class Store>
GENREC_HOST_DEVICE inline bool is_stored(const Store& store, int sequence) {
  return store.first != nullptr && store.first[sequence] >= 0;
}

// The cells of one sequence and head: rows of cells one after the other, of each all that its queries may see.
struct StoredSequence {
  int rows, columns;  // of cells
  int wide;   // rows of cells that see all keys: those of contexts, or all
  int ahead;  // key tiles before the first query's own

  // As SequenceMask has contexts and `causal`.
  GENREC_HOST_DEVICE StoredSequence(int queries, int keys, int contexts, bool causal)
      : rows(divide_up(queries, kCellQueries)), columns(divide_up(keys, kCellKeys)),
        ahead(divide_up(keys - queries, kCellKeys)) {
    wide = causal ? smaller(rows, divide_up(larger(0, contexts - (keys - queries)), kCellQueries)) : rows;
  }

  // Cells before a row of them.
  GENREC_HOST_DEVICE int before(int row) const {
    constexpr int kStep = kCellQueries / kCellKeys;
    const int all = smaller(row, wide);
    return all * columns + (row - all) * ahead + kStep * (row * (row + 1) - all * (all + 1)) / 2;
  }
  GENREC_HOST_DEVICE int cells() const { return before(rows); }
  // Cells of a row.
  GENREC_HOST_DEVICE int width(int row) const { return before(row + 1) - before(row); }
};

template <class Mask>
GENREC_HOST_DEVICE inline StoredSequence stored_sequence(const TileRecord& tile, const Mask& mask) {
  return {tile.queries, tile.keys, mask.contexts, mask.rule.causal != 0};
}

// Where a sequence's cells lie for one head.
struct CellPlaces {
  StoredSequence sequence;
  int64_t first;  // -1: nowhere

  template <class Store>
  GENREC_HOST_DEVICE CellPlaces(const Store& store, const StoredSequence& of, int number, int head, int heads)
      : sequence(of) {
    const int cells = store.first[number];
    first = cells < 0 ? -1 : int64_t{cells} * heads + int64_t{head} * of.cells();
  }
  GENREC_HOST_DEVICE int64_t cell(int row, int column) const { return first + sequence.before(row) + column; }

  // The m-th part of a column; -1: nowhere, or its cell has no place (a tile of more keys may reach beyond a row's last).
  template <class Parts>
  GENREC_HOST_DEVICE int64_t part(int m, int column) const {
    const int row = m / Parts::kCount;
    if (first < 0 || column >= sequence.width(row)) return -1;
    return cell(row, column) * Parts::kCount + m % Parts::kCount;
  }
};

// Places are given in the order of sequences, by phases as a list is built (schedule.h): each thread adds up the cells of
// neighbouring sequences, one adds up the threads' sums, each gives places.
struct StoreScratch {
  int64_t before[kMostListThreads];
};

GENREC_HOST_DEVICE inline StoredSequence stored_sequence(const Batch& batch, const MaskRule& rule, int b) {
  const int queries = batch.query_offsets[b + 1] - batch.query_offsets[b];
  const int keys = batch.key_offsets[b + 1] - batch.key_offsets[b];
  const SequenceMask<false> mask(keys, batch.contexts ? batch.contexts[b] : 0, 0, rule);
  return {queries, keys, mask.contexts, rule.causal != 0};
}

GENREC_HOST_DEVICE inline void store_phase_count(StoreScratch& scratch, const Batch& batch, const MaskRule& rule,
                                                 int thread, int threads) {
  const int each = divide_up(batch.sequences, threads), end = smaller(batch.sequences, (thread + 1) * each);
  int64_t cells = 0;
  for (int b = thread * each; b < end; ++b) cells += stored_sequence(batch, rule, b).cells();
  scratch.before[thread] = cells;
}

GENREC_HOST_DEVICE inline void store_phase_sum(StoreScratch& scratch, int* left, int threads) {
  int64_t before = 0;
  for (int t = 0; t < threads; ++t) {
    const int64_t cells = scratch.before[t];
    scratch.before[t] = before;
    before += cells;
  }
  *left = 0;
}

// `capacity`: cells for each head. `left`: sequences without a place.
GENREC_HOST_DEVICE inline void store_phase_place(const StoreScratch& scratch, const Batch& batch, const MaskRule& rule,
                                                 int64_t capacity, int* first, int* left, int thread, int threads) {
  const int each = divide_up(batch.sequences, threads), end = smaller(batch.sequences, (thread + 1) * each);
  int64_t before = scratch.before[thread];
  int without = 0;
  for (int b = thread * each; b < end; ++b) {
    const int64_t after = before + stored_sequence(batch, rule, b).cells();
    first[b] = after <= capacity ? static_cast<int>(before) : -1;
    without += after > capacity;
    before = after;
  }
  if (without > 0) add_atomically(left, without);
}

}  // namespace genrec::attention
