// schedule.h and ds_store.h on the host: every tile of every sequence is listed once, long sequences first, in the promised
// order; every part of dS that the backward pass visits has a place of its own.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <set>
#include <vector>

#include "attention/ds_store.h"

using namespace genrec::attention;

namespace {

long checks = 0;

void check(bool good, const char* what, int a, int b) {
  ++checks;
  if (good) return;
  std::printf("%s: %d %d\n", what, a, b);
  std::exit(1);
}

std::vector<TileRecord> build(const Batch& batch, ListKind kind, int size, int64_t capacity, int threads,
                              int together) {
  ListScratch scratch{};
  for (int t = 0; t < threads; ++t) list_phase_count(scratch, batch, kind, size, t, threads);
  const int length = list_phase_sum(scratch);
  check(length <= capacity, "a list outgrows its room", length, static_cast<int>(capacity));
  std::vector<TileRecord> list(length + 1, TileRecord{-7, 0, 0, 0, 0, 0, 0, 0});
  for (int first = 0; first < batch.sequences; first += threads) {
    for (int t = 0; t < threads; ++t) list_phase_chunk(scratch, batch, kind, size, first, t);
    for (int t = threads - 1; t >= 0; --t) list_phase_write(scratch, batch, kind, size, together, list.data(), first, t);
    for (int t = 0; t < threads; ++t) list_phase_advance(scratch, t);
  }
  check(list.back().sequence == -7, "written beyond the end", length, list.back().sequence);
  list.pop_back();
  return list;
}

// Sequence and first row of each tile, in the promised order.
std::vector<std::pair<int, int>> wanted_order(const std::vector<int>& lengths, ListKind kind, int size, int together) {
  std::map<int, std::vector<int>> buckets;
  for (int b = 0; b < static_cast<int>(lengths.size()); ++b) {
    if (lengths[b] > 0) buckets[length_bucket(divide_up(lengths[b], size))].push_back(b);
  }
  std::vector<std::pair<int, int>> order;
  for (const auto& [bucket, sequences] : buckets) {
    const size_t each = bucket > 0 ? together : 1;
    for (size_t first = 0; first < sequences.size(); first += each) {
      const int tiles = divide_up(lengths[sequences[first]], size);
      for (int t = 0; t < tiles; ++t) {
        for (size_t n = first; n < std::min(first + each, sequences.size()); ++n)
          order.push_back({sequences[n], (kind == ListKind::kQueries ? tiles - 1 - t : t) * size});
      }
    }
  }
  return order;
}

void check_batch(const std::vector<int>& queries, const std::vector<int>& keys, const std::vector<int>& contexts,
                 int size, int together) {
  const int n = static_cast<int>(queries.size());
  std::vector<int> query_offsets{0}, key_offsets{0};
  for (int b = 0; b < n; ++b) {
    query_offsets.push_back(query_offsets.back() + queries[b]);
    key_offsets.push_back(key_offsets.back() + keys[b]);
  }
  const Batch batch{query_offsets.data(), key_offsets.data(), contexts.data(), nullptr, n};
  for (ListKind kind : {ListKind::kQueries, ListKind::kKeys}) {
    const bool of_queries = kind == ListKind::kQueries;
    const std::vector<int>& lengths = of_queries ? queries : keys;
    const int rows = of_queries ? query_offsets.back() : key_offsets.back();
    const std::vector<TileRecord> list = build(batch, kind, size, list_capacity(rows, n, size), 1 + n % 5, together);
    // However many threads build it.
    const auto order = wanted_order(lengths, kind, size, together);
    check(order.size() == list.size(), "length", int(order.size()), int(list.size()));
    for (const auto& built : {list, build(batch, kind, size, list_capacity(rows, n, size), 7, together)}) {
      for (size_t t = 0; t < list.size(); ++t)
        check(std::make_pair(built[t].sequence, built[t].first) == order[t], "order", int(t), built[t].sequence);
    }
    std::set<std::pair<int, int>> seen;
    std::map<int, int> last;
    int longest = kNever;
    for (const TileRecord& t : list) {
      const int b = t.sequence;
      check(b >= 0 && b < n, "sequence", b, n);
      check(t.first % size == 0 && t.first < lengths[b], "first row", t.first, lengths[b]);
      check(seen.insert({b, t.first}).second, "a tile twice", b, t.first);
      check(t.queries == queries[b] && t.query_start == query_offsets[b], "queries", b, t.queries);
      check(t.keys == keys[b] && t.key_start == key_offsets[b], "keys", b, t.keys);
      check(t.contexts == contexts[b] && t.targets == 0, "counts", b, t.contexts);
      if (last.count(b)) {
        check(t.first == last[b] + (of_queries ? -size : size), "order within a sequence", t.first, last[b]);
      } else {
        check(divide_up(lengths[b], size) <= longest, "long sequences first", b, longest);
        longest = divide_up(lengths[b], size);
        if (longest >= kLengthBuckets) longest = kNever;
      }
      last[b] = t.first;
    }
    size_t want = 0;
    for (int b = 0; b < n; ++b) want += divide_up(lengths[b], size);
    check(seen.size() == want, "tiles missing", static_cast<int>(seen.size()), static_cast<int>(want));
  }
  // The fp32 sums of dQ: no two sequences share a tile, and all fit the room that the host reserves.
  int64_t next = 0;
  for (int b = 0; b < n; ++b) {
    const int64_t first = first_padded_tile(query_offsets[b], b, size);
    check(first >= next, "padded tiles overlap", b, static_cast<int>(first));
    next = first + divide_up(queries[b], size);
  }
  check(next <= list_capacity(query_offsets.back(), n, size), "padded tiles outgrow their room", n, size);
}

// Batches of small sequences with every kind of mask: the parts that query_tiles visits, by tiles of kTileKeys keys.
template <int kTileKeys, class Parts>
void check_store(unsigned seed) {
  auto draw = [&seed](int n) { return static_cast<int>((seed = seed * 1664525u + 1013904223u) >> 8) % n; };
  const int n = 1 + draw(6), heads = 1 + draw(3);
  std::vector<int> query_offsets{0}, key_offsets{0}, contexts, targets;
  for (int b = 0; b < n; ++b) {
    const int keys = draw(4) ? draw(1400) : draw(3), queries = draw(2) ? keys : draw(keys + 1);
    query_offsets.push_back(query_offsets.back() + queries);
    key_offsets.push_back(key_offsets.back() + keys);
    contexts.push_back(draw(3) ? draw(6) : draw(keys + 2));
    targets.push_back(draw(2) ? draw(keys + 1) : 0);
  }
  const MaskRule rule{1 + draw(3), draw(3) ? -1 : draw(700), draw(4) > 0};
  const Batch batch{query_offsets.data(), key_offsets.data(), contexts.data(), targets.data(), n};
  auto scratch = std::make_unique<StoreScratch>();
  const int threads = 1 + draw(9), capacity = draw(2) ? 1 << 20 : draw(200);
  std::vector<int> first(n, -7);
  int left = -7;
  for (int t = 0; t < threads; ++t) store_phase_count(*scratch, batch, rule, t, threads);
  store_phase_sum(*scratch, &left, threads);
  for (int t = threads - 1; t >= 0; --t)
    store_phase_place(*scratch, batch, rule, capacity, first.data(), &left, t, threads);
  std::set<int64_t> seen;
  int without = 0;
  for (int b = 0; b < n; ++b) {
    without += first[b] < 0;
    const int queries = query_offsets[b + 1] - query_offsets[b], keys = key_offsets[b + 1] - key_offsets[b];
    const SequenceMask<false> mask(keys, contexts[b], targets[b], rule);
    const TileRecord tile{b, 0, query_offsets[b], queries, key_offsets[b], keys, contexts[b], targets[b]};
    const StoredSequence sequence = stored_sequence(tile, mask);
    check(sequence.cells() == stored_sequence(batch, rule, b).cells(), "cells", b, sequence.cells());
    for (int h = 0; h < heads; ++h) {
      const CellPlaces places(DsStore{nullptr, first.data(), &left, nullptr}, sequence, b, h, heads);
      for (int j = 0; j * kCellKeys < keys; ++j) {
        const int j0 = j * kCellKeys / kTileKeys * kTileKeys;
        const TileRanges visited = mask.query_tiles(j0, j0 + kTileKeys, Parts::kRows, queries);
        for (int i = 0; i < visited.count(); ++i) {
          const int64_t part = places.part<Parts>(visited.tile(i), j);
          const bool there = j < sequence.width(visited.tile(i) / Parts::kCount);
          check((part < 0) == (first[b] < 0 || !there), "stored or not", b, j);
          const TileRanges own = mask.query_tiles(j * kCellKeys, (j + 1) * kCellKeys, Parts::kRows, queries);
          const int m = visited.tile(i);
          check(there || own.rank(m) == own.rank(m + 1), "no place for what is seen", m, j);
          if (part < 0) continue;
          check(part < int64_t{capacity} * heads * Parts::kCount, "a place beyond the room", b, j);
          check(seen.insert(part).second, "a place twice", visited.tile(i), j);
        }
      }
    }
  }
  check(left == without, "sequences without a place", left, without);
  check(capacity < 1 << 20 || left == 0, "no place in spite of room", left, n);
}

}  // namespace

