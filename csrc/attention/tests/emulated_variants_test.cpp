// The backward variants, run on the host as emulated_test.cpp runs the default kernels.
#include "attention/tests/problem.h"

#include "attention/dq.h"
#include "attention/variants.h"

using namespace genrec::attention;

namespace {

template <class Shape>
bool launch(const Problem& problem, BackwardParams p) {
  constexpr size_t kShared = sizeof(typename Shape::Shared);
  int counters[2] = {0, 0};
  p.common = problem.common(&counters[0]);
  if constexpr (kPasses<Shape> == 1) {
    return emulator::launch(problem.c.blocks, Shape::kThreads, kShared,
                            [&] { pipelined_backward_kernel<Shape, ConsumerOf<Shape>>(p); });
  } else {
    using Second = ValuesShape<Shape>;
    const bool ran = emulator::launch(problem.c.blocks, Shape::kThreads, kShared, [&] { backward_kernel<Shape>(p); });
    p.common = problem.common(&counters[1]);
    return emulator::launch(problem.c.blocks, Second::kThreads, sizeof(typename Second::Shared),
                            [&] { backward_kernel<Second, ValuesConsumer<Second>>(p); }) &&
           ran;
  }
}

template <class Shape>
bool run(const Problem& problem, const char* name) {
  const List keys(problem.batch(), ListKind::kKeys, Shape::kKeys);
  const List queries(problem.batch(), ListKind::kQueries, Shape::kQueries);
  const int heads = problem.c.heads;
  Matrix dq(problem.q.rows, heads, problem.c.qk_dim, true), dk(problem.k.rows, heads, problem.c.qk_dim, true);
  Matrix dv(problem.v.rows, heads, problem.c.v_dim, true);
  const int64_t tiles = list_capacity(dq.rows, problem.c.sequences.size(), Shape::kQueries) * heads;
  std::vector<float> sums(tiles * Shape::kQueries * D);
  std::vector<int> turns(tiles * 2);
  bool ran = launch<Shape>(problem, {problem.q.map(), problem.k.map(), problem.v.map(), problem.d_out.map(), {},
                                     keys.list(), dk.output(), dv.output(), sums.data(),
                                     problem.c.ordered ? turns.data() : nullptr});
  const ConvertParams convert{problem.common(nullptr), queries.list(), sums.data(), dq.output()};
  ran = emulator::launch(2, 256, 0, [&] { convert_dq_kernel<Shape>(convert); }) && ran;
  const double off[3] = {error(dq.data, problem.dq), error(dk.data, problem.dk), error(dv.data, problem.dv)};
  std::printf("%s, D = %d, %s: %s, dq %.1e, dk %.1e, dv %.1e\n", problem.c.name, D, name, ran ? "ran" : "hung", off[0],
              off[1], off[2]);
  std::fflush(stdout);
  return ran && off[0] < 0.005 && off[1] < 0.005 && off[2] < 0.005;
}

template <bool kCausal>
bool check(const Case& c) {
  const Problem problem(c);
  bool good = true;
#define GENREC_VARIANT(name) \
  if constexpr (Variant_##name::kHas<D>) good &= run<Variant_##name::Shape<Element, D, kCausal>>(problem, #name);
#include "attention/variants.inc"
#undef GENREC_VARIANT
  return good;
}

}  // namespace

int main() {
  const MaskRule plain{1, -1, 1};
  bool good = check<true>({"causal", {{200, 200, 0, 0}, {3, 3, 0, 0}, {0, 0, 0, 0}, {70, 70, 0, 0}}, plain, 1, D, D, 2,
                           false});
  good &= check<false>({"contexts, targets, cached keys, padded dim", {{150, 150, 3, 40}, {40, 200, 5, 9}, {0, 5, 0, 0}},
                        {2, -1, 1}, 2, D, D - 8, 2, true});
  good &= check<false>({"window", {{900, 900, 4, 9}, {1, 1, 0, 0}}, {1, 700, 1}, 1, D, D, 2, true});
  std::printf(good ? "ok\n" : "bad\n");
  return good ? 0 : 1;
}
