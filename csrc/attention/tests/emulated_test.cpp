// The kernels themselves, run on the host (emulator.h) on small jagged batches, against sums in fp64.
//
// -DGENREC_DIM: the head dim of the kernels. Built with GENREC_EMULATED; needs the headers of CUTLASS and CUDA, no nvcc.
#include "attention/device.h"

#include <cutlass/bfloat16.h>

#include "attention/dq.h"
#include "attention/forward.h"

using namespace genrec::attention;
using Element = cutlass::bfloat16_t;

namespace {

constexpr int D = GENREC_DIM;

struct Lengths {
  int queries, keys, contexts, targets;
};

struct Case {
  const char* name;
  std::vector<Lengths> sequences;
  MaskRule rule;
  int heads, qk_dim, v_dim, blocks;
  bool ordered;
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

// |x - reference| / |reference|; infinite where anything isn't finite.
double error(const Matrix& x, const std::vector<double>& reference) {
  double difference = 0, size = 0;
  for (size_t i = 0; i < reference.size(); ++i) {
    const double d = double(float(x.data[i])) - reference[i];
    if (!std::isfinite(d)) return INFINITY;
    difference += d * d, size += reference[i] * reference[i];
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
    list_phase_write(*scratch, batch, kind, size, tiles.data(), 0, 1);
  }
  WorkList list() const { return {&length, tiles.data()}; }
};

// A batch, its tensors, and the wanted output and gradients.
struct Problem {
  Case c;
  std::vector<int> query_offsets{0}, key_offsets{0}, contexts, targets;
  Matrix q, k, v, d_out;
  std::vector<double> out, dq, dk, dv;
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
        out(d_out.data.size()), dq(q.data.size()), dk(k.data.size()), dv(v.data.size()),
        alpha(1.f / std::sqrt(float(given.qk_dim))) {
    for (const Lengths& s : c.sequences) {
      query_offsets.push_back(query_offsets.back() + s.queries);
      key_offsets.push_back(key_offsets.back() + s.keys);
      contexts.push_back(s.contexts);
      targets.push_back(s.targets);
    }
    for (size_t b = 0; b < c.sequences.size(); ++b)
      for (int h = 0; h < c.heads; ++h) add_sequence(int(b), h);
  }

  void add_sequence(int b, int h) {
    const Lengths s = c.sequences[b];
    const SequenceMask<false> mask(s.keys, s.contexts, s.targets, c.rule);
    for (int i = 0; i < s.queries; ++i) {
      const RowSight sight = mask.row(i + s.keys - s.queries);
      for (int j = 0; j < s.keys; ++j)
        if (sight.sees(j)) add_pair(query_offsets[b] + i, key_offsets[b] + j, h);
    }
  }

  void add_pair(int i, int j, int h) {
    const Element *qi = &q.data[q.at(i, h)], *kj = &k.data[k.at(j, h)];
    const Element *vj = &v.data[v.at(j, h)], *gi = &d_out.data[d_out.at(i, h)];
    double score = 0, d_weight = 0;
    for (int d = 0; d < c.qk_dim; ++d) score += double(float(qi[d])) * float(kj[d]);
    for (int d = 0; d < c.v_dim; ++d) d_weight += double(float(gi[d])) * float(vj[d]);
    score *= alpha;
    const double sigma = 1 / (1 + std::exp(-score)), weight = score * sigma * scale;
    const double d_score = d_weight * scale * sigma * (1 + score * (1 - sigma)) * alpha;
    for (int d = 0; d < c.v_dim; ++d) {
      out[d_out.at(i, h) + d] += weight * float(vj[d]);
      dv[v.at(j, h) + d] += weight * float(gi[d]);
    }
    for (int d = 0; d < c.qk_dim; ++d) {
      dq[q.at(i, h) + d] += d_score * float(kj[d]);
      dk[k.at(j, h) + d] += d_score * float(qi[d]);
    }
  }

