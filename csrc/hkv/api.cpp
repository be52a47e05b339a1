#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "common/thread_pool.h"
#include "hkv/table.h"

using genrec::ThreadPool;
using namespace genrec::hkv;

namespace {

thread_local std::string last_error;

constexpr int64_t kChunk = 256;

template <typename Body>
int32_t guarded(Body&& body) {
  try {
    body();
    return 0;
  } catch (const std::exception& error) {
    last_error = error.what();
    return -1;
  }
}

// Runs body(table) alone.
template <typename Body>
int32_t locked(genrec_hkv_table handle, Body&& body) {
  return guarded([&] {
    Table& table = *static_cast<Table*>(handle);
    std::lock_guard<std::mutex> lock(table.mutex());
    body(table);
  });
}

// body(begin, end) over chunks of [0, n).
template <typename Body>
void chunked(int64_t n, int threads, Body&& body) {
  ThreadPool::instance().run((n + kChunk - 1) / kChunk, threads,
                             [&](int64_t chunk) { body(chunk * kChunk, std::min(n, (chunk + 1) * kChunk)); });
}

}  // namespace

const char* genrec_hkv_error(void) { return last_error.c_str(); }
int32_t genrec_hkv_abi_version(void) { return 3; }
const char* genrec_hkv_isa(void) { return kernels().name; }

void genrec_hkv_mix(const int64_t* keys, int64_t n, int32_t inverse, int64_t* out) {
  if (inverse) {
    for (int64_t i = 0; i < n; ++i) out[i] = static_cast<int64_t>(unmix64(static_cast<uint64_t>(keys[i])));
  } else {
    for (int64_t i = 0; i < n; ++i) out[i] = static_cast<int64_t>(mix64(static_cast<uint64_t>(keys[i])));
  }
}

void genrec_hkv_owners(const int64_t* keys, int64_t n, int64_t world_size, int64_t* out) {
  const uint64_t ranks = static_cast<uint64_t>(world_size);
  for (int64_t i = 0; i < n; ++i) {
    out[i] = static_cast<int64_t>(owner_rank(mix64(static_cast<uint64_t>(keys[i])), ranks));
  }
}

int32_t genrec_hkv_create(const genrec_hkv_options* options, const char* file_directory, genrec_hkv_table* table) {
  return guarded([&] { *table = new Table(*options, file_directory != nullptr ? file_directory : ""); });
}

void genrec_hkv_destroy(genrec_hkv_table table) { delete static_cast<Table*>(table); }

void genrec_hkv_get_info(genrec_hkv_table table, int32_t count_tiers, genrec_hkv_info* info) {
  locked(table, [&](Table& t) { *info = t.info(count_tiers != 0); });
}

int32_t genrec_hkv_set_init_seed(genrec_hkv_table table, uint64_t seed) {
  return locked(table, [&](Table& t) { t.set_init_seed(seed); });
}

int32_t genrec_hkv_find(genrec_hkv_table table, const int64_t* keys, int64_t n, int32_t threads, int64_t* rows) {
  return locked(table, [&](Table& t) { t.find(keys, n, threads, rows); });
}

int32_t genrec_hkv_lookup(genrec_hkv_table table, const genrec_hkv_batch* batch, int32_t threads,
                          genrec_hkv_lookup_result* result) {
  return locked(table, [&](Table& t) { t.lookup(*batch, threads, result); });
}

int32_t genrec_hkv_gather(genrec_hkv_table table, const int64_t* rows_at, const int64_t* keys, int64_t n,
                          const float* missing, int32_t threads, float* out) {
  return locked(table, [&](Table& t) {
    advise_large_pages(out, 4 * static_cast<size_t>(n) * t.store().dim);
    chunked(n, threads, [&](int64_t begin, int64_t end) {
      kernels().gather(t.store(), t.initializer(), missing, rows_at, keys, begin, end, out);
    });
  });
}

int32_t genrec_hkv_pool(genrec_hkv_table table, const int64_t* rows_at, const int64_t* keys,
                        const int64_t* bag_offsets, int64_t bags, const float* weights, const float* missing,
                        int32_t threads, float* out) {
  return locked(table, [&](Table& t) {
    advise_large_pages(out, 4 * static_cast<size_t>(bags) * t.store().dim);
    chunked(bags, threads, [&](int64_t begin, int64_t end) {
      std::vector<float> scratch(static_cast<size_t>(t.store().dim));
      kernels().pool(t.store(), t.initializer(), missing, rows_at, keys, bag_offsets, weights, begin, end,
                     scratch.data(), out);
    });
  });
}

int32_t genrec_hkv_update(genrec_hkv_table table, const genrec_hkv_update_params* params, const int64_t* rows,
                          const int64_t* keys, const int32_t* offsets, const int32_t* positions, int64_t unique,
                          const int32_t* gradient_row, const float* gradient_weight, const float* gradient,
                          int32_t threads) {
  return locked(table, [&](Table& t) {
    OptimizerParams p{};
    p.kind = t.optimizer();
    p.learning_rate = params->learning_rate;
    p.beta1 = params->beta1;
    p.beta2 = params->beta2;
    p.eps = params->eps;
    p.weight_decay = params->weight_decay;
    p.max_gradient = params->max_gradient;
    const double t_step = static_cast<double>(params->optimizer_step);
    p.step_size = static_cast<float>(p.learning_rate / (1.0 - std::pow(static_cast<double>(p.beta1), t_step)));
    p.bias2_sqrt = static_cast<float>(std::sqrt(1.0 - std::pow(static_cast<double>(p.beta2), t_step)));
    const Segments batch{rows, keys, offsets, positions};
    const GradientMap map{gradient_row, gradient_weight};
    chunked(unique, threads, [&](int64_t begin, int64_t end) {
      std::vector<float> scratch(2 * static_cast<size_t>(t.store().dim));
      kernels().update(t.store(), p, batch, map, gradient, begin, end, scratch.data());
    });
  });
}

