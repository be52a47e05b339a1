// The one place where a key becomes a rank, a bucket and a digest. Host and device, training, load and export all use
// it.
#pragma once

#include <cstdint>

#include "common/macros.h"

namespace genrec {
namespace hkv {

constexpr int kBucketSlots = 128;
// Two-choice tables keep both buckets of a key inside one block, so that a block is still one unit of work.
constexpr uint64_t kBlockBuckets = 64;

// Finalizer of MurmurHash3 (A. Appleby): a bijection on 64 bits, so mixed keys can be turned back.
GENREC_HOST_DEVICE inline uint64_t mix64(uint64_t k) {
  k ^= k >> 33;
  k *= 0xff51afd7ed558ccdull;
  k ^= k >> 33;
  k *= 0xc4ceb9fe1a85ec53ull;
  k ^= k >> 33;
  return k;
}

// Inverse of an odd number modulo 2^64 (Newton's iteration doubles the right bits).
GENREC_HOST_DEVICE constexpr uint64_t odd_inverse(uint64_t a) {
  uint64_t x = a;
  for (int i = 0; i < 6; ++i) x *= 2 - a * x;
  return x;
}

GENREC_HOST_DEVICE inline uint64_t unmix64(uint64_t k) {
  k ^= k >> 33;
  k *= odd_inverse(0xc4ceb9fe1a85ec53ull);
  k ^= k >> 33;
  k *= odd_inverse(0xff51afd7ed558ccdull);
  k ^= k >> 33;
  return k;
}

GENREC_HOST_DEVICE inline uint64_t mulhi64(uint64_t a, uint64_t b) {
#if defined(__CUDA_ARCH__)
  return __umul64hi(a, b);
#else
  return static_cast<uint64_t>((static_cast<unsigned __int128>(a) * b) >> 64);
#endif
}

// Rank that owns a key; `mixed` is mix64(key). Equal to what FBGEMM's bucketize does with mixed keys.
GENREC_HOST_DEVICE inline uint64_t owner_rank(uint64_t mixed, uint64_t world_size) { return mixed % world_size; }

// The top bits choose the bucket: any number of buckets will do, buckets lie in the order of the mixed keys, and
// doubling splits bucket b into 2b and 2b + 1.
GENREC_HOST_DEVICE inline uint64_t first_bucket(uint64_t mixed, uint64_t num_buckets) {
  return mulhi64(mixed, num_buckets);
}

// The other bucket of a two-choice table: inside the first one's block, different from it unless the block has one.
GENREC_HOST_DEVICE inline uint64_t second_bucket(uint64_t mixed, uint64_t first, uint64_t num_buckets) {
  const uint64_t base = first / kBlockBuckets * kBlockBuckets;
  const uint64_t size = num_buckets - base < kBlockBuckets ? num_buckets - base : kBlockBuckets;
  if (size == 1) return first;
  const uint64_t second = base + (((mixed >> 8) & 0xffff) * size >> 16);
  return second != first ? second : base + (second - base + 1) % size;
}

// 1 to 255; 0 says that the slot is empty, so that no key has to be reserved for it.
GENREC_HOST_DEVICE inline uint8_t digest_of(uint64_t mixed) {
  return static_cast<uint8_t>(((mixed >> 24 & 0xff) * 255 >> 8) + 1);
}

}  // namespace hkv
}  // namespace genrec
