// The engine's own tests, for runs under a sanitizer: random operations from several threads' worth of work, checked
// against a std::map. Exits with 0 when all is well.
#include <cstdio>
#include <cstdlib>
#include <map>
#include <random>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "common/thread_pool.h"
#include "hkv/genrec_hkv.h"
#include "hkv/hash.h"
#include "hkv/initializer.h"

namespace {

#define CHECK(condition)                                                        \
  do {                                                                          \
    if (!(condition)) {                                                         \
      std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition);      \
      std::exit(1);                                                             \
    }                                                                           \
  } while (0)

constexpr int32_t kDim = 5;

struct Config {
  const char* name;
  int32_t score_mode, choices, optimizer, dtype, fast, overflow, admission;
  int64_t initial_buckets, max_buckets;
};

genrec_hkv_table make(const Config& config) {
  genrec_hkv_options options{};
  options.dim = kDim;
  options.dtype = config.dtype;
  options.score_mode = config.score_mode;
  options.choices = config.choices;
  options.optimizer = config.optimizer;
  options.record_evicted = 1;
  options.initial_buckets = config.initial_buckets;
  options.max_buckets = config.max_buckets;
  options.max_load_factor = 0.75;
  options.fast_positions = config.fast;
  options.overflow_positions = config.overflow;
  options.admission_threshold = config.admission;
  options.admission_ways = 16;
  options.init_kind = 3;
  options.init_seed = 42;
  options.init_b = 1.0;
  genrec_hkv_table table = nullptr;
  CHECK(genrec_hkv_create(&options, "/tmp", &table) == 0);
  return table;
}

struct Result {
  explicit Result(size_t n) : rows(n), keys(n), offsets(n + 1), positions(n), rows_at(n), found(n) {
    view = {rows.data(), keys.data(), offsets.data(), positions.data(), rows_at.data(), found.data(), 0, 0, 0, 0, 0};
  }
  std::vector<int64_t> rows, keys;
  std::vector<int32_t> offsets, positions;
  std::vector<int64_t> rows_at;
  std::vector<uint8_t> found;
  genrec_hkv_lookup_result view;
};

void check_result(const std::vector<int64_t>& keys, const Result& result) {
  const int64_t n = static_cast<int64_t>(keys.size());
  std::vector<int> seen(keys.size(), 0);
  std::set<int64_t> rows;
  CHECK(result.offsets[result.view.unique] == n);
  for (int64_t u = 0; u < result.view.unique; ++u) {
    if (result.rows[u] >= 0) CHECK(rows.insert(result.rows[u]).second);
    for (int32_t i = result.offsets[u]; i < result.offsets[u + 1]; ++i) {
      const int32_t position = result.positions[i];
      if (i > result.offsets[u]) CHECK(result.positions[i - 1] < position);
      CHECK(keys[position] == result.keys[u]);
      CHECK(result.rows_at[position] == result.rows[u]);
      ++seen[position];
    }
  }
  for (int count : seen) CHECK(count == 1);
}