int32_t genrec_hkv_read_rows(genrec_hkv_table table, const int64_t* rows, int64_t n, int32_t threads, float* weights,
                             float* state) {
  return locked(table, [&](Table& t) {
    const StoreView& store = t.store();
    chunked(n, threads, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        if (rows[i] < 0) continue;
        if (weights != nullptr) kernels().read_row(store, rows[i], weights + i * store.dim);
        if (state != nullptr && store.state_dim > 0) {
          std::memcpy(state + i * store.state_dim, store.row(store.state, rows[i]), store.state.row_bytes);
        }
      }
    });
  });
}

int32_t genrec_hkv_write_rows(genrec_hkv_table table, const int64_t* rows, int64_t n, const float* weights,
                              const float* state) {
  return locked(table, [&](Table& t) {
    const StoreView& store = t.store();
    for (int64_t i = 0; i < n; ++i) {
      if (rows[i] < 0) continue;
      if (weights != nullptr) kernels().write_row(store, rows[i], weights + i * store.dim);
      if (state != nullptr && store.state_dim > 0) {
        std::memcpy(store.row(store.state, rows[i]), state + i * store.state_dim, store.state.row_bytes);
      }
    }
  });
}

int32_t genrec_hkv_accumulate(genrec_hkv_table table, const int64_t* rows, const int32_t* offsets,
                              const int32_t* positions, int64_t unique, const float* deltas, int32_t threads) {
  return locked(table, [&](Table& t) {
    const int32_t dim = t.store().dim;
    chunked(unique, threads, [&](int64_t begin, int64_t end) {
      std::vector<float> row(static_cast<size_t>(dim));
      for (int64_t u = begin; u < end; ++u) {
        if (rows[u] < 0) continue;
        kernels().read_row(t.store(), rows[u], row.data());
        for (int32_t i = offsets[u]; i < offsets[u + 1]; ++i) {
          const float* delta = deltas + static_cast<int64_t>(positions[i]) * dim;
          for (int32_t d = 0; d < dim; ++d) row[d] += delta[d];
        }
        kernels().write_row(t.store(), rows[u], row.data());
      }
    });
  });
}

int32_t genrec_hkv_set_meta(genrec_hkv_table table, const int64_t* keys, int64_t n, const uint64_t* scores,
                            const uint32_t* steps, const uint32_t* updates) {
  return locked(table, [&](Table& t) { t.set_meta(keys, n, scores, steps, updates); });
}

int32_t genrec_hkv_get_meta(genrec_hkv_table table, const int64_t* keys, int64_t n, uint64_t* scores, uint32_t* steps,
                            uint32_t* updates) {
  return locked(table, [&](Table& t) { t.get_meta(keys, n, scores, steps, updates); });
}

int32_t genrec_hkv_erase(genrec_hkv_table table, const int64_t* keys, int64_t n, int64_t* erased) {
  return locked(table, [&](Table& t) { *erased = t.erase(keys, n); });
}

int32_t genrec_hkv_erase_if(genrec_hkv_table table, uint64_t first_score, uint64_t last_score, uint32_t first_step,
                            uint32_t last_step, int64_t* erased) {
  return locked(table, [&](Table& t) { *erased = t.erase_if(first_score, last_score, first_step, last_step); });
}

int32_t genrec_hkv_export(genrec_hkv_table table, int64_t begin, int64_t end, uint32_t min_update, uint64_t min_score,
                          int64_t* count, int64_t* keys, int64_t* rows, uint64_t* scores, uint32_t* steps,
                          uint32_t* updates) {
  return locked(table, [&](Table& t) {
    *count = t.export_slots(static_cast<uint64_t>(begin), static_cast<uint64_t>(end), min_update, min_score, keys, rows,
                            scores, steps, updates);
  });
}

int32_t genrec_hkv_clear(genrec_hkv_table table) {
  return locked(table, [&](Table& t) { t.clear(); });
}

int32_t genrec_hkv_reserve(genrec_hkv_table table, int64_t rows, int32_t threads) {
  return locked(table, [&](Table& t) { t.reserve(rows, threads); });
}

int32_t genrec_hkv_pop_evicted(genrec_hkv_table table, int64_t n, int64_t* keys, uint64_t* scores, float* weights,
                               float* state) {
  return locked(table, [&](Table& t) { t.pop_evicted(n, keys, scores, weights, state); });
}

int32_t genrec_hkv_export_counters(genrec_hkv_table table, int64_t n, int64_t* count, int64_t* keys, uint32_t* counts,
                                   uint32_t* steps) {
  return locked(table, [&](Table& t) { *count = t.export_counters(n, keys, counts, steps); });
}

int32_t genrec_hkv_restore_counters(genrec_hkv_table table, int64_t n, const int64_t* keys, const uint32_t* counts,
                                    const uint32_t* steps) {
  return locked(table, [&](Table& t) { t.restore_counters(n, keys, counts, steps); });
}
