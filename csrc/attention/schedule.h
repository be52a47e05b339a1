// Work lists: a batch cut into tiles of rows, those of the longest sequences first.
//
// A persistent kernel's blocks take tiles off a list until it is empty, so that long sequences start early and short
// ones fill the gaps. Some sequences of as many tiles share a stretch of the list, tile by tile: the last of all are small
// ones then, and blocks end at about the same time. One after the other, half of them would idle while the last sequence's
// largest tiles are computed; too many would take room in the L2 cache from each other's keys and values.
//
// A list is built on the device (lengths are never read by the host), by phases with a block-wide barrier between them.
// Each phase is a function of (thread, threads): the host runs them one thread after the other (tests/schedule_test.cpp).
// A batch has one list, the same in every run: sums of a fixed order count on it.
#pragma once

#include <cstdint>

#include "attention/mask.h"

namespace genrec::attention {

// One tile: `size` rows from row `first` of a sequence, and what is known of that sequence. 32 bytes, two loads.
struct alignas(16) TileRecord {
  int sequence;  // -1: no more tiles
  int first;
  int query_start, queries;
  int key_start, keys;
  int contexts, targets;
};

struct Batch {
  const int* query_offsets;  // (sequences + 1,)
  const int* key_offsets;
  const int* contexts;  // (sequences,) or null
  const int* targets;
  int sequences;
};

enum class ListKind : int { kQueries = 0, kKeys = 1 };

constexpr int kLengthBuckets = 1024, kMostListThreads = 1024;

// Scratch memory of one list, shared by the threads that build it.
struct ListScratch {
  int tiles[kLengthBuckets];   // tiles of all sequences of a bucket
  int begin[kLengthBuckets];   // where the bucket's first sequence goes
  int cursor[kLengthBuckets];  // where the bucket's next sequence goes
  int chunk[kMostListThreads];  // tiles of the sequences that are written at the same time, one a thread
};

GENREC_HOST_DEVICE inline int add_atomically(int* where, int value) {
#if defined(__CUDA_ARCH__)
  return atomicAdd(where, value);
#else
  const int old = *where;
  *where += value;
  return old;
#endif
}

GENREC_HOST_DEVICE inline int tiles_of(const Batch& batch, int sequence, ListKind kind, int size) {
  const int* offsets = kind == ListKind::kQueries ? batch.query_offsets : batch.key_offsets;
  return divide_up(offsets[sequence + 1] - offsets[sequence], size);
}

// Longest sequences have the lowest bucket.
GENREC_HOST_DEVICE inline int length_bucket(int tiles) { return kLengthBuckets - smaller(tiles, kLengthBuckets); }

GENREC_HOST_DEVICE inline void list_phase_count(ListScratch& scratch, const Batch& batch, ListKind kind, int size,
                                                int thread, int threads) {
  for (int b = thread; b < batch.sequences; b += threads) {
    const int tiles = tiles_of(batch, b, kind, size);
    if (tiles > 0) add_atomically(&scratch.tiles[length_bucket(tiles)], tiles);
  }
}

// One thread sums up what comes before each bucket; returns the number of tiles.
GENREC_HOST_DEVICE inline int list_phase_sum(ListScratch& scratch) {
  int before = 0;
  for (int bucket = 0; bucket < kLengthBuckets; ++bucket) {
    scratch.begin[bucket] = scratch.cursor[bucket] = before;
    before += scratch.tiles[bucket];
  }
  return before;
}

// Sequences are written in chunks of one a thread, from sequence `first` on, by three phases. This one counts.
GENREC_HOST_DEVICE inline void list_phase_chunk(ListScratch& scratch, const Batch& batch, ListKind kind, int size,
                                                int first, int thread) {
  scratch.chunk[thread] = first + thread < batch.sequences ? tiles_of(batch, first + thread, kind, size) : 0;
}

// Writes behind the chunk's earlier sequences of the same bucket, or, `together` at a time, between their tiles.
//
// Query tiles of a sequence go last one first: under a causal mask it has most to do. Key tiles go first one first, for
// the same reason, and because a deterministic backward pass lets tile n wait for tiles before n only: those are taken
// off the list before it, hence never wait for it.
GENREC_HOST_DEVICE inline void list_phase_write(const ListScratch& scratch, const Batch& batch, ListKind kind, int size,
                                                int together, TileRecord* list, int first, int thread) {
  const int b = first + thread, tiles = scratch.chunk[thread];
  if (tiles <= 0) return;
  const int bucket = length_bucket(tiles);
  int start = scratch.cursor[bucket];
  for (int t = 0; t < thread; ++t) {
    const int others = scratch.chunk[t];
    if (others > 0 && length_bucket(others) == bucket) start += others;
  }
  const int query_start = batch.query_offsets[b], key_start = batch.key_offsets[b];
  TileRecord record{b, 0, query_start, batch.query_offsets[b + 1] - query_start, key_start,
                    batch.key_offsets[b + 1] - key_start, batch.contexts ? batch.contexts[b] : 0,
                    batch.targets ? batch.targets[b] : 0};
  int stride = 1;
  if (bucket > 0) {  // all its sequences have as many tiles
    const int before = (start - scratch.begin[bucket]) / tiles, place = before % together;
    stride = smaller(together, scratch.tiles[bucket] / tiles - (before - place));
    start += place - place * tiles;
  }
  for (int t = 0; t < tiles; ++t) {
    record.first = (kind == ListKind::kQueries ? tiles - 1 - t : t) * size;
    list[start + t * stride] = record;
  }
}

// Moves the cursors behind the chunk.
GENREC_HOST_DEVICE inline void list_phase_advance(ListScratch& scratch, int thread) {
  const int tiles = scratch.chunk[thread];
  if (tiles > 0) add_atomically(&scratch.cursor[length_bucket(tiles)], tiles);
}

// Upper bound of a list's length, known without reading the lengths.
GENREC_HOST_DEVICE constexpr int64_t list_capacity(int64_t rows, int64_t sequences, int size) {
  return rows / size + sequences;
}

// The backward pass adds up dQ in whole tiles; no two sequences share one. Number of a sequence's first such tile.
GENREC_HOST_DEVICE inline int64_t first_padded_tile(int query_start, int sequence, int size) {
  return query_start / size + sequence;
}

// The w-th unit of work: heads change fastest, so that the blocks of one moment share keys and values in the L2 cache.
struct WorkUnit {
  int tile, head;
};

GENREC_HOST_DEVICE inline WorkUnit work_unit(int w, int heads) { return {w / heads, w % heads}; }

}  // namespace genrec::attention
