// The loops over keys and rows that are compiled once for each instruction set and chosen at run time.
#pragma once

#include <cstdint>

#include "hkv/bucket.h"
#include "hkv/initializer.h"
#include "hkv/optimizer.h"
#include "hkv/storage.h"

namespace genrec {
namespace hkv {

// A batch, sorted by unique key: key u is at positions[offsets[u] .. offsets[u + 1]) of the batch, in rising order.
struct Segments {
  const int64_t* rows;       // -1: the key has no row
  const int64_t* keys;
  const int32_t* offsets;
  const int32_t* positions;
};

// Which row of the gradient a position of the batch takes, and times what. Both may be null: its own, times one.
struct GradientMap {
  const int32_t* row;        // by position; for pooled lookups the bag
  const float* weight;       // by position
};

struct Kernels {
  const char* name;

  // Slots of n keys (bucket * 128 + slot), -1 where absent. Reads only.
  void (*find)(const IndexView& view, const int64_t* keys, int64_t n, int64_t* slots);

  // out[i * dim ...] = row rows_at[i], for i in [begin, end). A key without a row (-1) takes its initial row where
  // `missing` is null, else that constant; a refused one (-2) always its initial row. In the order of the batch: the result is larger than the rows that it
  // repeats, so it is the writing that must be sequential.
  void (*gather)(const StoreView& store, const Initializer& init, const float* missing,
                           const int64_t* rows_at, const int64_t* keys, int64_t begin, int64_t end, float* out);

  // out[bag] = sum over positions [offsets[bag], offsets[bag + 1]) of weight * row, for bags [begin, end).
  void (*pool)(const StoreView& store, const Initializer& init, const float* missing, const int64_t* rows_at,
               const int64_t* keys, const int64_t* offsets, const float* weights, int64_t begin, int64_t end,
               float* scratch, float* out);

  // Sums the gradients of unique keys [begin, end), each over its positions in rising order, and updates their rows.
  // `scratch` has room for dim floats.
  void (*update)(const StoreView& store, const OptimizerParams& params, const Segments& batch, const GradientMap& map,
                 const float* gradient, int64_t begin, int64_t end, float* scratch);

  // Initial weights and zero state.
  void (*initialize)(const StoreView& store, const Initializer& init, int64_t row, int64_t key);

  void (*read_row)(const StoreView& store, int64_t row, float* weights);
  void (*write_row)(const StoreView& store, int64_t row, const float* weights);
};

// The widest that the machine runs; GENREC_HKV_ISA=generic|avx2|avx512 in the environment asks for another.
const Kernels& kernels();

const Kernels* generic_kernels();
const Kernels* avx2_kernels();    // null where not built
const Kernels* avx512_kernels();  // null where not built

}  // namespace hkv
}  // namespace genrec
