// Frequency admission: a key gets a row after n sightings. The counters are bounded: sets of `ways`, as many sets as
// the fully grown table has buckets; a full set forgets the least (count, step, mixed key). They are the memory of keys
// that have no row: no other trace of such a key is kept.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "hkv/hash.h"

namespace genrec {
namespace hkv {

class AdmissionCounters {
 public:
  AdmissionCounters() = default;
  AdmissionCounters(uint64_t sets, int32_t ways) : sets_(sets), ways_(ways), entries_(sets * ways) {}

  bool enabled() const { return ways_ > 0; }
  int32_t ways() const { return ways_; }
  uint64_t sets() const { return sets_; }

  // Adds sightings and returns the key's count. A key counts once in a step, so that a repeated attempt adds nothing.
  uint32_t count(int64_t key, uint32_t sightings, uint32_t step) {
    Entry* entry = find(key);
    if (entry == nullptr) {
      entry = least(key);
      *entry = {key, 0, 0};
    }
    if (entry->step != step || entry->count == 0) {
      entry->count = sightings > UINT32_MAX - entry->count ? UINT32_MAX : entry->count + sightings;
      entry->step = step;
    }
    return entry->count;
  }

  void forget(int64_t key) {
    if (Entry* entry = find(key)) *entry = Entry{};
  }

  // What was read from a checkpoint.
  void restore(int64_t key, uint32_t count, uint32_t step) {
    Entry* entry = find(key);
    if (entry == nullptr) entry = least(key);
    *entry = {key, count, step};
  }

  template <typename Visit>
  void visit(Visit&& visit) const {
    for (const Entry& entry : entries_) {
      if (entry.count != 0) visit(entry.key, entry.count, entry.step);
    }
  }

  void clear() { std::fill(entries_.begin(), entries_.end(), Entry{}); }

 private:
  struct Entry {
    int64_t key = 0;
    uint32_t count = 0;  // 0: free
    uint32_t step = 0;
  };

  Entry* set_of(int64_t key) { return &entries_[first_bucket(mix64(static_cast<uint64_t>(key)), sets_) * ways_]; }

  Entry* find(int64_t key) {
    Entry* first = set_of(key);
    for (int32_t way = 0; way < ways_; ++way) {
      if (first[way].count != 0 && first[way].key == key) return first + way;
    }
    return nullptr;
  }

  Entry* least(int64_t key) {
    Entry* first = set_of(key);
    return std::min_element(first, first + ways_, [](const Entry& a, const Entry& b) {
      if (a.count != b.count || a.count == 0) return a.count < b.count;
      if (a.step != b.step) return a.step < b.step;
      return mix64(static_cast<uint64_t>(a.key)) < mix64(static_cast<uint64_t>(b.key));
    });
  }

  uint64_t sets_ = 0;
  int32_t ways_ = 0;
  std::vector<Entry> entries_;
};

}  // namespace hkv
}  // namespace genrec
