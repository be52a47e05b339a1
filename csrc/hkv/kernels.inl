// Body of kernels_*.cpp. Nothing here may instantiate a template of the standard library: the linker could then pick
// this file's copy, compiled for a wider instruction set, for code that runs everywhere. Results are equal for every
// instruction set: elementwise arithmetic without contraction, and sums in a fixed order of 16 lanes.

#include <cstring>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "hkv/kernels.h"

namespace genrec {
namespace hkv {
namespace {

// Bit s of the pair: slot s of the bucket has this digest.
struct Mask128 {
  uint64_t low, high;
};

inline Mask128 match_digest(const uint8_t* digests, uint8_t digest) {
#if defined(__AVX512BW__)
  const __m512i wanted = _mm512_set1_epi8(static_cast<char>(digest));
  return {_mm512_cmpeq_epi8_mask(_mm512_loadu_si512(digests), wanted),
          _mm512_cmpeq_epi8_mask(_mm512_loadu_si512(digests + 64), wanted)};
#elif defined(__AVX2__)
  const __m256i wanted = _mm256_set1_epi8(static_cast<char>(digest));
  uint64_t part[4];
  for (int i = 0; i < 4; ++i) {
    const __m256i line = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(digests + 32 * i));
    part[i] = static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_cmpeq_epi8(line, wanted)));
  }
  return {part[0] | part[1] << 32, part[2] | part[3] << 32};
#elif defined(__SSE2__)
  const __m128i wanted = _mm_set1_epi8(static_cast<char>(digest));
  uint64_t part[8];
  for (int i = 0; i < 8; ++i) {
    const __m128i line = _mm_loadu_si128(reinterpret_cast<const __m128i*>(digests + 16 * i));
    part[i] = static_cast<uint32_t>(_mm_movemask_epi8(_mm_cmpeq_epi8(line, wanted)));
  }
  return {part[0] | part[1] << 16 | part[2] << 32 | part[3] << 48,
          part[4] | part[5] << 16 | part[6] << 32 | part[7] << 48};
#else
  Mask128 mask{0, 0};
  for (int i = 0; i < 64; ++i) {
    mask.low |= static_cast<uint64_t>(digests[i] == digest) << i;
    mask.high |= static_cast<uint64_t>(digests[64 + i] == digest) << i;
  }
  return mask;
#endif
}

inline int first_candidate(const Mask128& mask) {
  if (mask.low != 0) return __builtin_ctzll(mask.low);
  return mask.high != 0 ? 64 + __builtin_ctzll(mask.high) : -1;
}

inline int find_in_bucket(const int64_t* keys, Mask128 mask, int64_t key) {
  for (; mask.low != 0; mask.low &= mask.low - 1) {
    const int s = __builtin_ctzll(mask.low);
    if (keys[s] == key) return s;
  }
  for (; mask.high != 0; mask.high &= mask.high - 1) {
    const int s = 64 + __builtin_ctzll(mask.high);
    if (keys[s] == key) return s;
  }
  return -1;
}

// Sixteen keys go through each stage together, so that their cache misses overlap.
void find(const IndexView& view, const int64_t* keys, int64_t n, int64_t* slots) {
  constexpr int kGroup = 16;
  uint64_t mixed[2][kGroup], bucket[2][kGroup];
  Mask128 mask[kGroup];
  const auto enter = [&](int64_t begin, int half) {
    const int count = n - begin < kGroup ? static_cast<int>(n - begin) : kGroup;
    for (int i = 0; i < count; ++i) {
      mixed[half][i] = mix64(static_cast<uint64_t>(keys[begin + i]));
      bucket[half][i] = first_bucket(mixed[half][i], view.num_buckets);
      const uint8_t* line = view.digests(bucket[half][i]);
      __builtin_prefetch(line);
      __builtin_prefetch(line + 64);
    }
  };
  if (n > 0) enter(0, 0);
  for (int64_t begin = 0, half = 0; begin < n; begin += kGroup, half ^= 1) {
    if (begin + kGroup < n) enter(begin + kGroup, static_cast<int>(half ^ 1));
    const int count = n - begin < kGroup ? static_cast<int>(n - begin) : kGroup;
    for (int i = 0; i < count; ++i) {
      mask[i] = match_digest(view.digests(bucket[half][i]), digest_of(mixed[half][i]));
      const int candidate = first_candidate(mask[i]);
      if (candidate >= 0) {
        __builtin_prefetch(view.keys(bucket[half][i]) + candidate);
        __builtin_prefetch(view.marks(bucket[half][i]) + candidate);
        __builtin_prefetch(view.steps(bucket[half][i]) + candidate);
      }
    }
    for (int i = 0; i < count; ++i) {
      uint64_t b = bucket[half][i];
      int s = find_in_bucket(view.keys(b), mask[i], keys[begin + i]);
      if (s < 0 && view.choices == 2) {
        b = second_bucket(mixed[half][i], b, view.num_buckets);
        s = find_in_bucket(view.keys(b), match_digest(view.digests(b), digest_of(mixed[half][i])), keys[begin + i]);
      }
      slots[begin + i] = s < 0 ? -1 : static_cast<int64_t>(b) * kBucketSlots + s;
    }
  }
}

