// A batch of keys: find, insert, evict, promote. The batch is split by runs of buckets; a run is handled by one thread
// in the order of the batch, so results are the same for any number of threads and any split.
#include <algorithm>
#include <stdexcept>

#include "common/thread_pool.h"
#include "hkv/table.h"

namespace genrec {
namespace hkv {
namespace {

constexpr int kMaxParts = 64;
constexpr int64_t kSmallBatch = 2048;
constexpr uint8_t kWasPinned = 1, kNew = 2, kRefused = 4;

uint64_t unit_buckets(const IndexView& view) { return view.choices == 2 ? kBlockBuckets : 1; }

}  // namespace

void Table::Scratch::resize(size_t n) {
  if (keys.size() >= n) return;
  for (auto* column : {&keys, &slots, &unique_slots, &unique_keys}) column->resize(n);
  for (auto* column : {&positions, &local, &counts, &misses}) column->resize(n);
  part.resize(n);
  flags.resize(n);
}

unsigned Table::part_shift(int64_t n) const {
  const uint64_t units = (view_.num_buckets + unit_buckets(view_) - 1) / unit_buckets(view_);
  const uint64_t wanted = n < kSmallBatch ? 1 : kMaxParts;
  unsigned shift = 0;
  while (((units - 1) >> shift) >= wanted) ++shift;
  return shift;
}

// A stable sort of the batch by run of buckets.
void Table::partition(const genrec_hkv_batch& batch, int threads) {
  const int64_t n = batch.n;
  scratch_.resize(static_cast<size_t>(n));
  const uint64_t unit = unit_buckets(view_);
  const unsigned shift = part_shift(n);
  const uint64_t units = (view_.num_buckets + unit - 1) / unit;
  const size_t count = ((units - 1) >> shift) + 1;
  parts_.assign(count, Partition{});
  if (count == 1) {
    parts_[0].end = n;
    std::copy(batch.keys, batch.keys + n, scratch_.keys.begin());
    for (int64_t i = 0; i < n; ++i) scratch_.positions[i] = static_cast<int32_t>(i);
    return;
  }
  const int64_t chunks = std::max(1, std::min(threads, 64));
  const int64_t length = (n + chunks - 1) / chunks;
  std::vector<int64_t> cursor(static_cast<size_t>(chunks) * kMaxParts, 0);
  const unsigned unit_shift = (unit == 1 ? 0 : 6) + shift;
  ThreadPool::instance().run(chunks, threads, [&](int64_t chunk) {
    int64_t histogram[kMaxParts] = {0};
    for (int64_t i = chunk * length; i < std::min(n, (chunk + 1) * length); ++i) {
      const uint64_t bucket = first_bucket(mix64(static_cast<uint64_t>(batch.keys[i])), view_.num_buckets);
      const uint8_t part = static_cast<uint8_t>(bucket >> unit_shift);
      scratch_.part[i] = part;
      ++histogram[part];
    }
    std::copy(histogram, histogram + kMaxParts, &cursor[chunk * kMaxParts]);
  });
  int64_t total = 0;
  for (size_t part = 0; part < count; ++part) {
    parts_[part].begin = total;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const int64_t here = cursor[chunk * kMaxParts + part];
      cursor[chunk * kMaxParts + part] = total;
      total += here;
    }
    parts_[part].end = total;
  }
  ThreadPool::instance().run(chunks, threads, [&](int64_t chunk) {
    int64_t next[kMaxParts];
    std::copy(&cursor[chunk * kMaxParts], &cursor[chunk * kMaxParts] + kMaxParts, next);
    for (int64_t i = chunk * length; i < std::min(n, (chunk + 1) * length); ++i) {
      const int64_t to = next[scratch_.part[i]]++;
      scratch_.keys[to] = batch.keys[i];
      scratch_.positions[to] = static_cast<int32_t>(i);
    }
  });
}

// The slot's place in the list of unique keys, -1 where it has none yet. The mark may be left from an older batch; it
// holds only if the list agrees.
int32_t Table::unique_of(Partition& part, int64_t slot) const {
  const uint32_t mark = view_.marks(slot / kBucketSlots)[slot % kBucketSlots];
  const bool holds = mark < part.unique && scratch_.unique_slots[part.begin + mark] == slot;
  return holds ? static_cast<int32_t>(mark) : -1;
}

int32_t Table::add_unique(Partition& part, int64_t slot, int64_t key, uint8_t flags) {
  const int64_t u = part.unique++;
  scratch_.unique_slots[part.begin + u] = slot;
  scratch_.unique_keys[part.begin + u] = key;
  scratch_.counts[part.begin + u] = 0;
  scratch_.flags[part.begin + u] = flags;
  if (slot >= 0) view_.marks(slot / kBucketSlots)[slot % kBucketSlots] = static_cast<uint32_t>(u);
  return static_cast<int32_t>(u);
}

// Slots for a run's keys. False: a bucket is full and the table may still grow.
bool Table::resolve(const genrec_hkv_batch& batch, Partition& part) {
  const int64_t begin = part.begin, end = part.end;
  kernels().find(view_, &scratch_.keys[begin], end - begin, &scratch_.slots[begin]);
  int64_t misses = 0;
  for (int64_t j = begin; j < end; ++j) {
    const int64_t slot = scratch_.slots[j];
    if (slot < 0) {
      scratch_.misses[begin + misses++] = static_cast<int32_t>(j);
      continue;
    }
    int32_t u = unique_of(part, slot);
    if (u < 0) {
      uint32_t& step = view_.steps(slot / kBucketSlots)[slot % kBucketSlots];
      u = add_unique(part, slot, scratch_.keys[j], step >= batch.pin_floor ? kWasPinned : 0);
      // From here on the slot is pinned: a key that comes later in the batch can't lose its row to one before it.
      if (batch.flags & GENREC_HKV_TOUCH) step = batch.step;
    }
    scratch_.local[j] = u;
    ++scratch_.counts[begin + u];
  }
  part.hits = end - begin - misses;
  if (misses == 0) return true;
  if (!(batch.flags & GENREC_HKV_INSERT)) {
    for (int64_t i = 0; i < misses; ++i) {
      const int32_t j = scratch_.misses[begin + i];
      scratch_.local[j] = add_unique(part, -1, scratch_.keys[j], 0);
      scratch_.counts[begin + scratch_.local[j]] = 1;
    }
    return true;
  }
  const bool admission = (batch.flags & GENREC_HKV_ADMIT) && counters_.enabled();
  return admission ? admit_misses(batch, part, misses) : insert_misses(batch, part, misses);
}

bool Table::insert_one(const genrec_hkv_batch& batch, Partition& part, int64_t j) {
  const int64_t key = scratch_.keys[j];
  const int64_t slot = place(key, batch.pin_floor, part);
  if (slot < 0 && growable()) return false;
  if (slot >= 0) {
    occupy(slot, key, 0, batch.step);
    ++part.inserted;
  }
  scratch_.slots[j] = slot;
  scratch_.local[j] = add_unique(part, slot, key, slot >= 0 ? kNew : kRefused);
  return true;
}

bool Table::insert_misses(const genrec_hkv_batch& batch, Partition& part, int64_t misses) {
  for (int64_t i = 0; i < misses; ++i) {
    const int32_t j = scratch_.misses[part.begin + i];
    const int64_t slot = slot_of(scratch_.keys[j]);  // an earlier miss may have brought it
    if (slot >= 0) {
      scratch_.local[j] = unique_of(part, slot);
    } else if (!insert_one(batch, part, j)) {
      return false;
    }
    const int32_t u = scratch_.local[j];
    ++scratch_.counts[part.begin + u];
    part.refused += scratch_.unique_slots[part.begin + u] < 0;
  }
  return true;
}

// All sightings of a key in the batch count before it is decided, so that equal keys get equal answers.
bool Table::admit_misses(const genrec_hkv_batch& batch, Partition& part, int64_t misses) {
  const auto first = scratch_.misses.begin() + part.begin;
  std::vector<int32_t> sorted(first, first + misses);
  const auto& keys = scratch_.keys;
  std::sort(sorted.begin(), sorted.end(),
            [&](int32_t a, int32_t b) { return keys[a] != keys[b] ? keys[a] < keys[b] : a < b; });
  struct Group {
    int32_t first, begin, end;  // first position of the key; its range in `sorted`
  };
  std::vector<Group> groups;
  for (int32_t i = 0; i < misses; ++i) {
    if (i == 0 || keys[sorted[i]] != keys[sorted[i - 1]]) groups.push_back({sorted[i], i, i});
    groups.back().end = i + 1;
  }
  std::sort(groups.begin(), groups.end(), [](const Group& a, const Group& b) { return a.first < b.first; });
  for (const Group& group : groups) {
    const int64_t key = keys[group.first];
    const uint32_t sightings = static_cast<uint32_t>(group.end - group.begin);
    if (counters_.count(key, sightings, batch.step) < static_cast<uint32_t>(options_.admission_threshold)) {
      scratch_.local[group.first] = add_unique(part, -1, key, 0);
      part.unadmitted += sightings;
    } else {
      if (!insert_one(batch, part, group.first)) return false;
      if (scratch_.slots[group.first] < 0) part.refused += sightings;
    }
    const int32_t u = scratch_.local[group.first];
    for (int32_t i = group.begin; i < group.end; ++i) scratch_.local[sorted[i]] = u;
    scratch_.counts[part.begin + u] = static_cast<int32_t>(sightings);
  }
  return true;
}

// Moves a touched row up the tiers while a row above it comes before it in the order of victims.
void Table::promote(const genrec_hkv_batch& batch, Partition& part, int64_t slot) {
  const uint64_t bucket = static_cast<uint64_t>(slot) / kBucketSlots;
  const int s = static_cast<int>(slot % kBucketSlots);
  const StoreView& store = store_.view();
  uint8_t* positions = view_.positions(bucket);
  for (int tier = store.tier_of(positions[s]); tier > 0; --tier) {
    const int other = promotion_slot(view_, bucket, s, batch.pin_floor, store.first[tier - 1], store.first[tier]);
    if (other < 0) return;
    part.demoted += view_.digests(bucket)[other] != 0;
    store_.swap_rows(view_.row(bucket, s), view_.row(bucket, other));
    std::swap(view_.updates(bucket)[positions[s]], view_.updates(bucket)[positions[other]]);
    std::swap(positions[s], positions[other]);
    ++part.promoted;
  }
}

// Scores, tiers, initial rows and the outputs of a run.
void Table::finish(const genrec_hkv_batch& batch, Partition& part, genrec_hkv_lookup_result* result) {
  const int64_t begin = part.begin, end = part.end;
  int32_t* offsets = result->offsets + part.first_unique;
  int32_t next = static_cast<int32_t>(begin);
  for (int64_t u = 0; u < part.unique; ++u) {
    const int32_t count = scratch_.counts[begin + u];
    offsets[u] = next;
    scratch_.counts[begin + u] = next;  // from here on the write cursor of the key's positions
    next += count;
    const int64_t slot = scratch_.unique_slots[begin + u];
    if (slot < 0) continue;
    const uint64_t bucket = static_cast<uint64_t>(slot) / kBucketSlots;
    if (view_.has_scores && (batch.flags & GENREC_HKV_TOUCH)) {
      uint64_t& score = view_.scores(bucket)[slot % kBucketSlots];
      score = touched_score(score_mode_, score, static_cast<uint64_t>(count), batch.epoch);
    }
  }
  for (int64_t j = begin; j < end; ++j) {
    const int32_t u = scratch_.local[j];
    const int32_t position = scratch_.positions[j];
    result->positions[scratch_.counts[begin + u]++] = position;
    if (result->found != nullptr) {
      result->found[position] = scratch_.unique_slots[begin + u] >= 0 && !(scratch_.flags[begin + u] & kNew);
    }
    if (batch.scores != nullptr && scratch_.unique_slots[begin + u] >= 0) {
      const int64_t slot = scratch_.unique_slots[begin + u];
      view_.scores(slot / kBucketSlots)[slot % kBucketSlots] = batch.scores[position];
    }
  }
  if (view_.has_positions && (batch.flags & GENREC_HKV_TOUCH)) {
    for (int64_t u = 0; u < part.unique; ++u) {
      const int64_t slot = scratch_.unique_slots[begin + u];
      if (slot >= 0 && !(scratch_.flags[begin + u] & kWasPinned)) promote(batch, part, slot);
    }
  }
  for (int64_t u = 0; u < part.unique; ++u) {
    const int64_t slot = scratch_.unique_slots[begin + u], key = scratch_.unique_keys[begin + u];
    int64_t row = scratch_.flags[begin + u] & kRefused ? kRefusedRow : kAbsentRow;
    if (slot >= 0) {
      const uint64_t bucket = static_cast<uint64_t>(slot) / kBucketSlots;
      row = view_.row(bucket, static_cast<int>(slot % kBucketSlots));
      if (batch.flags & GENREC_HKV_UPDATE) view_.updates(bucket)[row % kBucketSlots] = batch.step;
      if (scratch_.flags[begin + u] & kNew) {
        kernels().initialize(store_.view(), init_, row, key);
        if (counters_.enabled()) counters_.forget(key);
      }
    }
    result->rows[part.first_unique + u] = row;
    result->keys[part.first_unique + u] = key;
  }
  if (result->rows_at != nullptr) {
    for (int64_t j = begin; j < end; ++j) {
      result->rows_at[scratch_.positions[j]] = result->rows[part.first_unique + scratch_.local[j]];
    }
  }
}

// Undoes a run's insertions before the table grows: nothing was evicted, and no row has been written.
void Table::forget_new(const Partition& part) {
  for (int64_t u = 0; u < part.unique; ++u) {
    if (scratch_.flags[part.begin + u] & kNew) release(scratch_.unique_slots[part.begin + u]);
  }
}

void Table::lookup(const genrec_hkv_batch& batch, int threads, genrec_hkv_lookup_result* result) {
  if (batch.n >= INT32_MAX) throw std::invalid_argument("a batch holds at most 2^31 - 2 keys");
  ThreadPool& pool = ThreadPool::instance();
  while (true) {
    partition(batch, threads);
    // All runs are resolved even where one is full: what they leave must not depend on which thread came first.
    std::atomic<bool> full{false};
    pool.run(static_cast<int64_t>(parts_.size()), threads, [&](int64_t i) {
      if (!resolve(batch, parts_[i])) full = true;
    });
    int64_t inserted = 0;
    for (const Partition& part : parts_) inserted += part.inserted;
    const double limit = options_.max_load_factor * static_cast<double>(num_slots());
    if (!growable() || (!full && (inserted == 0 || static_cast<double>(size_ + inserted) <= limit))) break;
    for (const Partition& part : parts_) forget_new(part);
    grow(threads);
    while (growable() && static_cast<double>(size_ + inserted) > options_.max_load_factor * num_slots()) grow(threads);
  }
  int64_t unique = 0;
  for (Partition& part : parts_) {
    part.first_unique = unique;
    unique += part.unique;
  }
  pool.run(static_cast<int64_t>(parts_.size()), threads, [&](int64_t i) { finish(batch, parts_[i], result); });
  result->offsets[unique] = static_cast<int32_t>(batch.n);
  result->unique = unique;
  result->inserted = result->evicted = result->refused = result->unadmitted = 0;
  for (Partition& part : parts_) {
    result->inserted += part.inserted;
    result->evicted += part.evicted;
    result->refused += part.refused;
    result->unadmitted += part.unadmitted;
    totals_.promoted += part.promoted;
    totals_.demoted += part.demoted;
    totals_.hits += batch.flags & GENREC_HKV_COUNT ? part.hits : 0;
    evicted_.append(part.victims);
  }
  size_ += result->inserted - result->evicted;
  totals_.lookups += batch.flags & GENREC_HKV_COUNT ? batch.n : 0;
  totals_.inserted += result->inserted;
  totals_.evicted += result->evicted;
  totals_.refused += result->refused;
  totals_.unadmitted += result->unadmitted;
}

}  // namespace hkv
}  // namespace genrec
