// Small jagged batches for the emulated kernels: tensors, biases, and the wanted output and gradients in fp64.
//
// -DGENREC_DIM: the head dim of the kernels. Built with GENREC_EMULATED; needs the headers of CUTLASS and CUDA, no nvcc.
#pragma once

#include "attention/device.h"

#include <cutlass/bfloat16.h>

#include "attention/backward.h"
#include "attention/bias_fill.h"
#include "attention/dq.h"
#include "attention/forward.h"

namespace genrec::attention {

using Element = cutlass::bfloat16_t;

constexpr int D = GENREC_DIM;

struct Lengths {
  int queries, keys, contexts, targets;
};

enum class Clock { kSeconds, kTied, kYears, kAny };

struct BiasCase {
  Bias kind = Bias::kNone;
  bool position = false;
  int buckets = 0;  // 0: no time table
  Clock clock = Clock::kSeconds;
  bool query_times = false;
  bool head_shared = false;  // of a dense bias
};

struct Case {
  const char* name;
  std::vector<Lengths> sequences;
  MaskRule rule;
  int heads, qk_dim, v_dim, blocks;
  bool ordered;
  BiasCase bias = {};
  bool blind = false;  // alpha is 0: scores are the bias alone
};

struct Matrix {
  int rows, heads, dim;
  std::vector<Element> data;

  Matrix(int rows_, int heads_, int dim_, bool poisoned) : rows(rows_), heads(heads_), dim(dim_) {
    std::normal_distribution<float> normal;
    data.assign(size_t(rows) * heads * dim, Element::bitcast(0x7fc0));
    if (!poisoned)
      for (Element& x : data) x = Element(normal(emulator::random_numbers));
  }
  size_t at(int row, int head) const { return (size_t(row) * heads + head) * dim; }
  CUtensorMap map() const { return emulator::map_of({data.data(), dim, heads, rows, int64_t(heads) * dim, dim}); }
  Output output() { return {data.data(), int64_t(heads) * dim, dim, dim}; }
};

// |x - reference| / |reference|, or / sqrt(size); infinite where anything isn't finite.
template <class Number>
double error(const std::vector<Number>& x, const std::vector<double>& reference, double size = 0) {
  const bool given = size > 0;
  double difference = 0;
  for (size_t i = 0; i < reference.size(); ++i) {
    const double d = double(float(x[i])) - reference[i];
    if (!std::isfinite(d)) return INFINITY;
    difference += d * d, size += given ? 0 : reference[i] * reference[i];
  }
  return std::sqrt(difference / std::max(size, 1e-30));
}

struct List {
  std::vector<TileRecord> tiles;
  int length;

  List(const Batch& batch, ListKind kind, int size) {
    auto scratch = std::make_unique<ListScratch>();
    list_phase_count(*scratch, batch, kind, size, 0, 1);
    length = list_phase_sum(*scratch);
    tiles.resize(length + 1);
    for (int b = 0; b < batch.sequences; ++b) {
      list_phase_chunk(*scratch, batch, kind, size, b, 0);
      list_phase_write(*scratch, batch, kind, size, 2, tiles.data(), b, 0);
      list_phase_advance(*scratch, 0);
    }
  }
  WorkList list() const { return {&length, tiles.data()}; }
};

// Bucket edges and buckets by their definition (genrec.attention.spec), distances in 128 bits.
inline std::vector<int64_t> bucket_edges(int buckets) {
  std::vector<int64_t> edges;
  for (int b = 1; b < buckets; ++b) {
    const double power = 0.301 * b;
    edges.push_back(power < 43.668 ? int64_t(std::ceil(std::exp(power))) : INT64_MAX);
  }
  return edges;
}

inline int plain_bucket(const std::vector<int64_t>& edges, int64_t a, int64_t b) {
  const __int128 apart = __int128(a) - b, size = std::min<__int128>(apart < 0 ? -apart : apart, INT64_MAX - 1);
  int bucket = 0;
  while (bucket < int(edges.size()) && size >= edges[bucket]) ++bucket;
  return bucket;
}

// A batch's bias and the wanted gradients of its tables or matrix.
struct BiasInput {
  BiasCase c;
  int max_positions = 0, longest = 0, longest_keys = 0, dense_heads = 0;
  std::vector<float> position, time, dense;
  std::vector<int64_t> edges, key_times, query_times;
  std::vector<double> d_position, d_time, d_dense;
  double squares = 0;  // of all gradients of scores

