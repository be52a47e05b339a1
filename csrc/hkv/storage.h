// Where rows live: typed planes (weights, optimizer state) over up to three tiers of memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "hkv/bucket.h"

namespace genrec {
namespace hkv {

enum class DType : int32_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

constexpr int kMaxTiers = 3;  // fast, overflow, file

// In place of a row's number: the key has none; it was to get one, but its buckets were full of rows that must stay.
constexpr int64_t kAbsentRow = -1, kRefusedRow = -2;

struct Plane {
  uint8_t* base[kMaxTiers];
  size_t row_bytes;
};

// Row r belongs to bucket r / 128 and has position r % 128 there; tier t holds positions [first[t], first[t + 1]) of
// every bucket.
struct StoreView {
  Plane weights, state;
  int32_t tiers;
  int32_t first[kMaxTiers + 1];
  int32_t dim;
  int32_t state_dim;  // floats of optimizer state in a row
  DType dtype;

  GENREC_HOST_DEVICE int tier_of(int position) const {
    int tier = 0;
    while (tier + 1 < tiers && position >= first[tier + 1]) ++tier;
    return tier;
  }

  GENREC_HOST_DEVICE uint8_t* row(const Plane& plane, int64_t row) const {
    if (tiers == 1) return plane.base[0] + static_cast<size_t>(row) * plane.row_bytes;
    const int position = static_cast<int>(row % kBucketSlots);
    const int tier = tier_of(position);
    const int64_t width = first[tier + 1] - first[tier];
    const int64_t place = row / kBucketSlots * width + position - first[tier];
    return plane.base[tier] + static_cast<size_t>(place) * plane.row_bytes;
  }
};

// A zeroed block of memory, anonymous or backed by a file that disappears with it.
class Arena {
 public:
  Arena() = default;
  Arena(size_t bytes, const std::string& directory);  // directory empty: anonymous. Throws std::runtime_error.
  Arena(Arena&& other) noexcept { swap(other); }
  Arena& operator=(Arena&& other) noexcept {
    swap(other);
    return *this;
  }
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;
  ~Arena();

  uint8_t* data() const { return data_; }
  size_t bytes() const { return bytes_; }
  void zero();

 private:
  void swap(Arena& other) noexcept;

  uint8_t* data_ = nullptr;
  size_t bytes_ = 0;
  int file_ = -1;
};

// Asks for large pages for a result that is about to be written for the first time: a fresh block of tens of megabytes
// costs more in page faults than in copying.
void advise_large_pages(void* memory, size_t bytes);

// The arenas of one table for a given number of buckets.
class RowStore {
 public:
  RowStore() = default;
  // `first` as in StoreView. `directory` is that of the file tier (the last one), empty where there is none.
  RowStore(uint64_t num_buckets, const StoreView& shape, const std::string& directory);

  const StoreView& view() const { return view_; }
  void copy_row(int64_t to, const RowStore& from_store, int64_t from);
  void swap_rows(int64_t a, int64_t b);
  void zero();
  size_t tier_bytes(int tier) const { return weights_[tier].bytes() + state_[tier].bytes(); }

 private:
  StoreView view_{};
  Arena weights_[kMaxTiers], state_[kMaxTiers];
};

}  // namespace hkv
}  // namespace genrec
