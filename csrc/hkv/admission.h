// Frequency admission: a key gets a row after n sightings. The counters are bounded: each bucket of the table has a set of
// `ways` of them, and a full set forgets the least (count, step, way). A counted key that has no row is known to have none.
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
  uint32_t count(uint64_t set, int64_t key, uint32_t sightings, uint32_t step) {
    Entry* entry = find(set, key);
    if (entry == nullptr) {
      entry = least(set);
      *entry = {key, 0, 0};
    }
    if (entry->step != step || entry->count == 0) {
      entry->count = sightings > UINT32_MAX - entry->count ? UINT32_MAX : entry->count + sightings;
      entry->step = step;
    }
    return entry->count;
  }

  void forget(uint64_t set, int64_t key) {
    if (Entry* entry = find(set, key)) *entry = Entry{};
  }

  // What was read from a checkpoint.
  void restore(uint64_t set, int64_t key, uint32_t count, uint32_t step) {
    Entry* entry = find(set, key);
    if (entry == nullptr) entry = least(set);
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

  Entry* find(uint64_t set, int64_t key) {
    Entry* first = &entries_[set * ways_];
    for (int32_t way = 0; way < ways_; ++way) {
      if (first[way].count != 0 && first[way].key == key) return first + way;
    }
    return nullptr;
  }

  Entry* least(uint64_t set) {
    Entry* first = &entries_[set * ways_];
    return std::min_element(first, first + ways_, [](const Entry& a, const Entry& b) {
      return a.count != b.count ? a.count < b.count : a.step < b.step;
    });
  }

  uint64_t sets_ = 0;
  int32_t ways_ = 0;
  std::vector<Entry> entries_;
};

}  // namespace hkv
}  // namespace genrec
