// What the kernels are launched with.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include "attention/ds_store.h"

namespace genrec::attention {

// A (rows, heads, dim) tensor that results are written to; strides in elements, dim contiguous.
struct Output {
  void* data;
  int64_t row_stride, head_stride;
  int dim;
};

// A list in device memory: its length, then its tiles.
struct WorkList {
  const int* length;
  const TileRecord* tiles;
};

struct Common {
  MaskRule rule;
  int heads;
  float half_alpha;     // alpha / 2: SiLU(x) = h + h tanh(h) with h = x / 2
  float scale;          // of the weights, where `scales` is null
  const float* scales;  // (sequences,) or null
  int* counter;         // zero before the launch; units of work taken
};

// What is added to alpha <q, k>: nothing, a sum of two table entries (see genrec.attention.RelativeBias), or a matrix.
enum class Bias : int { kNone = 0, kRelative = 1, kDense = 2 };

// The halved bias of whole sequences, where the dS of one head would lie (bias_store.h).
struct BiasStore {
  const void* data;  // null: none
  const int* first;  // as DsStore has them
  const int* left;
};

struct RelativeBias {
  const float* position;  // (2 max_positions - 1,), or null
  const float* time;      // (buckets,), or null
  const int64_t* edges;   // (buckets - 1,): first distance of each bucket but the first
  const int64_t* key_times;
  const int64_t* query_times;  // or null: the next key's time, the last key's own
  int max_positions, buckets;
  // Sums of the gradients, zero before: for each block and each of its warps that sum, a table. Null: not wanted.
  float* position_sums;
  float* time_sums;
  BiasStore store;
};

struct DenseBias {
  const float* data;
  int64_t batch_stride, head_stride, row_stride;  // a head stride of 0: shared by the heads
  float* gradient;  // zero before; null: not wanted
  int64_t gradient_batch_stride, gradient_head_stride, gradient_row_stride;
};

template <Bias kBias>
struct BiasOf {};
template <>
struct BiasOf<Bias::kRelative> {
  using Params = RelativeBias;
};
template <>
struct BiasOf<Bias::kDense> {
  using Params = DenseBias;
};

// A kernel's parameters with those of its bias behind them.
template <class Base, Bias kBias>
struct BiasedParams : Base {
  typename BiasOf<kBias>::Params bias;
};

// Rows that one box of the copy engine holds where kernels of different tiles read the same tensors.
constexpr int kBoxRows = 64;

struct ForwardParams {
  CUtensorMap q, k, v;
  Common common;
  WorkList list;  // tiles of queries
  Output out;
};

struct BackwardParams {
  CUtensorMap q, k, v, d_out;
  Common common;
  WorkList list;  // tiles of keys
  Output dk, dv;
  // dQ / (alpha * scale), fp32, zero before the launch (where sequences are stored: zeroed by clear_dq_kernel): (padded
  // tile, head, dqk columns x rows in register order).
  float* dq_sum;
  // Null, or (padded tile, head) zeros: how many key tiles have added to that tile of dQ. Fixes the order of sums.
  int* turns;
  Output dq;  // of passes of its own (backward_stored.h, backward_queries.h), which have tiles of queries in their lists
  DsStore store;
};

struct ConvertParams {
  Common common;
  WorkList list;  // tiles of queries
  const float* dq_sum;
  Output dq;
  DsStore store;  // dQ of sequences that have a place there is another kernel's
};

}  // namespace genrec::attention
