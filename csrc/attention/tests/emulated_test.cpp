// The kernels without a bias, run on the host (emulator.h) on small jagged batches, against sums in fp64.
#include "attention/tests/problem.h"

#include "attention/backward_plain.h"

using namespace genrec::attention;

namespace {

template <bool kCausal, bool kGathers>
bool plain_backward(const Problem& problem, size_t stored = 0) {
  using Kernels = PlainBackward<Element, D, kCausal, kGathers>;
  using Keys = typename Kernels::Keys;
  const List keys(problem.batch(), ListKind::kKeys, Keys::kKeys);
  const int heads = problem.c.heads;
  Matrix dq(problem.q.rows, heads, problem.c.qk_dim, true), dk(problem.k.rows, heads, problem.c.qk_dim, true);
  Matrix dv(problem.v.rows, heads, problem.c.v_dim, true);
  const int64_t tiles = list_capacity(dq.rows, problem.c.sequences.size(), Keys::kQueries) * heads;
  std::vector<float> sums(Kernels::kGathers ? tiles * Keys::kQueries * D : 0);
  std::vector<int> turns(tiles * 2);
  int counters[3] = {0, 0, 0};
  BackwardParams p{problem.q.map(), problem.k.map(), problem.v.map(), problem.d_out.map(),
                   problem.common(&counters[0]), keys.list(), dk.output(), dv.output(), sums.data(),
                   problem.c.ordered ? turns.data() : nullptr, dq.output()};
  Store store(problem, stored);
  if constexpr (Kernels::kStores) p.store = store.store();
  bool ran = emulator::launch(problem.c.blocks, Keys::kThreads, sizeof(typename Keys::Shared),
                              [&] { pipelined_backward_kernel<Keys, typename Kernels::Consumer>(p); });
  if constexpr (Kernels::kGathers) {
    const List queries(problem.batch(), ListKind::kQueries, Keys::kQueries);
    const ConvertParams convert{problem.common(nullptr), queries.list(), sums.data(), dq.output()};
    ran = emulator::launch(2, 256, 0, [&] { convert_dq_kernel<Keys, true>(convert); }) && ran;
  } else {
    using Queries = typename Kernels::Queries;
    const List queries(problem.batch(), ListKind::kQueries, Queries::kQueries);
    p.common = problem.common(&counters[1]), p.list = queries.list();
    ran = emulator::launch(problem.c.blocks, Queries::kThreads, sizeof(typename Queries::Shared),
                           [&] { queries_kernel<Queries>(p); }) && ran;
  }
  if constexpr (Kernels::kStores) {
    using Stored = typename Kernels::Stored;
    const List queries(problem.batch(), ListKind::kQueries, Stored::kQueries);
    p.common = problem.common(&counters[2]), p.list = queries.list();
    ran = emulator::launch(problem.c.blocks, Stored::kThreads, sizeof(typename Stored::Shared),
                           [&] { stored_kernel<Stored>(p); }) && ran;
  }
  const double off[3] = {error(dq.data, problem.dq), error(dk.data, problem.dk), error(dv.data, problem.dv)};
  std::printf("%s, D = %d, backward%s: %s, dq %.1e, dk %.1e, dv %.1e", problem.c.name, D,
              kGathers ? "" : " in two passes", ran ? "ran" : "hung", off[0], off[1], off[2]);
  if (Kernels::kStores) std::printf(", dS of %zu sequences kept", problem.c.sequences.size() - store.left);
  std::printf("\n");
  return ran && off[0] < 0.005 && off[1] < 0.005 && off[2] < 0.005;
}

template <bool kCausal>
bool check(const Case& c) {
  const Problem problem(c);
  bool good = forward<kCausal, Bias::kNone>(problem);
  if constexpr (D <= 128) good &= plain_backward<kCausal, true>(problem);
  if constexpr (D == 128) good &= plain_backward<kCausal, false>(problem);
  if constexpr (D == 256) {
    good &= plain_backward<kCausal, false>(problem, c.sequences.size());
    good &= plain_backward<kCausal, false>(problem, c.sequences.size() / 2);
  }
  std::fflush(stdout);
  return good;
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