inline float half_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16;
  const uint32_t magnitude = h & 0x7fff;
  uint32_t bits = magnitude << 13;
  if (magnitude >= 0x7c00) {
    bits += 0x70000000;  // infinities and NaNs
  } else if (magnitude >= 0x0400) {
    bits += 0x38000000;
  } else {  // subnormal: the value is magnitude * 2^-24
    const float value = static_cast<float>(magnitude) * (1.0f / 16777216.0f);
    memcpy(&bits, &value, 4);
  }
  bits |= sign;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}

inline uint16_t float_to_half(float f) {
  uint32_t bits;
  memcpy(&bits, &f, 4);
  const uint32_t sign = bits >> 16 & 0x8000;
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);
  if (bits >= 0x47800000) return static_cast<uint16_t>(sign | 0x7c00);
  if (bits < 0x38800000) {  // subnormal: adding 0.5 leaves magnitude * 2^24, rounded to even, in the low bits
    float shifted;
    memcpy(&shifted, &bits, 4);
    shifted += 0.5f;
    uint32_t rounded;
    memcpy(&rounded, &shifted, 4);
    return static_cast<uint16_t>(sign | (rounded - 0x3f000000));
  }
  bits += 0xfff + (bits >> 13 & 1);
  return static_cast<uint16_t>(sign | ((bits - 0x38000000) >> 13));
}

inline float bfloat_to_float(uint16_t h) {
  const uint32_t bits = static_cast<uint32_t>(h) << 16;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}