// Batches of training, evaluation and erasure. What a row holds is compared with a map of weights.
void run(const Config& config, int threads) {
  genrec_hkv_table table = make(config);
  std::mt19937_64 random(7);
  std::map<int64_t, float> first_weight;
  const int64_t extremes[] = {0, -1, INT64_MAX, INT64_MIN, 1};
  for (uint32_t step = 1; step <= 24; ++step) {
    const size_t n = step % 5 == 0 ? 0 : 3000;
    std::vector<int64_t> keys(n);
    for (int64_t& key : keys) key = static_cast<int64_t>(random() % 9000) * (1ll << 40);
    for (size_t i = 0; i < 5 && i < n; ++i) keys[i] = extremes[i];
    Result result(n);
    const genrec_hkv_batch batch{keys.data(), static_cast<int64_t>(n), step, step, step / 7,
                                 GENREC_HKV_INSERT | GENREC_HKV_ADMIT | GENREC_HKV_TOUCH | GENREC_HKV_UPDATE |
                                     GENREC_HKV_COUNT,
                                 nullptr};
    CHECK(genrec_hkv_lookup(table, &batch, threads, &result.view) == 0);
    check_result(keys, result);
    std::vector<float> out(n * kDim), gradient(n * kDim, 0.5f);
    CHECK(genrec_hkv_gather(table, result.rows_at.data(), keys.data(), static_cast<int64_t>(n), nullptr, threads,
                            out.data()) == 0);
    for (size_t i = 0; i < n; ++i) {
      const auto known = first_weight.find(keys[i]);
      if (result.found[i] && known != first_weight.end()) CHECK(out[i * kDim] == known->second);
    }
    const genrec_hkv_update_params params{0.1f, 0.9f, 0.999f, 1e-8f, 0.01f, 1.0f, step};
    CHECK(genrec_hkv_update(table, &params, result.rows.data(), result.keys.data(), result.offsets.data(),
                            result.positions.data(), result.view.unique, nullptr, nullptr, gradient.data(),
                            threads) == 0);
    std::vector<int64_t> rows(n);
    CHECK(genrec_hkv_find(table, keys.data(), static_cast<int64_t>(n), threads, rows.data()) == 0);
    for (size_t i = 0; i < n; ++i) {
      CHECK(rows[i] == result.rows_at[i] || (rows[i] == -1 && result.rows_at[i] == -2));
    }
    std::vector<float> weights(n * kDim);
    CHECK(genrec_hkv_read_rows(table, rows.data(), static_cast<int64_t>(n), threads, weights.data(), nullptr) == 0);
    first_weight.clear();
    for (size_t i = 0; i < n; ++i) {
      if (rows[i] >= 0) first_weight[keys[i]] = weights[i * kDim];
    }
    if (step % 6 == 0) {
      int64_t erased = 0;
      CHECK(genrec_hkv_erase(table, keys.data(), static_cast<int64_t>(n / 2), &erased) == 0);
      for (size_t i = 0; i < n / 2; ++i) first_weight.erase(keys[i]);
    }
  }
  genrec_hkv_info info;
  genrec_hkv_get_info(table, 1, &info);
  const int64_t buckets = info.capacity / 128;
  std::vector<int64_t> keys(info.capacity), rows(info.capacity);
  std::vector<uint64_t> scores(info.capacity);
  std::vector<uint32_t> steps(info.capacity), updates(info.capacity);
  int64_t count = 0;
  CHECK(genrec_hkv_export(table, 0, buckets, 0, 0, &count, keys.data(), rows.data(), scores.data(), steps.data(),
                          updates.data()) == 0);
  CHECK(count == info.size);
  CHECK(std::set<int64_t>(keys.begin(), keys.begin() + count).size() == static_cast<size_t>(count));
  std::vector<float> weights(info.pending_evicted * kDim), state(info.pending_evicted * kDim * 2);
  std::vector<int64_t> gone(info.pending_evicted);
  std::vector<uint64_t> gone_scores(info.pending_evicted);
  CHECK(genrec_hkv_pop_evicted(table, info.pending_evicted, gone.data(), gone_scores.data(), weights.data(),
                               state.data()) == 0);
  CHECK(genrec_hkv_clear(table) == 0);
  genrec_hkv_get_info(table, 1, &info);
  CHECK(info.size == 0 && info.pending_evicted == 0);
  genrec_hkv_destroy(table);
  std::printf("ok %s, %d threads\n", config.name, threads);
}

// What training alone doesn't call: writing, accumulating, pooling, erasing by score, scores, counters, room.
void run_other_operations(int32_t dtype, int threads) {
  const Config config{"other operations", 1, 2, 3, dtype, 40, 40, 2, 4, 64};
  genrec_hkv_table table = make(config);
  const int64_t n = 700;
  std::vector<int64_t> keys(n);
  for (int64_t i = 0; i < n; ++i) keys[i] = (i % 600 - 300) * (1ll << 50);
  Result result(n);
  const genrec_hkv_batch batch{keys.data(), n, 1, 1, 0, GENREC_HKV_INSERT | GENREC_HKV_TOUCH, nullptr};
  CHECK(genrec_hkv_lookup(table, &batch, threads, &result.view) == 0);
  CHECK(genrec_hkv_reserve(table, 3000, threads) == 0);
  std::vector<int64_t> rows(n);
  CHECK(genrec_hkv_find(table, keys.data(), n, threads, rows.data()) == 0);
  std::vector<float> ones(n * kDim, 1.0f), weights(n * kDim), state(n * kDim, 2.0f);
  CHECK(genrec_hkv_write_rows(table, rows.data(), n, ones.data(), state.data()) == 0);
  std::vector<int64_t> unique_rows(result.view.unique);
  CHECK(genrec_hkv_find(table, result.keys.data(), result.view.unique, threads, unique_rows.data()) == 0);
  CHECK(genrec_hkv_accumulate(table, unique_rows.data(), result.offsets.data(), result.positions.data(),
                              result.view.unique, ones.data(), threads) == 0);
  CHECK(genrec_hkv_read_rows(table, rows.data(), n, threads, weights.data(), state.data()) == 0);
  for (int64_t i = 0; i < n; ++i) CHECK(weights[i * kDim] == (i % 600 < 100 ? 3.0f : 2.0f) && state[i * kDim] == 2.0f);
  const std::vector<int64_t> bags{0, 0, 1, 400, n};
  std::vector<float> pooled(4 * kDim), factors(n, 0.5f);
  CHECK(genrec_hkv_pool(table, rows.data(), keys.data(), bags.data(), 4, factors.data(), nullptr, threads,
                        pooled.data()) == 0);
  CHECK(pooled[0] == 0.0f && pooled[kDim] == 1.5f);
  const int64_t stranger = 77;
  const float missing = -4.0f;
  for (int64_t row : {-1, -2}) {
    CHECK(genrec_hkv_gather(table, &row, &stranger, 1, &missing, threads, pooled.data()) == 0);
    CHECK((pooled[0] == missing) == (row == -1));
  }
  std::vector<uint64_t> scores(n, 5);
  std::vector<uint32_t> steps(n, 9), updates(n, 9);
  CHECK(genrec_hkv_set_meta(table, keys.data(), 10, scores.data(), steps.data(), updates.data()) == 0);
  CHECK(genrec_hkv_get_meta(table, keys.data(), n, scores.data(), steps.data(), updates.data()) == 0);
  CHECK(scores[9] == 5 && steps[9] == 9 && updates[9] == 9 && scores[150] == 1 && steps[150] == 1);
  int64_t erased = 0;
  CHECK(genrec_hkv_erase_if(table, 5, UINT64_MAX, 0, UINT32_MAX, &erased) == 0);
  CHECK(erased == 10);
  // Ten strangers are counted, and the counts go through a checkpoint.
  const genrec_hkv_batch counted{keys.data(), 10, 2, 2, 0,
                                 GENREC_HKV_INSERT | GENREC_HKV_ADMIT | GENREC_HKV_TOUCH, nullptr};
  CHECK(genrec_hkv_lookup(table, &counted, threads, &result.view) == 0);
  CHECK(result.view.unadmitted == 10 && result.view.inserted == 0);
  int64_t count = 0;
  CHECK(genrec_hkv_export_counters(table, n, &count, keys.data(), steps.data(), updates.data()) == 0);
  CHECK(count == 10);
  CHECK(genrec_hkv_restore_counters(table, count, keys.data(), steps.data(), updates.data()) == 0);
  CHECK(genrec_hkv_set_init_seed(table, 4) == 0);
  int64_t owners[10];
  genrec_hkv_owners(keys.data(), 10, 3, owners);
  for (int64_t owner : owners) CHECK(owner >= 0 && owner < 3);
  genrec_hkv_destroy(table);
  std::printf("ok other operations, dtype %d, %d threads\n", dtype, threads);
}

