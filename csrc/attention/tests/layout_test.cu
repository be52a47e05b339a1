// The layouts that the kernels count on, against CuTe's own: runs on the host, needs no GPU.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include <cutlass/bfloat16.h>

#include "attention/backward.h"
#include "attention/backward_relay.h"
#include "attention/backward_stored.h"
#include "attention/forward.h"

using namespace genrec::attention;
using namespace cute;
using bf16 = cutlass::bfloat16_t;

namespace {

long checks = 0;

void check(bool good, const char* what, int a, int b) {
  ++checks;
  if (good) return;
  std::printf("%s: %d %d\n", what, a, b);
  std::exit(1);
}

// A tile as the copy engine writes it: chunks of columns, rows of 128 (64) bytes, 16-byte units swizzled.
template <int kRows, int D, int kStages>
void check_tile() {
  const auto tile = as_position_independent_swizzle_layout(TileLayout<bf16, kRows, D, kStages>{});
  const auto transposed = as_position_independent_swizzle_layout(TransposedLayout<bf16, kRows, D, kStages>{});
  constexpr int kColumns = kChunk<D>, kUnits = kColumns / 8;
  for (int s = 0; s < kStages; ++s) {
    for (int r = 0; r < kRows; ++r) {
      for (int c = 0; c < D; ++c) {
        const int line = r * kColumns * 2 / 128;  // of 128 bytes: the swizzle's lines
        const int unit = c % kColumns / 8 ^ (kUnits == 8 ? line % 8 : line % 4);
        const int want = s * kRows * D + c / kColumns * kRows * kColumns + r * kColumns + unit * 8 + c % 8;
        check(tile(r, c, s) == want, "tile", r, c);
        check(transposed(c, r, s) == want, "transposed tile", r, c);
      }
    }
  }
}

template <int kQueries, int kKeys>
void check_scores() {
  const auto layout = as_position_independent_swizzle_layout(ScoreLayout<bf16, kQueries, kKeys>{});
  for (int q = 0; q < kQueries; ++q)
    for (int k = 0; k < kKeys; ++k) check(layout(q, k) * 2 == score_offset<kKeys>(q, k), "scores", q, k);
}

// Where thread t's element e of an M x N product is, by the formulas of mma.h.
template <class Mma, int M, int N>
void check_accumulators(int columns_of_second) {
  Mma mma;
  const Tensor identity = make_identity_tensor(Extent<M, N>{});
  for (int t = 0; t < int(size(mma)); ++t) {
    const Tensor mine = mma.get_slice(t).partition_C(identity);
    const int group = t / 128, lane = t % 32, warp = t / 32 % 4;
    const int row0 = (columns_of_second ? 0 : 64 * group) + warp * 16 + lane / 4;
    const int column0 = columns_of_second * group + lane % 4 * 2;
    for (int e = 0; e < int(size(mine)); ++e) {
      check(int(get<0>(mine(e))) == row0 + element_row(e), "row of an accumulator", t, e);
      check(int(get<1>(mine(e))) == column0 + element_column(e), "column of an accumulator", t, e);
    }
  }
}

// A product over N columns takes accumulators of N columns as its A operand, element for element.
template <class Mma, int M, int N>
void check_operand() {
  Mma mma;
  const Tensor identity = make_identity_tensor(Extent<M, N>{});
  for (int t = 0; t < int(size(mma)); ++t) {
    const Tensor mine = mma.get_slice(t).partition_A(identity);
    const int group = t / 128, lane = t % 32, warp = t / 32 % 4;
    check(int(size(mine)) == N / 2, "size of an operand", int(size(mine)), N);
    for (int e = 0; e < int(size(mine)); ++e) {
      check(int(get<0>(mine(e))) == 64 * group + warp * 16 + lane / 4 + element_row(e), "row of an operand", t, e);
      check(int(get<1>(mine(e))) == lane % 4 * 2 + element_column(e), "column of an operand", t, e);
    }
  }
}

template <class F>
void check_forward() {
  check_tile<F::kQueries, F::D, F::kQueryStages>();
  check_tile<F::kKeys, F::D, F::kKeyStages>();
  check_accumulators<typename F::ScoreMma, F::kQueries, F::kKeys>(0);
  check_accumulators<typename F::OutMma, F::kQueries, F::D>(0);
  check_operand<typename F::OutMma, F::kQueries, F::kKeys>();
}

template <int D>
void check_shapes() {
  check_forward<ForwardShape<bf16, D, false>>();
  check_forward<ForwardShape<bf16, D, false, Bias::kRelative>>();
  using B = BackwardShape<bf16, D, false, D == 256 ? Part::kKeysAndQueries : Part::kAll, Bias::kDense>;
  check_tile<B::kQueries, D, B::kQueryStages>();
  check_scores<B::kQueries, B::kKeys>();
  check_accumulators<typename B::ScoreMma, B::kKeys, B::kQueries>(0);
  check_accumulators<typename B::OutMma, B::kKeys, D>(0);
  check_accumulators<typename B::DqMma, B::kQueries, D>(B::kSplitColumns ? B::kDqColumns : 0);
  check_operand<typename B::OutMma, B::kKeys, B::kQueries>();
}

// The kernel for D = 256 without a bias: 48 queries, a warpgroup for each of dK and dV.
void check_relay() {
  using R = RelayShape<bf16, false>;
  check_tile<R::kQueries, R::D, R::kQueryStages>();
  check_accumulators<R::ScoreMma, R::kKeys, R::kQueries>(0);
  check_accumulators<R::OutMma, R::kKeys, R::D>(0);
  check_operand<R::OutMma, R::kKeys, R::kQueries>();
}

// dS as RelayConsumer::keep leaves it: word i of lane l of warp w holds queries 8 (i / 2) + 2 (l % 4) and the next of key
// 16 w + l / 4 + 8 (i % 2), in its part.
void check_stored() {
  using Parts = CellParts<48>;
  using S = StoredShape<bf16, 256, false, Parts>;
  const auto layout = CellLayout<bf16, S::kStages>{};
  for (int s = 0; s < S::kStages; ++s)
    for (int part = 0; part < Parts::kCount; ++part)
      for (int w = 0; w < 4; ++w)
        for (int l = 0; l < 32; ++l)
          for (int i = 0; i < Parts::kRows / 4; ++i) {
            const int query = part * Parts::kRows + 8 * (i / 2) + l % 4 * 2, key = 16 * w + l / 4 + 8 * (i % 2);
            const int word = w * 64 + l + i / 2 * 256 + i % 2 * 32;
            const int want = s * kCellElements + part * Parts::kElements + 2 * word;
            check(int(layout(query, key, s)) == want, "dS", query, key);
            check(int(layout(query + 1, key, s)) == want + 1, "dS", query + 1, key);
          }
  check_accumulators<S::DqMma, S::kQueries, S::D>(0);
}

}  // namespace

int main() {
  check_shapes<32>();
  check_shapes<64>();
  check_shapes<128>();
  check_shapes<256>();
  check_relay();
  check_stored();
  std::printf("ok %ld checks\n", checks);
}