int main() {
  unsigned state = 7;
  auto draw = [&state](int n) { return static_cast<int>((state = state * 1664525u + 1013904223u) >> 8) % n; };
  for (int round = 0; round < 3000; ++round) {
    const int n = draw(12), size = 1 + draw(9), longest = draw(2) ? 30 : 3;
    std::vector<int> queries, keys, contexts;
    for (int b = 0; b < n; ++b) {
      keys.push_back(draw(4) ? draw(longest + 1) : 0);
      queries.push_back(draw(3) ? keys[b] : draw(keys[b] + 1));
      contexts.push_back(draw(3));
    }
    check_batch(queries, keys, contexts, size, 1 + round % 5);
  }
  check_batch({5000, 1, 3000}, {5000, 1, 3000}, {1, 0, 2}, 1, 4);  // more tiles than there are buckets
  for (int w = 0; w < 100; ++w) {
    const WorkUnit unit = work_unit(w, 3);
    check(unit.tile * 3 + unit.head == w && unit.head < 3, "unit", w, unit.head);
  }
  for (unsigned seed = 0; seed < 2000; ++seed) {
    check_store<64, CellParts<48>>(seed * 2654435761u);
    check_store<128, CellParts<64>>(seed * 2654435761u);
  }
  std::printf("ok %ld checks\n", checks);
}
