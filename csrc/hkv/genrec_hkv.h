// C interface of the hierarchical key-value table's CPU engine: pointers and sizes only. Functions that can fail return
// 0, or -1 with a message from genrec_hkv_error(). A table serves one call at a time; further callers wait.
#pragma once

#include <stdint.h>

#include "common/macros.h"

typedef struct {
  int32_t dim;
  int32_t dtype;                 // 0 fp32, 1 fp16, 2 bf16
  int32_t score_mode;            // 0 LRU, 1 LFU, 2 epoch-LFU, 3 custom, 4 no eviction
  int32_t choices;               // buckets that a key may lie in: 1 or 2
  int32_t optimizer;             // 0 SGD, 1 Adam, 2 AdamW, 3 Adagrad, 4 row-wise Adagrad
  int32_t record_evicted;        // keep evicted rows for genrec_hkv_pop_evicted
  int64_t initial_buckets;       // of 128 slots
  int64_t max_buckets;
  double max_load_factor;        // grow above this while there is room to
  int32_t fast_positions;        // rows of a bucket's 128 in the fast tier,
  int32_t overflow_positions;    // in the overflow tier; the rest is in the file tier
  int32_t admission_threshold;   // sightings before a key gets a row; 0 and 1: at once
  int32_t admission_ways;        // counters for each bucket
  int32_t init_kind;             // 0 constant, 1 uniform, 2 normal, 3 truncated normal
  int32_t reserved;
  uint64_t init_seed;            // of (seed, table)
  double init_a, init_b;         // constant: value; uniform: low, high; normal: mean, std
} genrec_hkv_options;

typedef struct {
  float learning_rate, beta1, beta2, eps, weight_decay, max_gradient;
  int64_t optimizer_step;        // t of Adam's bias correction, from 1
} genrec_hkv_update_params;

typedef struct {
  int64_t size, capacity, max_capacity, generation;
  int64_t lookups, hits, inserted, evicted, refused, unadmitted, promoted, demoted;
  int64_t index_bytes, counter_bytes;
  int64_t tier_bytes[3];
  int64_t tier_rows[3];
  int64_t pending_evicted;
} genrec_hkv_info;

enum {
  GENREC_HKV_INSERT = 1,         // absent keys get rows
  GENREC_HKV_ADMIT = 2,          // ... after admission
  GENREC_HKV_TOUCH = 4,          // steps and scores change
  GENREC_HKV_UPDATE = 8,         // rows count as updated at this step
  GENREC_HKV_COUNT = 16          // hits and lookups are counted
};

typedef struct {
  const int64_t* keys;
  int64_t n;
  uint32_t step;                 // of this batch, from 1
  uint32_t pin_floor;            // slots accessed at this step or later keep their place
  uint32_t epoch;
  uint32_t flags;
  const uint64_t* scores;        // custom scores by position, or null
} genrec_hkv_batch;

typedef struct {
  int64_t* rows;                 // by unique key, -1 without a row, -2 where one was refused; room for n
  int64_t* keys;                 // by unique key; room for n
  int32_t* offsets;              // room for n + 1
  int32_t* positions;            // room for n
  int64_t* rows_at;              // by position, or null
  uint8_t* found;                // by position: the key had a row before the call; or null
  int64_t unique, inserted, evicted, refused, unadmitted;
} genrec_hkv_lookup_result;

typedef void* genrec_hkv_table;

GENREC_API const char* genrec_hkv_error(void);
GENREC_API int32_t genrec_hkv_abi_version(void);
GENREC_API const char* genrec_hkv_isa(void);
GENREC_API void genrec_hkv_mix(const int64_t* keys, int64_t n, int32_t inverse, int64_t* out);
// The rank of `world_size` that owns each key.
GENREC_API void genrec_hkv_owners(const int64_t* keys, int64_t n, int64_t world_size, int64_t* out);

GENREC_API int32_t genrec_hkv_create(const genrec_hkv_options* options, const char* file_directory,
                                     genrec_hkv_table* table);
GENREC_API void genrec_hkv_destroy(genrec_hkv_table table);
// tier_rows are counted (a walk over all slots where there are tiers) or 0.
GENREC_API void genrec_hkv_get_info(genrec_hkv_table table, int32_t count_tiers, genrec_hkv_info* info);
// Of (seed, table): how rows start from now on.
GENREC_API int32_t genrec_hkv_set_init_seed(genrec_hkv_table table, uint64_t seed);

