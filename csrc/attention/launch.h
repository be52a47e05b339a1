// One kernel instantiation: how it is launched, and what the host must know of its shape.
#pragma once

#include <cstdint>

#include "attention/params.h"

namespace genrec::attention {

// Rows of the tiles of a shape: the boxes of the copy engine, and the lists of a plan.
struct ForwardBlocks {
  int queries, keys;
  // The first of two passes is over sequences whose relative bias is put into memory before.
  bool stores_bias = false;
};

struct BackwardBlocks {
  int queries, keys, passes;
  // Copies of the tables' gradients that each block sums, and each of the pass over stored dS.
  int16_t tables, stored_tables;
  int query_box, key_box;  // rows of the copy engine's boxes
  int dq_rows = 0;  // rows of the tiles of a last pass that gives dQ, by boxes of kBoxRows; 0: dQ is gathered in sums
  int stored_rows = 0;  // rows of the tiles of the second pass, which gives dQ of dS in memory; 0: there is none
  int stored_passes = 0;  // over those tiles, from the second pass on
  bool plain_keys = false;  // the first pass has the tiles of keys of the kernels without a bias

  bool gathers() const { return dq_rows == 0; }
  int listed_queries() const { return gathers() ? queries : dq_rows; }
};

// What of it counts depends on the instance's bias.
struct BiasParams {
  RelativeBias relative;
  DenseBias dense;
};

// table[e] = the sum of `count` copies' entries e.
struct SumParams {
  const float* copies;
  int count, entries;
  float* table;
};

struct ForwardInstance {
  const char* dtype;
  int dim;
  bool causal;
  Bias bias;
  ForwardBlocks blocks;
  // `pass` counts from 0; each needs a counter of its own.
  cudaError_t (*launch)(const ForwardParams&, const BiasParams&, int pass, int blocks, cudaStream_t);
};

// The batches that an instance is for, by their sequences' mean number of keys.
enum class SequenceLengths : int { kAll = 0, kShort = 1, kLong = 2 };
constexpr int64_t kLongMean = 2048;

struct BackwardInstance {
  const char* dtype;
  int dim;
  bool causal;
  Bias bias;
  SequenceLengths lengths;
  BackwardBlocks blocks;
  // `pass` counts from 0; each needs a counter of its own.
  cudaError_t (*launch)(const BackwardParams&, const BiasParams&, int pass, int blocks, cudaStream_t);
  cudaError_t (*convert)(const ConvertParams&, int blocks, cudaStream_t);
  // Null without tables.
  cudaError_t (*sum_tables)(const SumParams&, cudaStream_t);
};

// Puts the bias of all sequences that have a place into its store (bias_store.h). `list`: tiles of kCellQueries
// queries; `counter`: zero.
cudaError_t fill_bias(const RelativeBias& bias, const WorkList& list, const MaskRule& rule, int* counter,
                      int multiprocessors, cudaStream_t stream);

}  // namespace genrec::attention