inline uint16_t float_to_bfloat(float f) {
  uint32_t bits;
  memcpy(&bits, &f, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

void read_row(const StoreView& store, int64_t row, float* weights) {
  const uint8_t* memory = store.row(store.weights, row);
  const int32_t dim = store.dim;
  if (store.dtype == DType::kFloat32) {
    memcpy(weights, memory, 4 * static_cast<size_t>(dim));
    return;
  }
  const uint16_t* halves = reinterpret_cast<const uint16_t*>(memory);
  if (store.dtype == DType::kFloat16) {
    for (int32_t d = 0; d < dim; ++d) weights[d] = half_to_float(halves[d]);
  } else {
    for (int32_t d = 0; d < dim; ++d) weights[d] = bfloat_to_float(halves[d]);
  }
}

void write_row(const StoreView& store, int64_t row, const float* weights) {
  uint8_t* memory = store.row(store.weights, row);
  const int32_t dim = store.dim;
  if (store.dtype == DType::kFloat32) {
    memcpy(memory, weights, 4 * static_cast<size_t>(dim));
    return;
  }
  uint16_t* halves = reinterpret_cast<uint16_t*>(memory);
  if (store.dtype == DType::kFloat16) {
    for (int32_t d = 0; d < dim; ++d) halves[d] = float_to_half(weights[d]);
  } else {
    for (int32_t d = 0; d < dim; ++d) halves[d] = float_to_bfloat(weights[d]);
  }
}

void initial_row(const Initializer& init, int64_t key, int32_t dim, float* weights) {
  const uint64_t stream = init_stream(init, mix64(static_cast<uint64_t>(key)));
  for (int32_t d = 0; d < dim; ++d) weights[d] = init_value(init, stream, d);
}

void initialize(const StoreView& store, const Initializer& init, int64_t row, int64_t key) {
  if (store.dtype == DType::kFloat32) {
    initial_row(init, key, store.dim, reinterpret_cast<float*>(store.row(store.weights, row)));
  } else {
    const uint64_t stream = init_stream(init, mix64(static_cast<uint64_t>(key)));
    uint16_t* halves = reinterpret_cast<uint16_t*>(store.row(store.weights, row));
    for (int32_t d = 0; d < store.dim; ++d) {
      const float value = init_value(init, stream, d);
      halves[d] = store.dtype == DType::kFloat16 ? float_to_half(value) : float_to_bfloat(value);
    }
  }
  if (store.state.row_bytes != 0) memset(store.row(store.state, row), 0, store.state.row_bytes);
}

inline void row_or_missing(const StoreView& store, const Initializer& init, const float* missing, int64_t row,
                           int64_t key, float* out) {
  if (row >= 0) {
    read_row(store, row, out);
  } else if (missing != nullptr && row != kRefusedRow) {
    for (int32_t d = 0; d < store.dim; ++d) out[d] = *missing;
  } else {
    initial_row(init, key, store.dim, out);
  }
}

inline void prefetch_row(const StoreView& store, const Plane& plane, int64_t row) {
  if (row < 0) return;
  const uint8_t* memory = store.row(plane, row);
  const size_t bytes = plane.row_bytes < 512 ? plane.row_bytes : 512;
  for (size_t offset = 0; offset < bytes; offset += 64) __builtin_prefetch(memory + offset);
}

void gather(const StoreView& store, const Initializer& init, const float* missing, const int64_t* rows_at,
            const int64_t* keys, int64_t begin, int64_t end, float* out) {
  constexpr int kAhead = 8;
  const size_t dim = store.dim;
  for (int64_t i = begin; i < end; ++i) {
    if (i + kAhead < end) prefetch_row(store, store.weights, rows_at[i + kAhead]);
    row_or_missing(store, init, missing, rows_at[i], keys[i], out + i * dim);
  }
}

void pool(const StoreView& store, const Initializer& init, const float* missing, const int64_t* rows_at,
          const int64_t* keys, const int64_t* offsets, const float* weights, int64_t begin, int64_t end,
          float* scratch, float* out) {
  constexpr int kAhead = 8;
  const int32_t dim = store.dim;
  for (int64_t bag = begin; bag < end; ++bag) {
    float* __restrict__ sum = out + bag * dim;
    memset(sum, 0, 4 * static_cast<size_t>(dim));
    for (int64_t i = offsets[bag]; i < offsets[bag + 1]; ++i) {
      if (i + kAhead < offsets[end]) prefetch_row(store, store.weights, rows_at[i + kAhead]);
      row_or_missing(store, init, missing, rows_at[i], keys[i], scratch);
      const float* __restrict__ row = scratch;
      const float weight = weights != nullptr ? weights[i] : 1.0f;
      for (int32_t d = 0; d < dim; ++d) sum[d] += weight * row[d];
    }
  }
}

// The gradient of unique key u: its positions' rows, summed in rising order.
inline const float* summed_gradient(const Segments& batch, const GradientMap& map, const float* gradient, int64_t u,
                                    int32_t dim, float* __restrict__ scratch) {
  const int32_t first = batch.offsets[u], last = batch.offsets[u + 1];
  const auto source = [&](int32_t i) {
    const int32_t position = batch.positions[i];
    return gradient + static_cast<size_t>(map.row != nullptr ? map.row[position] : position) * dim;
  };
  if (last - first == 1 && map.weight == nullptr) return source(first);
  memset(scratch, 0, 4 * static_cast<size_t>(dim));
  for (int32_t i = first; i < last; ++i) {
    if (i + 4 < last) {
      const float* ahead = source(i + 4);
      for (int32_t d = 0; d < dim && d < 128; d += 16) __builtin_prefetch(ahead + d);
    }
    const float* __restrict__ row = source(i);
    if (map.weight == nullptr) {
      for (int32_t d = 0; d < dim; ++d) scratch[d] += row[d];
    } else {
      const float weight = map.weight[batch.positions[i]];
      for (int32_t d = 0; d < dim; ++d) scratch[d] += weight * row[d];
    }
  }
  return scratch;
}

template <OptimizerKind kKind>
inline void update_elements(OptimizerParams params, int32_t dim, const float* __restrict__ g, float* __restrict__ w,
                            float* __restrict__ state) {
  params.kind = kKind;
  if (kKind == OptimizerKind::kSgd) {
    for (int32_t d = 0; d < dim; ++d) w[d] -= params.learning_rate * prepared_gradient(params, g[d], w[d]);
  } else if (kKind == OptimizerKind::kAdagrad) {
    for (int32_t d = 0; d < dim; ++d) {
      w[d] = adagrad_element(params, w[d], prepared_gradient(params, g[d], w[d]), state + d);
    }
  } else if (kKind == OptimizerKind::kRowWiseAdagrad) {
    float lane[16] = {0};
    int32_t d = 0;
    for (; d + 16 <= dim; d += 16) {
      for (int j = 0; j < 16; ++j) {
        const float value = prepared_gradient(params, g[d + j], w[d + j]);
        lane[j] += value * value;
      }
    }
    for (int j = 0; d + j < dim; ++j) {
      const float value = prepared_gradient(params, g[d + j], w[d + j]);
      lane[j] += value * value;
    }
    for (int width = 8; width >= 1; width /= 2) {
      for (int j = 0; j < width; ++j) lane[j] += lane[j + width];
    }
    state[0] += lane[0] / static_cast<float>(dim);
    const float denominator = sqrtf(state[0]) + params.eps;
    for (d = 0; d < dim; ++d) w[d] -= params.learning_rate * prepared_gradient(params, g[d], w[d]) / denominator;
  } else {
    float* __restrict__ second = state + dim;
    for (int32_t d = 0; d < dim; ++d) {
      w[d] = adam_element(params, w[d], prepared_gradient(params, g[d], w[d]), state + d, second + d);
    }
  }
}

template <OptimizerKind kKind>
void update_rows(const StoreView& store, const OptimizerParams& params, const Segments& batch, const GradientMap& map,
                 const float* gradient, int64_t begin, int64_t end, float* scratch) {
  constexpr int kAhead = 6;
  const int32_t dim = store.dim;
  for (int64_t u = begin; u < end; ++u) {
    if (u + kAhead < end) {
      prefetch_row(store, store.weights, batch.rows[u + kAhead]);
      if (store.state.row_bytes != 0) prefetch_row(store, store.state, batch.rows[u + kAhead]);
      const int32_t position = batch.positions[batch.offsets[u + kAhead]];
      const float* ahead = gradient + static_cast<size_t>(map.row != nullptr ? map.row[position] : position) * dim;
      for (int32_t d = 0; d < dim && d < 128; d += 16) __builtin_prefetch(ahead + d);
    }
    const int64_t row = batch.rows[u];
    if (row < 0) continue;
    const float* g = summed_gradient(batch, map, gradient, u, dim, scratch);
    float* state = reinterpret_cast<float*>(store.row(store.state, row));
    if (store.dtype == DType::kFloat32) {
      update_elements<kKind>(params, dim, g, reinterpret_cast<float*>(store.row(store.weights, row)), state);
    } else {
      float* w = scratch + dim;
      read_row(store, row, w);
      update_elements<kKind>(params, dim, g, w, state);
      write_row(store, row, w);
    }
  }
}

void update(const StoreView& store, const OptimizerParams& params, const Segments& batch, const GradientMap& map,
            const float* gradient, int64_t begin, int64_t end, float* scratch) {
  switch (params.kind) {
    case OptimizerKind::kSgd:
      return update_rows<OptimizerKind::kSgd>(store, params, batch, map, gradient, begin, end, scratch);
    case OptimizerKind::kAdam:
      return update_rows<OptimizerKind::kAdam>(store, params, batch, map, gradient, begin, end, scratch);
    case OptimizerKind::kAdamW:
      return update_rows<OptimizerKind::kAdamW>(store, params, batch, map, gradient, begin, end, scratch);
    case OptimizerKind::kAdagrad:
      return update_rows<OptimizerKind::kAdagrad>(store, params, batch, map, gradient, begin, end, scratch);
    case OptimizerKind::kRowWiseAdagrad:
      return update_rows<OptimizerKind::kRowWiseAdagrad>(store, params, batch, map, gradient, begin, end, scratch);
  }
}

constexpr Kernels kTable = {GENREC_HKV_ISA_NAME, find, gather, pool, update, initialize, read_row,
                            write_row};

}  // namespace
}  // namespace hkv
}  // namespace genrec
