// The kernel that gives dQ and the gradients of the relative bias's tables from dS in memory, run on the host (emulator.h),
// against sums in fp64. dS is the reference's, rounded.
#include "attention/tests/problem.h"

#include "attention/backward_sums.h"

using namespace genrec::attention;

namespace {

using Parts = CellParts<64>;
using Shape = StoredSumsShape<Element, D, false, Parts>;

// What the pass before leaves: dS before alpha and scale, zeros where a pair is hidden, nothing in parts that a tile of 128
// keys doesn't visit.
void fill(Store& store, const Problem& problem) {
  for (size_t b = 0; b < problem.c.sequences.size(); ++b) {
    const Lengths s = problem.c.sequences[b];
    const SequenceMask<false> mask(s.keys, s.contexts, s.targets, problem.c.rule);
    const StoredSequence cells = stored_sequence(problem.batch(), problem.c.rule, int(b));
    for (int h = 0; h < problem.c.heads; ++h) {
      const CellPlaces places(store.store(), cells, int(b), h, problem.c.heads);
      const std::vector<double>& d_scores = problem.d_scores[b * problem.c.heads + h];
      for (int key = 0; key < s.keys; key += 64) {
        const TileRanges visited = mask.query_tiles(key / 128 * 128, key / 128 * 128 + 128, 64, s.queries);
        for (int k = 0; k < visited.count(); ++k) {
          const int m = visited.tile(k);
          const int64_t part = places.part<Parts>(m, key / 64);
          if (part < 0) continue;
          for (int e = 0; e < 64 * 64; ++e) {
            const int i = 64 * m + e / 64, j = key + e % 64;
            const bool there = i < s.queries && j < s.keys;
            const double d_score = there ? d_scores[size_t(i) * s.keys + j] : 0.;
            store.data[part * Parts::kElements + (i % 64 / 8 * 64 + j % 64) * 8 + i % 8] = Element(float(d_score / problem.scale));
          }
        }
      }
    }
  }
}

// The gradients that sequences with a place have to give.
struct Wanted {
  BiasInput bias;
  std::vector<double> dq;

  Wanted(const Problem& problem, const Store& store) : bias(problem.bias), dq(problem.dq) {
    for (std::vector<double>* table : {&bias.d_position, &bias.d_time}) std::fill(table->begin(), table->end(), 0.);
    bias.squares = 0;
    for (size_t b = 0; b < problem.c.sequences.size(); ++b) {
      const Lengths s = problem.c.sequences[b];
      for (int h = 0; h < problem.c.heads; ++h) {
        for (int e = 0; e < s.queries * s.keys && store.first[b] >= 0; ++e) {
          const double d_score = problem.d_scores[b * problem.c.heads + h][e];
          if (d_score == 0) continue;
          bias.squares += d_score * d_score;
          bias.terms(s, problem.query_offsets[b], problem.key_offsets[b], int(b), h, e / s.keys, e % s.keys,
                     [&](float, double& gradient) { gradient += d_score; });
        }
      }
    }
  }
};

struct Gradients {
  Matrix dq;
  BiasSums tables;