  BiasInput(const Case& given) : c(given.bias) {
    if (c.kind == Bias::kNone) return;
    std::mt19937& draw = emulator::random_numbers;
    std::normal_distribution<float> normal;
    std::uniform_real_distribution<double> uniform;
    const double digits[] = {5, 4, 8.5, 12};  // of the largest gap between events
    for (const Lengths& s : given.sequences) {
      longest = std::max(longest, s.queries), longest_keys = std::max(longest_keys, s.keys);
      int64_t now = 1'000'000'000;
      for (int j = 0; j < s.keys; ++j) {
        int64_t gap = int64_t(std::pow(10, digits[int(c.clock)] * uniform(draw)));
        if (c.clock == Clock::kTied && uniform(draw) < 0.6) gap = 0;
        if (c.clock == Clock::kAny && uniform(draw) < 0.5) gap = -gap;
        if (c.clock == Clock::kAny && uniform(draw) < 0.01) gap = INT64_MAX / 3;
        now = c.clock == Clock::kAny ? gap : now + gap;
        key_times.push_back(now);
      }
      for (int i = 0; i < s.queries && c.query_times; ++i)
        query_times.push_back(key_times[key_times.size() - s.queries + i] + int64_t(1e5 * uniform(draw)));
    }
    const auto fill = [&](std::vector<float>& table, std::vector<double>& gradient, size_t size) {
      table.resize(size), gradient.resize(size);
      for (float& x : table) x = normal(draw);
    };
    if (c.position) max_positions = longest_keys + 5, fill(position, d_position, 2 * max_positions - 1);
    if (c.buckets > 0) fill(time, d_time, c.buckets), edges = bucket_edges(c.buckets);
    dense_heads = c.head_shared ? 1 : given.heads;
    if (c.kind == Bias::kDense)
      fill(dense, d_dense, given.sequences.size() * dense_heads * longest * longest_keys);
  }

  size_t dense_at(int b, int h, int i, int j) const {
    return ((size_t(b) * dense_heads + (dense_heads > 1 ? h : 0)) * longest + i) * longest_keys + j;
  }

  // Calls use(value, gradient) for each term of the bias of query i and key j of a sequence.
  template <class Use>
  void terms(const Lengths& s, int query_start, int key_start, int b, int h, int i, int j, Use use) {
    if (!dense.empty()) use(dense[dense_at(b, h, i, j)], d_dense[dense_at(b, h, i, j)]);
    const int row = i + s.keys - s.queries;
    if (!position.empty()) use(position[j - row + max_positions - 1], d_position[j - row + max_positions - 1]);
    if (time.empty()) return;
    const int64_t asked = c.query_times ? query_times[query_start + i] : key_times[key_start + std::min(row + 1, s.keys - 1)];
    const int bucket = plain_bucket(edges, asked, key_times[key_start + j]);
    use(time[bucket], d_time[bucket]);
  }

  RelativeBias relative() const {
    RelativeBias bias{};
    bias.position = position.empty() ? nullptr : position.data();
    bias.time = time.empty() ? nullptr : time.data();
    bias.edges = edges.data(), bias.key_times = key_times.data();
    bias.query_times = c.query_times ? query_times.data() : nullptr;
    bias.max_positions = max_positions, bias.buckets = int(time.size());
    return bias;
  }

  DenseBias matrix() const {
    const int64_t row = longest_keys, head = row * longest;
    return {dense.data(), head * dense_heads, dense_heads > 1 ? head : 0, row, nullptr, 0, 0, 0};
  }
};

// A batch, its tensors, and the wanted output and gradients.
struct Problem {
  Case c;
  std::vector<int> query_offsets{0}, key_offsets{0}, contexts, targets;
  Matrix q, k, v, d_out;
  BiasInput bias;
  std::vector<double> out, dq, dk, dv;
  std::vector<std::vector<double>> d_scores;  // (sequence, head), (queries, keys)
  float alpha, scale = 0.02f;

  static int total(const Case& c, int Lengths::* which) {
    int sum = 0;
    for (const Lengths& s : c.sequences) sum += s.*which;
    return sum;
  }

