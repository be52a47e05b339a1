#include "hkv/table.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <stdexcept>
#include <utility>

#include "common/thread_pool.h"

namespace genrec {
namespace hkv {
namespace {

size_t element_bytes(int32_t dtype) { return static_cast<DType>(dtype) == DType::kFloat32 ? 4 : 2; }

}  // namespace

Table::Table(const genrec_hkv_options& options, std::string file_directory)
    : options_(options), file_directory_(std::move(file_directory)) {
  const int fast = options.fast_positions, overflow = options.overflow_positions;
  if (options.dim < 1 || options.initial_buckets < 1 || options.max_buckets < options.initial_buckets || fast < 1 ||
      overflow < 0 || fast + overflow > kBucketSlots || options.choices < 1 || options.choices > 2) {
    throw std::invalid_argument("sizes of the table are out of range");
  }
  if (options.max_buckets > (int64_t{1} << 52)) throw std::invalid_argument("more than 2^52 buckets");
  score_mode_ = static_cast<ScoreMode>(options.score_mode);
  init_ = {static_cast<InitKind>(options.init_kind), 0, options.init_seed, options.init_a, options.init_b};
  make_arenas(static_cast<uint64_t>(options.initial_buckets), &index_, &store_, &view_);
  if (options.admission_threshold > 1) {
    // As many sets as buckets when fully grown: a set then belongs to one bucket however far the table has grown.
    uint64_t sets = view_.num_buckets;
    while (sets * 2 <= static_cast<uint64_t>(options.max_buckets)) sets *= 2;
    counters_ = AdmissionCounters(sets, std::max(1, options.admission_ways));
  }
}

void Table::make_arenas(uint64_t num_buckets, Arena* index, RowStore* store, IndexView* view) const {
  const bool scores = score_mode_ == ScoreMode::kLfu || score_mode_ == ScoreMode::kEpochLfu ||
                      score_mode_ == ScoreMode::kCustom;
  const int fast = options_.fast_positions, overflow = options_.overflow_positions;
  const bool tiered = fast < kBucketSlots;
  StoreView shape{};
  shape.dim = options_.dim;
  shape.dtype = static_cast<DType>(options_.dtype);
  shape.state_dim = state_floats(optimizer(), options_.dim);
  shape.weights.row_bytes = element_bytes(options_.dtype) * options_.dim;
  shape.state.row_bytes = 4 * static_cast<size_t>(shape.state_dim);
  const bool file = fast + overflow < kBucketSlots;
  const int ends[3] = {fast, fast + overflow, kBucketSlots};
  shape.tiers = !tiered ? 1 : file ? 3 : 2;
  for (int tier = 0; tier < shape.tiers; ++tier) shape.first[tier + 1] = ends[tier];
  shape.first[shape.tiers] = kBucketSlots;
  view->stride = bucket_bytes(scores, tiered);
  view->num_buckets = num_buckets;
  view->choices = options_.choices;
  view->has_scores = scores;
  view->has_positions = tiered;
  *index = Arena(num_buckets * view->stride, "");
  view->base = index->data();
  *store = RowStore(num_buckets, shape, file ? file_directory_ : "");
  if (tiered) {
    for (uint64_t b = 0; b < num_buckets; ++b) std::iota(view->positions(b), view->positions(b) + kBucketSlots, 0);
  }
}

void Table::Evicted::append(const Evicted& other) {
  keys.insert(keys.end(), other.keys.begin(), other.keys.end());
  scores.insert(scores.end(), other.scores.begin(), other.scores.end());
  weights.insert(weights.end(), other.weights.begin(), other.weights.end());
  state.insert(state.end(), other.state.begin(), other.state.end());
}

int64_t Table::slot_of(int64_t key) const {
  int64_t slot;
  kernels().find(view_, &key, 1, &slot);
  return slot;
}

void Table::occupy(int64_t slot, int64_t key, uint64_t score, uint32_t step) {
  const uint64_t bucket = static_cast<uint64_t>(slot) / kBucketSlots;
  const int s = static_cast<int>(slot % kBucketSlots);
  view_.digests(bucket)[s] = digest_of(mix64(static_cast<uint64_t>(key)));
  view_.keys(bucket)[s] = key;
  view_.steps(bucket)[s] = step;
  view_.updates(bucket)[view_.position(bucket, s)] = 0;
  if (view_.has_scores) view_.scores(bucket)[s] = score;
}

void Table::release(int64_t slot) { view_.digests(slot / kBucketSlots)[slot % kBucketSlots] = 0; }

// A free slot for a key, made free by eviction where the table can't grow; -1 where there is none.
int64_t Table::place(int64_t key, uint32_t pin_floor, Partition& part) {
  const bool may_evict = !growable() && score_mode_ != ScoreMode::kNoEviction;
  const Placement place = placement(view_, mix64(static_cast<uint64_t>(key)), pin_floor, may_evict);
  if (place.evicts) evict(place.slot, part);
  return place.slot;
}

void Table::evict(int64_t slot, Partition& part) {
  const uint64_t bucket = static_cast<uint64_t>(slot) / kBucketSlots;
  const int s = static_cast<int>(slot % kBucketSlots);
  ++part.evicted;
  if (options_.record_evicted) {
    const StoreView& store = store_.view();
    const int64_t row = view_.row(bucket, s);
    part.victims.keys.push_back(view_.keys(bucket)[s]);
    part.victims.scores.push_back(view_.score(bucket, s));
    part.victims.weights.resize(part.victims.weights.size() + store.dim);
    kernels().read_row(store, row, &*(part.victims.weights.end() - store.dim));
    const float* state = reinterpret_cast<const float*>(store.row(store.state, row));
    part.victims.state.insert(part.victims.state.end(), state, state + store.state_dim);
  }
  release(slot);
}

// Slots of an old block go to the two blocks that take its place, the last victims first, so that they get the fast
// rows.
void Table::move_block(uint64_t block, const IndexView& old_view, const RowStore& old_store, Partition& lost) {
  const uint64_t unit = view_.choices == 2 ? kBlockBuckets : 1;
  std::vector<Candidate> order;
  for (uint64_t b = block * unit; b < std::min((block + 1) * unit, old_view.num_buckets); ++b) {
    for (int s = 0; s < kBucketSlots; ++s) {
      if (old_view.digests(b)[s] == 0) continue;
      order.push_back({old_view.score(b, s), old_view.steps(b)[s], static_cast<int64_t>(b) * kBucketSlots + s,
                       old_view.keys(b)[s]});
    }
  }
  if (view_.has_positions) {
    std::sort(order.begin(), order.end(), [](const Candidate& a, const Candidate& b) { return b.before(a); });
  }
  for (const Candidate& item : order) {
    const uint64_t b = static_cast<uint64_t>(item.slot) / kBucketSlots;
    const int s = static_cast<int>(item.slot % kBucketSlots);
    const int64_t key = old_view.keys(b)[s];
    const int64_t slot = place(key, UINT32_MAX, lost);
    if (slot < 0) {  // two-choice tables alone, and not at any sensible load
      ++lost.evicted;
      continue;
    }
    occupy(slot, key, item.score, item.step);
    const uint64_t to = static_cast<uint64_t>(slot) / kBucketSlots;
    const int64_t row = view_.row(to, static_cast<int>(slot % kBucketSlots));
    view_.updates(to)[row % kBucketSlots] = old_view.updates(b)[old_view.position(b, s)];
    store_.copy_row(row, old_store, old_view.row(b, s));
  }
}

void Table::grow(int threads) {
  Arena index;
  RowStore store;
  IndexView view{};
  make_arenas(view_.num_buckets * 2, &index, &store, &view);  // throws where memory ends: the table is as it was
  const Arena old_index = std::exchange(index_, std::move(index));
  const RowStore old_store = std::exchange(store_, std::move(store));
  const IndexView old_view = std::exchange(view_, view);
  const uint64_t unit = view_.choices == 2 ? kBlockBuckets : 1;
  const int64_t blocks = static_cast<int64_t>((old_view.num_buckets + unit - 1) / unit);
  std::vector<Partition> lost(static_cast<size_t>(blocks));
  ThreadPool::instance().run(blocks, threads, [&](int64_t block) {
    move_block(static_cast<uint64_t>(block), old_view, old_store, lost[static_cast<size_t>(block)]);
  });
  for (const Partition& part : lost) {
    size_ -= part.evicted;
    totals_.evicted += part.evicted;
    evicted_.append(part.victims);
  }
  ++generation_;
}

void Table::reserve(int64_t rows, int threads) {
  while (growable() && static_cast<double>(rows) > options_.max_load_factor * static_cast<double>(num_slots())) {
    grow(threads);
  }
}

void Table::find(const int64_t* keys, int64_t n, int threads, int64_t* rows) const {
  constexpr int64_t kChunk = 4096;
  ThreadPool::instance().run((n + kChunk - 1) / kChunk, threads, [&](int64_t chunk) {
    const int64_t begin = chunk * kChunk, end = std::min(n, begin + kChunk);
    kernels().find(view_, keys + begin, end - begin, rows + begin);
    if (!view_.has_positions) return;  // rows are slots
    for (int64_t i = begin; i < end; ++i) {
      if (rows[i] >= 0) rows[i] = view_.row(rows[i] / kBucketSlots, static_cast<int>(rows[i] % kBucketSlots));
    }
  });
}

int64_t Table::erase(const int64_t* keys, int64_t n) {
  int64_t erased = 0;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t slot = slot_of(keys[i]);
    if (slot < 0) continue;
    release(slot);
    ++erased;
  }
  size_ -= erased;
  if (erased != 0) ++generation_;
  return erased;
}

int64_t Table::erase_if(uint64_t first_score, uint64_t last_score, uint32_t first_step, uint32_t last_step) {
  int64_t erased = 0;
  for (uint64_t b = 0; b < view_.num_buckets; ++b) {
    for (int s = 0; s < kBucketSlots; ++s) {
      if (view_.digests(b)[s] == 0) continue;
      const uint64_t score = view_.score(b, s);
      const uint32_t step = view_.steps(b)[s];
      if (score < first_score || score > last_score || step < first_step || step > last_step) continue;
      view_.digests(b)[s] = 0;
      ++erased;
    }
  }
  size_ -= erased;
  if (erased != 0) ++generation_;
  return erased;
}

int64_t Table::export_slots(uint64_t begin, uint64_t end, uint32_t min_update, uint64_t min_score, int64_t* keys,
                            int64_t* rows, uint64_t* scores, uint32_t* steps, uint32_t* updates) const {
  const uint64_t unit = view_.choices == 2 ? kBlockBuckets : 1;
  int64_t count = 0;
  std::vector<std::pair<uint64_t, int64_t>> order;
  end = std::min(end, view_.num_buckets);
  for (uint64_t block = begin; block < end; block += unit) {
    order.clear();
    for (uint64_t b = block; b < std::min(block + unit, end); ++b) {
      for (int s = 0; s < kBucketSlots; ++s) {
        if (view_.digests(b)[s] == 0 || view_.updates(b)[view_.position(b, s)] < min_update) continue;
        if (view_.score(b, s) < min_score) continue;
        order.emplace_back(mix64(static_cast<uint64_t>(view_.keys(b)[s])), static_cast<int64_t>(b) * kBucketSlots + s);
      }
    }
    std::sort(order.begin(), order.end());
    for (const auto& item : order) {
      const uint64_t b = static_cast<uint64_t>(item.second) / kBucketSlots;
      const int s = static_cast<int>(item.second % kBucketSlots);
      keys[count] = view_.keys(b)[s];
      rows[count] = view_.row(b, s);
      scores[count] = view_.score(b, s);
      steps[count] = view_.steps(b)[s];
      updates[count] = view_.updates(b)[view_.position(b, s)];
      ++count;
    }
  }
  return count;
}

void Table::set_meta(const int64_t* keys, int64_t n, const uint64_t* scores, const uint32_t* steps,
                     const uint32_t* updates) {
  for (int64_t i = 0; i < n; ++i) {
    const int64_t slot = slot_of(keys[i]);
    if (slot < 0) continue;
    const uint64_t b = static_cast<uint64_t>(slot) / kBucketSlots;
    const int s = static_cast<int>(slot % kBucketSlots);
    if (scores != nullptr && view_.has_scores) view_.scores(b)[s] = scores[i];
    if (steps != nullptr) view_.steps(b)[s] = steps[i];
    if (updates != nullptr) view_.updates(b)[view_.position(b, s)] = updates[i];
  }
}

void Table::get_meta(const int64_t* keys, int64_t n, uint64_t* scores, uint32_t* steps, uint32_t* updates) const {
  for (int64_t i = 0; i < n; ++i) {
    const int64_t slot = slot_of(keys[i]);
    const uint64_t b = slot < 0 ? 0 : static_cast<uint64_t>(slot) / kBucketSlots;
    const int s = static_cast<int>(slot % kBucketSlots);
    scores[i] = slot < 0 ? 0 : view_.score(b, s);
    steps[i] = slot < 0 ? 0 : view_.steps(b)[s];
    updates[i] = slot < 0 ? 0 : view_.updates(b)[view_.position(b, s)];
  }
}

void Table::clear() {
  index_.zero();
  store_.zero();
  if (view_.has_positions) {
    for (uint64_t b = 0; b < view_.num_buckets; ++b) {
      std::iota(view_.positions(b), view_.positions(b) + kBucketSlots, 0);
    }
  }
  if (counters_.enabled()) counters_.clear();
  evicted_ = Evicted{};
  size_ = 0;
  ++generation_;
}

void Table::pop_evicted(int64_t n, int64_t* keys, uint64_t* scores, float* weights, float* state) {
  if (n != static_cast<int64_t>(evicted_.keys.size())) {
    throw std::invalid_argument("pop_evicted takes all rows at once");
  }
  std::copy(evicted_.keys.begin(), evicted_.keys.end(), keys);
  std::copy(evicted_.scores.begin(), evicted_.scores.end(), scores);
  std::copy(evicted_.weights.begin(), evicted_.weights.end(), weights);
  std::copy(evicted_.state.begin(), evicted_.state.end(), state);
  evicted_ = Evicted{};
}

int64_t Table::export_counters(int64_t n, int64_t* keys, uint32_t* counts, uint32_t* steps) const {
  int64_t count = 0;
  if (!counters_.enabled()) return 0;
  counters_.visit([&](int64_t key, uint32_t sightings, uint32_t step) {
    if (count < n) {
      keys[count] = key;
      counts[count] = sightings;
      steps[count] = step;
    }
    ++count;
  });
  return count;
}

void Table::restore_counters(int64_t n, const int64_t* keys, const uint32_t* counts, const uint32_t* steps) {
  if (!counters_.enabled()) return;
  counters_.clear();
  for (int64_t i = 0; i < n; ++i) counters_.restore(keys[i], counts[i], steps[i]);
}

genrec_hkv_info Table::info(bool count_tiers) const {
  genrec_hkv_info info = totals_;
  info.size = size_;
  info.capacity = static_cast<int64_t>(num_slots());
  info.max_capacity = info.capacity;
  for (int64_t b = static_cast<int64_t>(view_.num_buckets); 2 * b <= options_.max_buckets; b *= 2) {
    info.max_capacity = 2 * b * kBucketSlots;
  }
  info.generation = generation_;
  info.index_bytes = static_cast<int64_t>(index_.bytes());
  info.counter_bytes = static_cast<int64_t>(counters_.sets() * counters_.ways() * 16);
  info.pending_evicted = static_cast<int64_t>(evicted_.keys.size());
  const StoreView& store = store_.view();
  for (int tier = 0; tier < kMaxTiers; ++tier) {
    info.tier_bytes[tier] = static_cast<int64_t>(store_.tier_bytes(tier));
    info.tier_rows[tier] = 0;
  }
  if (!count_tiers) return info;
  if (!view_.has_positions) {
    info.tier_rows[0] = size_;
    return info;
  }
  for (uint64_t b = 0; b < view_.num_buckets; ++b) {
    for (int s = 0; s < kBucketSlots; ++s) {
      if (view_.digests(b)[s] != 0) ++info.tier_rows[store.tier_of(view_.position(b, s))];
    }
  }
  return info;
}

}  // namespace hkv
}  // namespace genrec
