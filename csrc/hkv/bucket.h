// A bucket's memory, its scores, and the choice of slot, victim and tier. Shared by host and device.
#pragma once

#include <cstddef>
#include <cstdint>

#include "hkv/hash.h"

namespace genrec {
namespace hkv {

enum class ScoreMode : int32_t { kLru = 0, kLfu = 1, kEpochLfu = 2, kCustom = 3, kNoEviction = 4 };

// Byte offsets of a bucket's planes. Scores exist where the policy needs more than the step, positions where rows lie
// in more than one tier (slot s then owns row positions[s] of the bucket, a permutation of 0..127).
constexpr size_t kDigestOffset = 0;
constexpr size_t kKeyOffset = 128;
constexpr size_t kStepOffset = kKeyOffset + 8 * kBucketSlots;
constexpr size_t kUpdateOffset = kStepOffset + 4 * kBucketSlots;
constexpr size_t kMarkOffset = kUpdateOffset + 4 * kBucketSlots;
constexpr size_t kScoreOffset = kMarkOffset + 4 * kBucketSlots;

struct IndexView {
  uint8_t* base;
  size_t stride;
  uint64_t num_buckets;
  int32_t choices;
  int32_t has_scores;
  int32_t has_positions;

  GENREC_HOST_DEVICE uint8_t* bucket(uint64_t b) const { return base + b * stride; }
  GENREC_HOST_DEVICE uint8_t* digests(uint64_t b) const { return bucket(b) + kDigestOffset; }
  GENREC_HOST_DEVICE int64_t* keys(uint64_t b) const { return reinterpret_cast<int64_t*>(bucket(b) + kKeyOffset); }
  // Step of the last training access.
  GENREC_HOST_DEVICE uint32_t* steps(uint64_t b) const {
    return reinterpret_cast<uint32_t*>(bucket(b) + kStepOffset);
  }
  // Step of the last update of the row; indexed by the row's position.
  GENREC_HOST_DEVICE uint32_t* updates(uint64_t b) const {
    return reinterpret_cast<uint32_t*>(bucket(b) + kUpdateOffset);
  }
  // Scratch: the place of the slot's key in the list of the batch's unique keys.
  GENREC_HOST_DEVICE uint32_t* marks(uint64_t b) const {
    return reinterpret_cast<uint32_t*>(bucket(b) + kMarkOffset);
  }
  GENREC_HOST_DEVICE uint64_t* scores(uint64_t b) const {
    return reinterpret_cast<uint64_t*>(bucket(b) + kScoreOffset);
  }
  GENREC_HOST_DEVICE uint8_t* positions(uint64_t b) const {
    return bucket(b) + kScoreOffset + (has_scores ? 8 * kBucketSlots : 0);
  }
  GENREC_HOST_DEVICE uint64_t score(uint64_t b, int slot) const {
    return has_scores ? scores(b)[slot] : steps(b)[slot];
  }
  GENREC_HOST_DEVICE int position(uint64_t b, int slot) const { return has_positions ? positions(b)[slot] : slot; }
  GENREC_HOST_DEVICE int64_t row(uint64_t b, int slot) const {
    return static_cast<int64_t>(b) * kBucketSlots + position(b, slot);
  }
};

inline size_t bucket_bytes(bool has_scores, bool has_positions) {
  return kScoreOffset + (has_scores ? 8 * kBucketSlots : 0) + (has_positions ? kBucketSlots : 0);
}

// What an access adds to a score. `count` is how often the batch names the key; an epoch outranks every frequency.
GENREC_HOST_DEVICE inline uint64_t touched_score(ScoreMode mode, uint64_t old, uint64_t count, uint32_t epoch) {
  if (mode == ScoreMode::kLfu) return old + count < old ? ~0ull : old + count;
  if (mode == ScoreMode::kEpochLfu) {
    const uint64_t frequency = (old & 0xffffffffull) + count;
    return static_cast<uint64_t>(epoch) << 32 | (frequency > 0xffffffffull ? 0xffffffffull : frequency);
  }
  return old;
}

struct Candidate {
  uint64_t score;
  uint32_t step;
  int64_t slot;  // bucket * 128 + slot; -1 for none
  int64_t key;