  explicit Problem(const Case& given)
      : c(given),
        q(total(given, &Lengths::queries), given.heads, given.qk_dim, false),
        k(total(given, &Lengths::keys), given.heads, given.qk_dim, false),
        v(total(given, &Lengths::keys), given.heads, given.v_dim, false),
        d_out(total(given, &Lengths::queries), given.heads, given.v_dim, false),
        bias(given),
        out(d_out.data.size()), dq(q.data.size()), dk(k.data.size()), dv(v.data.size()),
        alpha(given.blind ? 0.f : 1.f / std::sqrt(float(given.qk_dim))) {
    for (const Lengths& s : c.sequences) {
      query_offsets.push_back(query_offsets.back() + s.queries);
      key_offsets.push_back(key_offsets.back() + s.keys);
      contexts.push_back(s.contexts);
      targets.push_back(s.targets);
    }
    for (size_t b = 0; b < c.sequences.size(); ++b) {
      for (int h = 0; h < c.heads; ++h) {
        d_scores.emplace_back(size_t(c.sequences[b].queries) * c.sequences[b].keys);
        add_sequence(int(b), h);
      }
    }
  }

  void add_sequence(int b, int h) {
    const Lengths s = c.sequences[b];
    const SequenceMask<false> mask(s.keys, s.contexts, s.targets, c.rule);
    for (int i = 0; i < s.queries; ++i) {
      const RowSight sight = mask.row(i + s.keys - s.queries);
      for (int j = 0; j < s.keys; ++j) {
        if (!sight.sees(j)) continue;
        double added = 0;
        const auto terms = [&](auto use) { bias.terms(s, query_offsets[b], key_offsets[b], b, h, i, j, use); };
        terms([&](float value, double&) { added += value; });
        const double d_score = add_pair(query_offsets[b] + i, key_offsets[b] + j, h, added);
        terms([&](float, double& gradient) { gradient += d_score; });
        d_scores.back()[size_t(i) * s.keys + j] = d_score;
        bias.squares += d_score * d_score;
      }
    }
  }

  // Returns the gradient of the score.
  double add_pair(int i, int j, int h, double added) {
    const Element *qi = &q.data[q.at(i, h)], *kj = &k.data[k.at(j, h)];
    const Element *vj = &v.data[v.at(j, h)], *gi = &d_out.data[d_out.at(i, h)];
    double score = 0, d_weight = 0;
    for (int d = 0; d < c.qk_dim; ++d) score += double(float(qi[d])) * float(kj[d]);
    for (int d = 0; d < c.v_dim; ++d) d_weight += double(float(gi[d])) * float(vj[d]);
    score = alpha * score + added;
    const double sigma = 1 / (1 + std::exp(-score)), weight = score * sigma * scale;
    const double d_score = d_weight * scale * sigma * (1 + score * (1 - sigma));
    for (int d = 0; d < c.v_dim; ++d) {
      out[d_out.at(i, h) + d] += weight * float(vj[d]);
      dv[v.at(j, h) + d] += weight * float(gi[d]);
    }
    for (int d = 0; d < c.qk_dim; ++d) {
      dq[q.at(i, h) + d] += d_score * alpha * float(kj[d]);
      dk[k.at(j, h) + d] += d_score * alpha * float(qi[d]);
    }
    return d_score;
  }

  Batch batch() const {
    return {query_offsets.data(), key_offsets.data(), contexts.data(), targets.data(), int(c.sequences.size())};
  }
  Common common(int* counter) const { return {c.rule, c.heads, 0.5f * alpha, scale, nullptr, counter}; }

  // The parameters of a kernel with a bias, the bias among them.
  template <class Shape, class Base>
  typename Shape::Params with_bias(const Base& base) const {
    typename Shape::Params params{};
    static_cast<Base&>(params) = base;
    if constexpr (Shape::kBias == Bias::kRelative) params.bias = bias.relative();
    if constexpr (Shape::kBias == Bias::kDense) params.bias = bias.matrix();
    return params;
  }
};

// Places of dS for the first `stored` sequences, the others' room left out.
struct Store {
  std::vector<int> first;
  int left = 0, cells = 0;
  std::vector<Element> data, zeros;

  Store(const Problem& problem, size_t stored) : first(problem.c.sequences.size() + 1), zeros(kLargestPart, Element(0.f)) {
    const Batch batch = problem.batch();
    for (size_t b = 0; b < stored; ++b) cells += stored_sequence(batch, problem.c.rule, int(b)).cells();
    auto scratch = std::make_unique<StoreScratch>();
    constexpr int kThreads = 2;
    for (int t = 0; t < kThreads; ++t) store_phase_count(*scratch, batch, problem.c.rule, t, kThreads);
    store_phase_sum(*scratch, &left, kThreads);
    for (int t = 0; t < kThreads; ++t)
      store_phase_place(*scratch, batch, problem.c.rule, cells, first.data(), &left, t, kThreads);
    data.assign(size_t(cells) * problem.c.heads * kCellElements, Element::bitcast(0x7fc0));
  }
  DsStore store() { return {data.data(), first.data(), &left, zeros.data()}; }
};

// A bias in memory, in the places that a store of dS has.
struct FilledBias {
  const Store& places;
  std::vector<uint16_t> data;