  explicit Gradients(const Problem& problem)
      : dq(problem.q.rows, problem.c.heads, problem.c.qk_dim, true),
        tables(problem.bias, problem.c.blocks * Shape::kCopies) {}
};

struct Tables {
  bool position = true, time = true;
};

bool run(const Problem& problem, Store& store, Gradients& to, Tables wants = {}) {
  const List queries(problem.batch(), ListKind::kQueries, Shape::kQueries);
  int counter = 0, turns = 0;
  BackwardParams p{problem.q.map(), problem.k.map(), problem.v.map(), problem.d_out.map(), problem.common(&counter),
                   queries.list(), {}, {}, nullptr, problem.c.ordered ? &turns : nullptr, to.dq.output(), store.store()};
  auto params = problem.with_bias<Shape>(p);
  if (!to.tables.position.empty() && wants.position) params.bias.position_sums = to.tables.position.data();
  if (!to.tables.time.empty() && wants.time) params.bias.time_sums = to.tables.time.data();
  return emulator::launch(problem.c.blocks, Shape::kThreads, sizeof(typename Shape::Shared),
                          [&] { stored_sums_kernel<Shape>(params); });
}

uint16_t bits(const Element& x) { return x.storage; }

// dQ of sequences with a place; of the others nothing is written.
double dq_error(const Problem& problem, const Store& store, const Matrix& dq) {
  double difference = 0, size = 0;
  for (size_t b = 0; b < problem.c.sequences.size(); ++b) {
    const size_t row = size_t(problem.c.heads) * problem.c.qk_dim;
    for (size_t e = problem.query_offsets[b] * row; e < problem.query_offsets[b + 1] * row; ++e) {
      if (store.first[b] < 0) {
        if (bits(dq.data[e]) != 0x7fc0) return INFINITY;
        continue;
      }
      const double d = double(float(dq.data[e])) - problem.dq[e];
      if (!std::isfinite(d)) return INFINITY;
      difference += d * d, size += problem.dq[e] * problem.dq[e];
    }
  }
  return std::sqrt(difference / std::max(size, 1e-30));
}

bool check(const Case& c, size_t stored, Tables wants = {}) {
  const Problem problem(c);
  Store store(problem, stored);
  fill(store, problem);
  const Wanted wanted(problem, store);
  Gradients got(problem);
  bool ran = run(problem, store, got, wants), repeated = true;
  if (c.ordered) {
    Gradients again(problem);
    ran = run(problem, store, again, wants) && ran;
    repeated = std::memcmp(got.dq.data.data(), again.dq.data.data(), 2 * got.dq.data.size()) == 0 &&
               got.tables.position == again.tables.position && got.tables.time == again.tables.time;
  }
  const int copies = c.blocks * Shape::kCopies;
  const double off[] = {dq_error(problem, store, got.dq),
                        wants.position ? table_error(got.tables.position, copies, wanted.bias.d_position, wanted.bias.squares) : 0.,
                        wants.time ? table_error(got.tables.time, copies, wanted.bias.d_time, wanted.bias.squares) : 0.};
  std::printf("%s, dS of %zu sequences kept: %s, dq %.1e, position %.1e, time %.1e%s\n", c.name,
              c.sequences.size() - store.left, ran ? "ran" : "hung", off[0], off[1], off[2],
              repeated ? "" : ", not the same twice");
  std::fflush(stdout);
  bool good = ran && repeated;
  for (double one : off) good = good && one < 0.005;
  return good;
}

// A number that isn't finite reaches the entries of its own pairs and no others.
bool check_not_finite() {
  constexpr int kRow = 20, kRows = 150;
  Problem problem({"not finite", {{kRows, kRows, 0, 0}}, {1, -1, 1}, 1, D, D, 1, false,
                   {Bias::kRelative, true, 64, Clock::kTied}});
  const BiasInput& bias = problem.bias;
  std::vector<double> lost_position(bias.d_position.size()), lost_time(bias.d_time.size());
  BiasInput lost = bias;
  for (std::vector<double>* table : {&lost.d_position, &lost.d_time}) std::fill(table->begin(), table->end(), 0.);
  for (int j = 0; j <= kRow; ++j) {
    problem.d_scores[0][kRow * kRows + j] = NAN;
    lost.terms(problem.c.sequences[0], 0, 0, 0, 0, kRow, j, [](float, double& gradient) { gradient = 1; });
  }
  Store store(problem, 1);
  fill(store, problem);
  Gradients got(problem);
  bool good = run(problem, store, got);
  int bad = 0;
  const auto compare = [&](const std::vector<float>& copies, const std::vector<double>& wanted, const std::vector<double>& own) {
    for (size_t e = 0; e < wanted.size(); ++e) {
      float found = 0;
      for (int copy = 0; copy < Shape::kCopies; ++copy) found += copies[copy * wanted.size() + e];
      bad += own[e] > 0 ? !std::isnan(found) : !(std::abs(found - wanted[e]) < 0.01 * std::sqrt(bias.squares));
    }
  };
  compare(got.tables.position, bias.d_position, lost.d_position);
  compare(got.tables.time, bias.d_time, lost.d_time);
  std::printf("not finite: %d entries of the tables are wrong\n", bad);
  return good && bad == 0;
}

}  // namespace

int main() {
  const std::vector<Lengths> plain{{330, 330, 0, 0}, {3, 3, 0, 0}, {0, 0, 0, 0}, {70, 70, 0, 0}};
  const std::vector<Lengths> mixed{{150, 150, 3, 40}, {40, 200, 5, 9}, {0, 5, 0, 0}};
  const BiasCase seconds{Bias::kRelative, true, 129, Clock::kSeconds};
  bool good = check_not_finite();
  good &= check({"position and seconds", plain, {1, -1, 1}, 1, D, D, 2, false, seconds}, 4);
  good &= check({"the same, position alone wanted", plain, {1, -1, 1}, 1, D, D, 2, false, seconds}, 1, {true, false});
  good &= check({"the same, time alone wanted", plain, {1, -1, 1}, 1, D, D, 2, true, seconds}, 4, {false, true});
  good &= check({"the same, dQ alone wanted", plain, {1, -1, 1}, 2, D, D, 2, false, seconds}, 4, {false, false});
  good &= check({"none has a place", plain, {1, -1, 1}, 1, D, D, 2, true, seconds}, 0);
  const Case ties{"ties, cached keys, contexts, targets", mixed, {2, -1, 1}, 2, D, D - 8, 2, true,
                  {Bias::kRelative, true, 64, Clock::kTied}};
  good &= check(ties, 3) & check(ties, 1);
  good &= check({"years, window, query times", {{520, 520, 4, 9}, {1, 1, 0, 0}}, {1, 300, 1}, 1, D, D, 2, true,
                 {Bias::kRelative, false, 200, Clock::kYears, true}}, 2);
  good &= check({"any times, not causal", {{200, 200, 0, 0}, {40, 90, 3, 5}}, {1, -1, 0}, 1, D, D, 3, true,
                 {Bias::kRelative, true, 200, Clock::kAny}}, 2);
  good &= check({"seconds, not causal", {{450, 450, 0, 0}, {40, 90, 3, 5}}, {1, -1, 0}, 1, D, D, 3, true, seconds}, 2);
  good &= check({"few buckets", plain, {1, -1, 1}, 1, D, D, 2, false, {Bias::kRelative, false, 8, Clock::kSeconds}}, 4);
  good &= check({"one bucket", mixed, {1, -1, 1}, 1, D, D, 1, false, {Bias::kRelative, false, 1, Clock::kSeconds}}, 3);
  good &= check({"position alone", mixed, {1, -1, 1}, 2, D, D, 2, false, {Bias::kRelative, true}}, 3);
  std::printf(good ? "ok\n" : "bad\n");
  return good ? 0 : 1;
}