  Batch batch() const {
    return {query_offsets.data(), key_offsets.data(), contexts.data(), targets.data(), int(c.sequences.size())};
  }
  Common common(int* counter) const { return {c.rule, c.heads, 0.5f * alpha, scale, nullptr, counter}; }
};

template <bool kCausal>
bool forward(const Problem& problem) {
  using Shape = ForwardShape<Element, D, kCausal>;
  const List list(problem.batch(), ListKind::kQueries, Shape::kQueries);
  Matrix out(problem.q.rows, problem.c.heads, problem.c.v_dim, true);
  int counter = 0;
  ForwardParams p{problem.q.map(), problem.k.map(), problem.v.map(), problem.common(&counter), list.list(), out.output()};
  const bool ran = emulator::launch(problem.c.blocks, Shape::kThreads, sizeof(typename Shape::Shared),
                                    [&] { forward_kernel<Shape>(p); });
  const double off = error(out, problem.out);
  std::printf("%s, D = %d, forward: %s, out %.1e\n", problem.c.name, D, ran ? "ran" : "hung", off);
  return ran && off < 0.005;
}

template <bool kCausal, Part kPart>
bool pass(const Problem& problem, BackwardParams p) {
  using Shape = BackwardShape<Element, D, kCausal, kPart>;
  int counter = 0;
  p.common = problem.common(&counter);
  return emulator::launch(problem.c.blocks, Shape::kThreads, sizeof(typename Shape::Shared),
                          [&] { backward_kernel<Shape>(p); });
}

template <bool kCausal>
bool backward(const Problem& problem) {
  constexpr bool kTwice = D == 256;
  constexpr Part kFirst = kTwice ? Part::kKeysAndQueries : Part::kAll;
  using Shape = BackwardShape<Element, D, kCausal, kFirst>;
  const List keys(problem.batch(), ListKind::kKeys, Shape::kKeys);
  const List queries(problem.batch(), ListKind::kQueries, Shape::kQueries);
  const int heads = problem.c.heads;
  Matrix dq(problem.q.rows, heads, problem.c.qk_dim, true), dk(problem.k.rows, heads, problem.c.qk_dim, true);
  Matrix dv(problem.v.rows, heads, problem.c.v_dim, true);
  const int64_t tiles = list_capacity(dq.rows, problem.c.sequences.size(), Shape::kQueries) * heads;
  std::vector<float> sums(tiles * Shape::kQueries * D);
  std::vector<int> turns(tiles * 2);
  BackwardParams p{problem.q.map(), problem.k.map(), problem.v.map(), problem.d_out.map(), {}, keys.list(),
                   dk.output(), dv.output(), sums.data(), problem.c.ordered ? turns.data() : nullptr};
  bool ran = pass<kCausal, kFirst>(problem, p);
  if constexpr (kTwice) ran = pass<kCausal, Part::kValues>(problem, p) && ran;
  const ConvertParams convert{problem.common(nullptr), queries.list(), sums.data(), dq.output()};
  ran = emulator::launch(2, 256, 0, [&] { convert_dq_kernel<Shape>(convert); }) && ran;
  const double off[3] = {error(dq, problem.dq), error(dk, problem.dk), error(dv, problem.dv)};
  std::printf("%s, D = %d, backward: %s, dq %.1e, dk %.1e, dv %.1e\n", problem.c.name, D, ran ? "ran" : "hung", off[0],
              off[1], off[2]);
  return ran && off[0] < 0.005 && off[1] < 0.005 && off[2] < 0.005;
}

template <bool kCausal>
bool check(const Case& c) {
  const Problem problem(c);
  const bool ahead = forward<kCausal>(problem), back = backward<kCausal>(problem);
  std::fflush(stdout);
  return ahead && back;
}

}  // namespace

int main() {
  bool good = check<true>({"causal", {{200, 200, 0, 0}, {3, 3, 0, 0}, {0, 0, 0, 0}, {70, 70, 0, 0}}, {1, -1, 1},
                           1, D, D, 2, false});
  good &= check<false>({"contexts, targets, cached keys, padded dim", {{150, 150, 3, 40}, {40, 200, 5, 9}, {0, 5, 0, 0}},
                        {2, -1, 1}, 2, D, D - 8, 2, true});
  good &= check<false>({"window", {{900, 900, 4, 9}, {1, 1, 0, 0}}, {1, 700, 1}, 1, D, D, 2, true});
  std::printf(good ? "ok\n" : "bad\n");
  return good ? 0 : 1;
}