  explicit FilledBias(const Store& store) : places(store), data(size_t(store.cells) * kCellElements, 0x7fff) {}
  BiasStore store() const { return {data.data(), places.first.data(), &places.left}; }

  bool fill(const Problem& problem) {
    const List list(problem.batch(), ListKind::kQueries, kCellQueries);
    int counter = 0;
    FillParams p{problem.bias.relative(), list.list(), problem.c.rule, &counter};
    p.bias.store = store();
    return emulator::launch(2, kFillThreads, sizeof(FillShared), [&] { fill_bias_kernel(p); });
  }
};

// The passes of a relative bias from D = 64 on, the bias of the first `stored` sequences in memory.
template <bool kCausal>
bool storing_forward(const Problem& problem, size_t stored) {
  using Stored = ForwardShape<Element, D, kCausal, Bias::kRelative, true>;
  using LeftOver = ForwardShape<Element, D, kCausal, Bias::kRelative>;
  const List units(problem.batch(), ListKind::kQueries, Stored::kQueries);
  const List list(problem.batch(), ListKind::kQueries, LeftOver::kQueries);
  Matrix out(problem.q.rows, problem.c.heads, problem.c.v_dim, true);
  Store places(problem, stored);
  FilledBias filled(places);
  bool ran = filled.fill(problem);
  int counters[2] = {0, 0};
  ForwardParams base{problem.q.map(), problem.k.map(), problem.v.map(), problem.common(&counters[0]), units.list(),
                     out.output()};
  auto first = problem.with_bias<Stored>(base);
  base.common.counter = &counters[1], base.list = list.list();
  auto second = problem.with_bias<LeftOver>(base);
  first.bias.store = second.bias.store = filled.store();
  const int blocks = problem.c.blocks;
  ran = emulator::launch(blocks, Stored::kThreads, sizeof(typename Stored::Shared),
                         [&] { forward_kernel<Stored>(first); }) && ran;
  ran = emulator::launch(blocks, LeftOver::kThreads, sizeof(typename LeftOver::Shared),
                         [&] { forward_kernel<LeftOver>(second); }) && ran;
  const double off = error(out.data, problem.out);
  std::printf("%s, D = %d, forward%s by a stored bias: %s, out %.1e, bias of %zu sequences kept\n", problem.c.name, D,
              kCausal ? ", causal," : "", ran ? "ran" : "hung", off,
              problem.c.sequences.size() - places.left);
  return ran && off < 0.005;
}

template <bool kCausal, Bias kBias>
bool forward(const Problem& problem) {
  using Shape = ForwardShape<Element, D, kCausal, kBias>;
  const List list(problem.batch(), ListKind::kQueries, Shape::kQueries);
  Matrix out(problem.q.rows, problem.c.heads, problem.c.v_dim, true);
  int counter = 0;
  const auto p = problem.with_bias<Shape>(ForwardParams{
      problem.q.map(), problem.k.map(), problem.v.map(), problem.common(&counter), list.list(), out.output()});
  const bool ran = emulator::launch(problem.c.blocks, Shape::kThreads, sizeof(typename Shape::Shared),
                                    [&] { forward_kernel<Shape>(p); });
  const double off = error(out.data, problem.out);
  std::printf("%s, D = %d, forward: %s, out %.1e\n", problem.c.name, D, ran ? "ran" : "hung", off);
  return ran && off < 0.005;
}

// Where the backward pass leaves the gradients of a bias.
struct BiasSums {
  std::vector<float> position, time, dense;

