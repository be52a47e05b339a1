// What one writes first: a std::unordered_map from key to row number, rows and Adagrad state in vectors. One thread, since
// the map allows no more. Used by embedding_cpu.py alone.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <unordered_map>
#include <vector>

struct MapTable {
  int64_t dim;
  std::unordered_map<int64_t, int64_t> rows;
  std::vector<float> weights, sums;
};

static int64_t row_of(MapTable& table, int64_t key) {
  const auto [entry, fresh] = table.rows.try_emplace(key, static_cast<int64_t>(table.rows.size()));
  if (fresh) {
    std::minstd_rand random(static_cast<unsigned>(key) | 1u);
    for (int64_t d = 0; d < table.dim; ++d) {
      table.weights.push_back(static_cast<float>(random()) / 2147483648.0f - 0.5f);
      table.sums.push_back(0.0f);
    }
  }
  return entry->second;
}

extern "C" {

void* map_create(int64_t dim) { return new MapTable{dim, {}, {}, {}}; }
void map_destroy(void* table) { delete static_cast<MapTable*>(table); }

int64_t map_find(void* handle, const int64_t* keys, int64_t n, float* out) {
  MapTable& table = *static_cast<MapTable*>(handle);
  int64_t hits = 0;
  for (int64_t i = 0; i < n; ++i) {
    const auto entry = table.rows.find(keys[i]);
    if (entry == table.rows.end()) continue;
    ++hits;
    std::memcpy(out + i * table.dim, &table.weights[entry->second * table.dim], 4 * table.dim);
  }
  return hits;
}

void map_find_or_insert(void* handle, const int64_t* keys, int64_t n, float* out) {
  MapTable& table = *static_cast<MapTable*>(handle);
  for (int64_t i = 0; i < n; ++i) {
    std::memcpy(out + i * table.dim, &table.weights[row_of(table, keys[i]) * table.dim], 4 * table.dim);
  }
}

// Sums the gradients of equal keys in a second map, then updates the rows with Adagrad.
void map_update(void* handle, const int64_t* keys, int64_t n, const float* gradient, float learning_rate) {
  MapTable& table = *static_cast<MapTable*>(handle);
  const int64_t dim = table.dim;
  std::unordered_map<int64_t, std::vector<float>> summed;
  for (int64_t i = 0; i < n; ++i) {
    std::vector<float>& sum = summed[keys[i]];
    if (sum.empty()) sum.assign(dim, 0.0f);
    for (int64_t d = 0; d < dim; ++d) sum[d] += gradient[i * dim + d];
  }
  for (const auto& [key, sum] : summed) {
    const int64_t row = row_of(table, key);
    float* weights = &table.weights[row * dim];
    float* state = &table.sums[row * dim];
    for (int64_t d = 0; d < dim; ++d) {
      state[d] += sum[d] * sum[d];
      weights[d] -= learning_rate * sum[d] / (std::sqrt(state[d]) + 1e-8f);
    }
  }
}
}
