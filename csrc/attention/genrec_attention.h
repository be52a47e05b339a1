// C interface of the CUTLASS attention kernels for Hopper (compute capability 9.0): pointers, sizes, strides, a stream.
// Functions that can fail return 0, or -1 with a message from genrec_attention_error(). All work is queued on the
// stream, of the current device; nothing waits for it. Calls from several threads are fine.
#pragma once

#include <stdint.h>

#include "common/macros.h"

// A (rows, heads, dim) tensor in device memory: 16-byte aligned, dim contiguous, strides in elements and multiples of 8.
typedef struct {
  void* data;
  int64_t row_stride, head_stride;
} genrec_attention_tensor;

// What is added to alpha <q, k>. Relative: position[j - i + max_positions - 1] + time[bucket(t'_i - t_j)], i and j key
// rows; a distance lies in bucket b where edges[b - 1] <= |distance| < edges[b]. Dense: an fp32 matrix for each sequence.
typedef struct {
  int32_t kind;                  // 0 none, 1 relative, 2 dense
  int32_t max_positions;         // no less than the longest key sequence
  int32_t buckets;
  const float* position;         // (2 max_positions - 1,), or null
  const float* time;             // (buckets,), or null
  const int64_t* edges;          // (buckets - 1,), rising
  const int64_t* key_times;      // (key_rows,)
  const int64_t* query_times;    // (query_rows,), or null: the next key row's time, the last one's own
  const float* dense;            // (sequences, heads or 1, queries, keys), keys contiguous; strides in elements
  int64_t dense_batch_stride, dense_head_stride, dense_row_stride;  // head stride 0: shared by the heads
  // Gradients that the backward pass writes; null where none is wanted. d_dense must be zero before.
  float* d_position;
  float* d_time;
  float* d_dense;
  int64_t d_dense_batch_stride, d_dense_head_stride, d_dense_row_stride;  // head stride 0: heads add in any order
} genrec_attention_bias;

typedef struct {
  int32_t dtype;                 // 0 bf16, 1 fp16: of all tensors
  int32_t heads, qk_dim, v_dim;  // dims: multiples of 8
  int32_t sequences;
  int32_t target_group;          // 1 and up
  int32_t window;                // -1 for none
  int32_t causal;
  int64_t query_rows, key_rows;  // of all sequences together; below 2^31
  const int32_t* query_offsets;  // (sequences + 1,) in device memory, as all below
  const int32_t* key_offsets;
  const int32_t* contexts;       // (sequences,) or null
  const int32_t* targets;
  const float* scales;           // (sequences,), or null for `scale`
  float alpha, scale;
  genrec_attention_bias bias;
} genrec_attention_problem;

GENREC_API const char* genrec_attention_error(void);
GENREC_API int32_t genrec_attention_abi_version(void);
// The kernels that this library holds, "forward bf16 128 general relative" and the like, one a line.
GENREC_API const char* genrec_attention_instances(void);

// 0 where the library can run the problem (device pointers aren't looked at), else -1 and the reason.
GENREC_API int32_t genrec_attention_check(const genrec_attention_problem* problem, int32_t backward);

// A plan lists the batch's tiles. It depends on lengths, counts, mask, dtype and dims only: the layers of a model share
// it.
GENREC_API int64_t genrec_attention_plan_bytes(const genrec_attention_problem* problem);
GENREC_API int32_t genrec_attention_make_plan(const genrec_attention_problem* problem, void* plan, void* stream);

// Device memory for the relative bias of the batch that the forward pass leaves for the backward pass, which else tells it
// again; 16-byte aligned. 0: it leaves none, or GENREC_ATTENTION_KEPT_GIB has no room. -1 on errors. Both calls take it as
// `kept`, with one plan, or null for none.
GENREC_API int64_t genrec_attention_kept_bytes(const genrec_attention_problem* problem);

// Device memory that a call may write to; 16-byte aligned. `kept`: whether the call is given some. -1 on errors.
GENREC_API int64_t genrec_attention_workspace_bytes(const genrec_attention_problem* problem, int32_t backward,
                                                    int32_t deterministic, int32_t kept);
GENREC_API int32_t genrec_attention_forward(const genrec_attention_problem* problem, const void* plan, void* workspace,
                                            void* kept, const genrec_attention_tensor* q,
                                            const genrec_attention_tensor* k, const genrec_attention_tensor* v,
                                            const genrec_attention_tensor* out, void* stream);
GENREC_API int32_t genrec_attention_backward(const genrec_attention_problem* problem, const void* plan,
                                             void* workspace, const void* kept, int32_t deterministic,
                                             const genrec_attention_tensor* q, const genrec_attention_tensor* k,
                                             const genrec_attention_tensor* v, const genrec_attention_tensor* d_out,
                                             const genrec_attention_tensor* dq, const genrec_attention_tensor* dk,
                                             const genrec_attention_tensor* dv, void* stream);
