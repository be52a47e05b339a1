// The kernels themselves, run on the host (emulator.h) on small jagged batches, against sums in fp64.
#include "attention/tests/problem.h"

using namespace genrec::attention;

namespace {

template <bool kCausal>
bool check(const Case& c) {
  const Problem problem(c);
  const bool ahead = forward<kCausal, Bias::kNone>(problem), back = backward<kCausal, Bias::kNone>(problem);
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
