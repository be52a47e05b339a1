// The kernels without a bias, run on the host (emulator.h) on small jagged batches, against sums in fp64.
#include "attention/tests/problem.h"

#include "attention/backward_plain.h"

using namespace genrec::attention;

namespace {

template <bool kCausal>
bool plain_backward(const Problem& problem) {
  using Shape = typename PlainBackward<Element, D, kCausal>::Shape;
  using Consumer = typename PlainBackward<Element, D, kCausal>::Consumer;
  const List keys(problem.batch(), ListKind::kKeys, Shape::kKeys);
  const List queries(problem.batch(), ListKind::kQueries, Shape::kQueries);
  const int heads = problem.c.heads;
  Matrix dq(problem.q.rows, heads, problem.c.qk_dim, true), dk(problem.k.rows, heads, problem.c.qk_dim, true);
  Matrix dv(problem.v.rows, heads, problem.c.v_dim, true);
  const int64_t tiles = list_capacity(dq.rows, problem.c.sequences.size(), Shape::kQueries) * heads;
  std::vector<float> sums(tiles * Shape::kQueries * D);
  std::vector<int> turns(tiles * 2);
  int counter = 0;
  const BackwardParams p{problem.q.map(), problem.k.map(), problem.v.map(), problem.d_out.map(),
                         problem.common(&counter), keys.list(), dk.output(), dv.output(), sums.data(),
                         problem.c.ordered ? turns.data() : nullptr};
  bool ran = emulator::launch(problem.c.blocks, Shape::kThreads, sizeof(typename Shape::Shared),
                              [&] { pipelined_backward_kernel<Shape, Consumer>(p); });
  const ConvertParams convert{problem.common(nullptr), queries.list(), sums.data(), dq.output()};
  ran = emulator::launch(2, 256, 0, [&] { convert_dq_kernel<Shape>(convert); }) && ran;
  const double off[3] = {error(dq.data, problem.dq), error(dk.data, problem.dk), error(dv.data, problem.dv)};
  std::printf("%s, D = %d, backward: %s, dq %.1e, dk %.1e, dv %.1e\n", problem.c.name, D, ran ? "ran" : "hung", off[0],
              off[1], off[2]);
  return ran && off[0] < 0.005 && off[1] < 0.005 && off[2] < 0.005;
}

template <bool kCausal>
bool check(const Case& c) {
  const Problem problem(c);
  const bool ahead = forward<kCausal, Bias::kNone>(problem), back = plain_backward<kCausal>(problem);
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