  BiasSums(const BiasInput& bias, int copies)
      : position(bias.position.size() * copies), time(bias.time.size() * copies), dense(bias.dense.size()) {}
};

template <class Shape>
bool pass(const Problem& problem, BackwardParams p, BiasSums& sums, int first_copy = 0) {
  int counter = 0;
  p.common = problem.common(&counter);
  auto params = problem.with_bias<Shape>(p);
  if constexpr (Shape::kBias == Bias::kRelative) {
    if (!sums.position.empty()) params.bias.position_sums = sums.position.data() + first_copy * problem.bias.position.size();
    if (!sums.time.empty()) params.bias.time_sums = sums.time.data() + first_copy * problem.bias.time.size();
  }
  if constexpr (Shape::kBias == Bias::kDense) {
    params.bias.gradient = sums.dense.data();
    params.bias.gradient_batch_stride = params.bias.batch_stride;
    params.bias.gradient_head_stride = params.bias.head_stride;
    params.bias.gradient_row_stride = params.bias.row_stride;
  }
  return emulator::launch(problem.c.blocks, Shape::kThreads, sizeof(typename Shape::Shared),
                          [&] { backward_kernel<Shape>(params); });
}

// The error of a table's gradient, relative to the root of all squares that it sums: signs differ, the sum may be small.
inline double table_error(const std::vector<float>& copies, int count, const std::vector<double>& wanted,
                          double squares) {
  if (wanted.empty()) return 0;
  std::vector<float> table(wanted.size(), NAN);
  const SumParams p{copies.data(), count, int(table.size()), table.data()};
  const int blocks = divide_up(p.entries, 32);
  if (!emulator::launch(blocks, kSumThreads, kSumThreads * 4, [&] { sum_tables_kernel<kSumThreads>(p); })) return INFINITY;
  return error(table, wanted, squares);
}

template <bool kCausal, Bias kBias>
bool backward(const Problem& problem) {
  constexpr bool kTwice = D == 256;
  using Shape = BackwardShape<Element, D, kCausal, kTwice ? Part::kKeysAndQueries : Part::kAll, kBias>;
  const List keys(problem.batch(), ListKind::kKeys, Shape::kKeys);
  const List queries(problem.batch(), ListKind::kQueries, Shape::kQueries);
  const int heads = problem.c.heads;
  Matrix dq(problem.q.rows, heads, problem.c.qk_dim, true), dk(problem.k.rows, heads, problem.c.qk_dim, true);
  Matrix dv(problem.v.rows, heads, problem.c.v_dim, true);
  const int64_t tiles = list_capacity(dq.rows, problem.c.sequences.size(), Shape::kQueries) * heads;
  std::vector<float> sums(tiles * Shape::kQueries * D);
  std::vector<int> turns(tiles * 2);
  const int copies = problem.c.blocks * Shape::Teams::kCopies;
  BiasSums bias(problem.bias, copies);
  BackwardParams p{problem.q.map(), problem.k.map(), problem.v.map(), problem.d_out.map(), {}, keys.list(),
                   dk.output(), dv.output(), sums.data(), problem.c.ordered ? turns.data() : nullptr};
  bool ran = pass<Shape>(problem, p, bias);
  bool repeated = true;  // bit by bit, in the deterministic mode
  if (problem.c.ordered) {
    BiasSums again(problem.bias, copies);
    std::vector<float> sums_again(sums.size());
    std::vector<int> turns_again(turns.size());
    BackwardParams q = p;
    q.dq_sum = sums_again.data(), q.turns = turns_again.data();
    ran = pass<Shape>(problem, q, again) && ran;
    repeated = sums == sums_again && bias.position == again.position && bias.time == again.time;
  }
  if constexpr (kTwice) ran = pass<BackwardShape<Element, D, kCausal, Part::kValues, kBias>>(problem, p, bias) && ran;
  const ConvertParams convert{problem.common(nullptr), queries.list(), sums.data(), dq.output()};
  ran = emulator::launch(2, 256, 0, [&] { convert_dq_kernel<Shape>(convert); }) && ran;
  const double off[] = {error(dq.data, problem.dq), error(dk.data, problem.dk), error(dv.data, problem.dv),
                        table_error(bias.position, copies, problem.bias.d_position, problem.bias.squares),
                        table_error(bias.time, copies, problem.bias.d_time, problem.bias.squares),
                        error(bias.dense, problem.bias.d_dense)};
  std::printf("%s, D = %d, backward: %s, dq %.1e, dk %.1e, dv %.1e", problem.c.name, D, ran ? "ran" : "hung", off[0],
              off[1], off[2]);
  if (kBias != Bias::kNone) std::printf(", position %.1e, time %.1e, dense %.1e", off[3], off[4], off[5]);
  std::printf("\n");
  if (!repeated) std::printf("not the same twice\n");
  bool good = ran && repeated;
  for (double one : off) good = good && one < 0.005;
  return good;
}

}  // namespace genrec::attention