// Reads only. rows[i] is -1 where keys[i] is absent.
GENREC_API int32_t genrec_hkv_find(genrec_hkv_table table, const int64_t* keys, int64_t n, int32_t threads,
                                   int64_t* rows);
GENREC_API int32_t genrec_hkv_lookup(genrec_hkv_table table, const genrec_hkv_batch* batch, int32_t threads,
                                     genrec_hkv_lookup_result* result);
// out: (n, dim) fp32. `missing`: constant for keys without a row (-1); null for their initial rows. A refused
// key (-2) always gets its initial row.
GENREC_API int32_t genrec_hkv_gather(genrec_hkv_table table, const int64_t* rows_at, const int64_t* keys, int64_t n,
                                     const float* missing, int32_t threads, float* out);
// out: (bags, dim) fp32.
GENREC_API int32_t genrec_hkv_pool(genrec_hkv_table table, const int64_t* rows_at, const int64_t* keys,
                                   const int64_t* bag_offsets, int64_t bags, const float* weights,
                                   const float* missing, int32_t threads, float* out);
GENREC_API int32_t genrec_hkv_update(genrec_hkv_table table, const genrec_hkv_update_params* params,
                                     const int64_t* rows, const int64_t* keys, const int32_t* offsets,
                                     const int32_t* positions, int64_t unique, const int32_t* gradient_row,
                                     const float* gradient_weight, const float* gradient, int32_t threads);

// Rows by index; -1 is skipped. weights: (n, dim), state: (n, state floats); either may be null.
GENREC_API int32_t genrec_hkv_read_rows(genrec_hkv_table table, const int64_t* rows, int64_t n, int32_t threads,
                                        float* weights, float* state);
GENREC_API int32_t genrec_hkv_write_rows(genrec_hkv_table table, const int64_t* rows, int64_t n, const float* weights,
                                         const float* state);
// weights += deltas summed over each unique key's positions, in rising order.
GENREC_API int32_t genrec_hkv_accumulate(genrec_hkv_table table, const int64_t* rows, const int32_t* offsets,
                                         const int32_t* positions, int64_t unique, const float* deltas,
                                         int32_t threads);
// Scores, steps and update steps of rows, as a checkpoint has them; null ones stay.
GENREC_API int32_t genrec_hkv_set_meta(genrec_hkv_table table, const int64_t* keys, int64_t n, const uint64_t* scores,
                                       const uint32_t* steps, const uint32_t* updates);
GENREC_API int32_t genrec_hkv_get_meta(genrec_hkv_table table, const int64_t* keys, int64_t n, uint64_t* scores,
                                       uint32_t* steps, uint32_t* updates);
GENREC_API int32_t genrec_hkv_erase(genrec_hkv_table table, const int64_t* keys, int64_t n, int64_t* erased);
// Slots with first_score <= score <= last_score and first_step <= step <= last_step.
GENREC_API int32_t genrec_hkv_erase_if(genrec_hkv_table table, uint64_t first_score, uint64_t last_score,
                                       uint32_t first_step, uint32_t last_step, int64_t* erased);
// Slots of buckets [begin, end), sorted by mixed key within a block, updated at `min_update` or later and with
// min_score <= score. Outputs need room for 128 * (end - begin).
GENREC_API int32_t genrec_hkv_export(genrec_hkv_table table, int64_t begin, int64_t end, uint32_t min_update,
                                     uint64_t min_score, int64_t* count, int64_t* keys, int64_t* rows,
                                     uint64_t* scores, uint32_t* steps, uint32_t* updates);
GENREC_API int32_t genrec_hkv_clear(genrec_hkv_table table);
GENREC_API int32_t genrec_hkv_reserve(genrec_hkv_table table, int64_t rows, int32_t threads);
GENREC_API int32_t genrec_hkv_pop_evicted(genrec_hkv_table table, int64_t n, int64_t* keys, uint64_t* scores,
                                          float* weights, float* state);
GENREC_API int32_t genrec_hkv_export_counters(genrec_hkv_table table, int64_t n, int64_t* count, int64_t* keys,
                                              uint32_t* counts, uint32_t* steps);
// Replaces all counters.
GENREC_API int32_t genrec_hkv_restore_counters(genrec_hkv_table table, int64_t n, const int64_t* keys,
                                               const uint32_t* counts, const uint32_t* steps);
