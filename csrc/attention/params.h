// What the kernels are launched with.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include "attention/schedule.h"

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
  // dQ / (alpha * scale), fp32, zero before the launch: (padded tile, head, dqk columns x rows in register order).
  float* dq_sum;
  // Null, or (padded tile, head) zeros: how many key tiles have added to that tile of dQ. Fixes the order of sums.
  int* turns;
};

struct ConvertParams {
  Common common;
  WorkList list;  // tiles of queries
  const float* dq_sum;
  Output dq;
};

}  // namespace genrec::attention