  // The total order (score, step, mixed key): the least goes first. Ties are broken by the key, not by the slot, so
  // that a table that was saved and loaded, or grew, goes on as if it had not.
  GENREC_HOST_DEVICE bool before(const Candidate& other) const {
    if (other.slot < 0) return slot >= 0;
    if (slot < 0) return false;
    if (score != other.score) return score < other.score;
    if (step != other.step) return step < other.step;
    return mix64(static_cast<uint64_t>(key)) < mix64(static_cast<uint64_t>(other.key));
  }
};

// The least of a bucket's occupied slots with a row position in [first, last) and a step below `pin_floor`.
GENREC_HOST_DEVICE inline Candidate least_slot(const IndexView& view, uint64_t b, uint32_t pin_floor, int first,
                                               int last) {
  Candidate best{0, 0, -1, 0};
  const int64_t* keys = view.keys(b);
  const uint8_t* digests = view.digests(b);
  const uint32_t* steps = view.steps(b);
  for (int s = 0; s < kBucketSlots; ++s) {
    if (digests[s] == 0 || steps[s] >= pin_floor) continue;
    const int position = view.position(b, s);
    if (position < first || position >= last) continue;
    const Candidate candidate{view.score(b, s), steps[s], static_cast<int64_t>(b) * kBucketSlots + s, keys[s]};
    if (candidate.before(best)) best = candidate;
  }
  return best;
}

// The empty slot whose row lies in the fastest tier, the lowest among equals; -1 where the bucket is full.
GENREC_HOST_DEVICE inline int empty_slot(const IndexView& view, uint64_t b) {
  const uint8_t* digests = view.digests(b);
  int best = -1;
  for (int s = 0; s < kBucketSlots; ++s) {
    if (digests[s] != 0) continue;
    if (!view.has_positions) return s;
    if (best < 0 || view.position(b, s) < view.position(b, best)) best = s;
  }
  return best;
}

GENREC_HOST_DEVICE inline int occupied_slots(const IndexView& view, uint64_t b) {
  const uint8_t* digests = view.digests(b);
  int used = 0;
  for (int s = 0; s < kBucketSlots; ++s) used += digests[s] != 0;
  return used;
}

// Where a key that the table lacks shall go.
struct Placement {
  int64_t slot;  // bucket * 128 + slot; -1: nowhere
  bool evicts;   // the key that is there must leave first
};

// A free slot of the key's bucket, of the emptier one where it has two (the first of equals); in full buckets the least
// of both, if the table may evict.
GENREC_HOST_DEVICE inline Placement placement(const IndexView& view, uint64_t mixed, uint32_t pin_floor,
                                              bool may_evict) {
  uint64_t bucket = first_bucket(mixed, view.num_buckets), other = bucket;
  if (view.choices == 2) {
    const uint64_t second = second_bucket(mixed, bucket, view.num_buckets);
    const bool emptier = occupied_slots(view, second) < occupied_slots(view, bucket);
    other = emptier ? bucket : second;
    bucket = emptier ? second : bucket;
  }
  const int empty = empty_slot(view, bucket);
  if (empty >= 0) return {static_cast<int64_t>(bucket) * kBucketSlots + empty, false};
  if (!may_evict) return {-1, false};
  Candidate victim = least_slot(view, bucket, pin_floor, 0, kBucketSlots);
  if (other != bucket) {
    const Candidate rival = least_slot(view, other, pin_floor, 0, kBucketSlots);
    if (rival.before(victim)) victim = rival;
  }
  return {victim.slot, victim.slot >= 0};
}

// Slot s was touched: the slot of its bucket with a row in the faster tier of positions [first, last) whose row it takes
// in exchange. An empty slot, else the tier's least if that would be evicted before s; -1 where s stays.
GENREC_HOST_DEVICE inline int promotion_slot(const IndexView& view, uint64_t b, int s, uint32_t pin_floor, int first,
                                             int last) {
  const uint8_t* digests = view.digests(b);
  const uint8_t* positions = view.positions(b);
  for (int empty = 0; empty < kBucketSlots; ++empty) {
    if (digests[empty] == 0 && positions[empty] >= first && positions[empty] < last) return empty;
  }
  const int64_t slot = static_cast<int64_t>(b) * kBucketSlots + s;
  const Candidate here{view.score(b, s), view.steps(b)[s], slot, view.keys(b)[s]};
  const Candidate least = least_slot(view, b, pin_floor, first, last);
  return least.slot >= 0 && least.before(here) ? static_cast<int>(least.slot % kBucketSlots) : -1;
}

}  // namespace hkv
}  // namespace genrec