// Several callers at once: on one table they wait for each other, on different ones they share the pool.
void run_concurrent_callers() {
  const Config config{"concurrent", 1, 1, 3, 0, 128, 0, 0, 4, 16};
  genrec_hkv_table shared = make(config);
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 3; ++caller) {
    callers.emplace_back([&, caller] {
      run({"own table", 0, 1, 1, 0, 128, 0, 0, 4, 32}, 2);
      for (uint32_t step = 1; step <= 20; ++step) {
        std::vector<int64_t> keys(500);
        for (size_t i = 0; i < keys.size(); ++i) keys[i] = static_cast<int64_t>(i * 17 + caller * 1000 + step);
        Result result(keys.size());
        const genrec_hkv_batch batch{keys.data(), 500, step, step, 0, GENREC_HKV_INSERT | GENREC_HKV_TOUCH, nullptr};
        CHECK(genrec_hkv_lookup(shared, &batch, 2, &result.view) == 0);
        check_result(keys, result);
      }
    });
  }
  for (auto& caller : callers) caller.join();
  genrec_hkv_destroy(shared);
}

void check_pure_functions() {
  std::mt19937_64 random(1);
  for (int i = 0; i < 10000; ++i) {
    const uint64_t key = random();
    CHECK(genrec::hkv::unmix64(genrec::hkv::mix64(key)) == key);
    // Beyond 2^31 slots and up to 2^52 buckets, arithmetic stays 64 bits wide.
    const uint64_t buckets = 1 + random() % (1ull << (1 + i % 52));
    const uint64_t first = genrec::hkv::first_bucket(key, buckets);
    CHECK(first < buckets);
    CHECK(genrec::hkv::first_bucket(key, 2 * buckets) / 2 == first);
    const uint64_t second = genrec::hkv::second_bucket(key, first, buckets);
    CHECK(second < buckets);
    CHECK(second / 64 == first / 64);
    CHECK(buckets % 64 == 1 || second != first);
    CHECK(genrec::hkv::digest_of(key) != 0);
  }
  for (double p = 0.001; p < 1.0; p += 0.001) {
    const double x = genrec::hkv::normal_quantile(p);
    CHECK(std::abs(0.5 * std::erfc(-x / std::sqrt(2.0)) - p) < 1e-8);
    CHECK(std::abs(genrec::hkv::portable_log(p) - std::log(p)) < 1e-13);
  }
}

}  // namespace

int main() {
  check_pure_functions();
  const Config configs[] = {
      {"lru sgd", 0, 1, 0, 0, 128, 0, 0, 4, 16},
      {"lfu adam growing", 1, 1, 1, 0, 128, 0, 0, 1, 128},
      {"epoch two choices adagrad", 2, 2, 3, 0, 128, 0, 0, 70, 140},
      {"tiers bf16 row-wise", 0, 1, 4, 2, 30, 40, 0, 8, 32},
      {"admission fp16 adamw", 1, 1, 2, 1, 128, 0, 2, 4, 64},
      {"no eviction", 4, 1, 0, 0, 128, 0, 0, 1, 32},
      {"one bucket", 0, 1, 0, 0, 128, 0, 0, 1, 1},
  };
  for (const Config& config : configs) {
    for (int threads : {1, 4}) run(config, threads);
  }
  for (int32_t dtype : {0, 1, 2}) run_other_operations(dtype, 1 + dtype);
  run_concurrent_callers();
  return 0;
}
