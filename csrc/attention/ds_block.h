// Blocks of 64 keys x 64 queries of dS in shared memory, as the warps that sum tables read them: 8 queries of a key, a
// piece's row, are 16 bytes side by side, wherever they lie.
#pragma once

#include "attention/device.h"

namespace genrec::attention {

// 64 rows of keys, of 128 bytes each, swizzled (score_offset).
struct SwizzledBlock {
  static constexpr int kEightKeys = 1024;  // bytes from a key to that 8 further

  // Where the 8 queries of piece `piece` lie of a key.
  __device__ static constexpr int at(int key, int piece) { return key * 128 + (key % 8 ^ piece) * 16; }
  // Which key is the k-th of the lanes that read a piece each, from the same bank never two of eight.
  __device__ static constexpr int key(int k, int) { return k; }
  // From the k-th to a later one, the swizzle aside.
  __device__ static constexpr int rows(int k) { return k * 128; }
};

// Blocks of 8 x 8, 128 bytes each, keys' before queries' (CellLayout).
struct TiledBlock {
  static constexpr int kEightKeys = 128;

  __device__ static constexpr int at(int key, int piece) { return piece * 1024 + key * 16; }
  __device__ static constexpr int key(int k, int piece) { return k ^ piece; }
  __device__ static constexpr int rows(int k) { return k / 8 * 128; }
};

}  // namespace genrec::attention
