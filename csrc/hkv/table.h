// The table: an index of buckets over a store of rows. CPU engine.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "hkv/admission.h"
#include "hkv/bucket.h"
#include "hkv/genrec_hkv.h"
#include "hkv/kernels.h"
#include "hkv/storage.h"

namespace genrec {
namespace hkv {

class Table {
 public:
  Table(const genrec_hkv_options& options, std::string file_directory);

  std::mutex& mutex() { return mutex_; }
  const IndexView& index() const { return view_; }
  const StoreView& store() const { return store_.view(); }
  const Initializer& initializer() const { return init_; }
  OptimizerKind optimizer() const { return static_cast<OptimizerKind>(options_.optimizer); }
  int64_t generation() const { return generation_; }
  void set_init_seed(uint64_t seed) { init_.seed = seed; }

  genrec_hkv_info info(bool count_tiers) const;
  void find(const int64_t* keys, int64_t n, int threads, int64_t* rows) const;
  void lookup(const genrec_hkv_batch& batch, int threads, genrec_hkv_lookup_result* result);
  int64_t erase(const int64_t* keys, int64_t n);
  int64_t erase_if(uint64_t first_score, uint64_t last_score, uint32_t first_step, uint32_t last_step);
  int64_t export_slots(uint64_t begin, uint64_t end, uint32_t min_update, uint64_t min_score, int64_t* keys,
                       int64_t* rows, uint64_t* scores, uint32_t* steps, uint32_t* updates) const;
  void set_meta(const int64_t* keys, int64_t n, const uint64_t* scores, const uint32_t* steps,
                const uint32_t* updates);
  void get_meta(const int64_t* keys, int64_t n, uint64_t* scores, uint32_t* steps, uint32_t* updates) const;
  void clear();
  void reserve(int64_t rows, int threads);
  void pop_evicted(int64_t n, int64_t* keys, uint64_t* scores, float* weights, float* state);
  int64_t export_counters(int64_t n, int64_t* keys, uint32_t* counts, uint32_t* steps) const;
  void restore_counters(int64_t n, const int64_t* keys, const uint32_t* counts, const uint32_t* steps);

 private:
  // Evicted rows that wait for pop_evicted.
  struct Evicted {
    std::vector<int64_t> keys;
    std::vector<uint64_t> scores;
    std::vector<float> weights, state;
    void append(const Evicted& other);
  };

  // A run of buckets with its share of a batch: keys [begin, end) of the partitioned batch.
  struct Partition {
    int64_t begin = 0, end = 0;
    int64_t unique = 0, first_unique = 0;
    int64_t hits = 0, inserted = 0, evicted = 0, refused = 0, unadmitted = 0, promoted = 0, demoted = 0;
    Evicted victims;
  };

  // Scratch of a lookup, by partitioned position. Kept between calls.
  struct Scratch {
    std::vector<uint8_t> part, flags;
    std::vector<int64_t> keys, slots, unique_slots, unique_keys;
    std::vector<int32_t> positions, local, counts, misses;
    void resize(size_t n);
  };

  // lookup.cpp
  void partition(const genrec_hkv_batch& batch, int threads);
  bool resolve(const genrec_hkv_batch& batch, Partition& part);
  bool insert_misses(const genrec_hkv_batch& batch, Partition& part, int64_t misses);
  bool admit_misses(const genrec_hkv_batch& batch, Partition& part, int64_t misses);
  bool insert_one(const genrec_hkv_batch& batch, Partition& part, int64_t j);
  int32_t add_unique(Partition& part, int64_t slot, int64_t key, uint8_t flags);
  int32_t unique_of(Partition& part, int64_t slot) const;
  void finish(const genrec_hkv_batch& batch, Partition& part, genrec_hkv_lookup_result* result);
  void promote(const genrec_hkv_batch& batch, Partition& part, int64_t slot);
  void forget_new(const Partition& part);
  unsigned part_shift(int64_t n) const;

  // table.cpp
  int64_t place(int64_t key, uint32_t pin_floor, Partition& part);
  void evict(int64_t slot, Partition& part);
  void occupy(int64_t slot, int64_t key, uint64_t score, uint32_t step);
  void release(int64_t slot);
  bool growable() const { return view_.num_buckets * 2 <= static_cast<uint64_t>(options_.max_buckets); }
  void grow(int threads);
  void move_block(uint64_t block, const IndexView& old_view, const RowStore& old_store, Partition& lost);
  void make_arenas(uint64_t num_buckets, Arena* index, RowStore* store, IndexView* view) const;
  int64_t slot_of(int64_t key) const;
  uint64_t num_slots() const { return view_.num_buckets * kBucketSlots; }

  genrec_hkv_options options_;
  std::string file_directory_;
  ScoreMode score_mode_;
  Initializer init_;
  std::mutex mutex_;
  Arena index_;
  IndexView view_{};
  RowStore store_;
  AdmissionCounters counters_;
  int64_t size_ = 0, generation_ = 0;
  genrec_hkv_info totals_{};
  Evicted evicted_;
  Scratch scratch_;
  std::vector<Partition> parts_;
};

}  // namespace hkv
}  // namespace genrec
