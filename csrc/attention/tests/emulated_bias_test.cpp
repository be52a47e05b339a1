// The kernels with a bias, run on the host (emulator.h) on small jagged batches, against sums in fp64: output and all
// gradients, those of the tables and of the dense bias among them. Single tiles too, pair by pair: an error of a bucket in
// one pair would drown in a norm.
#include <map>

#include <cute/atom/copy_traits_sm75.hpp>
#include <cute/atom/mma_traits_sm80.hpp>

#include "attention/backward_biased_keys.h"
#include "attention/backward_relay.h"
#include "attention/backward_table_sums.h"
#include "attention/tests/problem.h"

using namespace genrec::attention;

namespace {

// One tile of a sequence of `keys` keys and queries: prepared by a warp, added to zeros by a warpgroup.
template <bool kStreamsKeys>
struct OneTile {
  static constexpr int kFixed = 64, kStreamed = 64;
  RelativeBias bias;
  TileRecord record;
  int first_streamed;
  std::vector<float> h;  // (fixed, streamed)
  TimeKind kind;

  struct Shared {
    BiasTile<kFixed, kStreamed, kStreamsKeys> tile;
    BucketTables buckets;
  };

  void run() {
    auto& shared = *reinterpret_cast<Shared*>(emulator::block().shared);
    fill_buckets<128>(shared.buckets, bias, 0.5f);
    sync_block(128);
    if (threadIdx.x < 32)
      BiasWriter<kStreamsKeys, kFixed, kStreamed>(bias, shared.buckets, record, 0.5f).write(shared.tile, first_streamed);
    sync_block(128);
    const Lane lane;
    const TileTimes<kStreamsKeys> times(bias, record);
    auto scores = cute::make_tensor<float>(cute::Layout<cute::Int<kStreamed / 2>>{});
    cute::clear(scores);
    const int row = record.first + lane.row();
    const auto streamed = [&](int column) { return times.streamed(first_streamed + column); };
    if constexpr (kStreamsKeys) {
      BiasValues<kStreamed / 2, true> values;
      values.read(shared.tile, lane.row(), lane.column());
      add_bias_by_parts(scores, 1.f, values, shared.tile, shared.buckets, lane.row(), lane.column(),
                        static_cast<uint32_t>(times.fixed(row)), static_cast<uint32_t>(times.fixed(row + 8)),
                        [&](int down) { return times.fixed(row + down); }, streamed);
    } else {
      add_relative_bias<true>(scores, 1.f, shared.tile, shared.buckets, lane.row(), lane.column(), times.fixed(row),
                        times.fixed(row + 8), streamed);
    }
    for (int e = 0; e < kStreamed / 2; ++e)
      h[(lane.row() + element_row(e)) * kStreamed + lane.column() + element_column(e)] = scores(e);
    kind = shared.tile.kind;
  }
};

// All tiles of one sequence, every pair inside of it; counts the kinds of tiles.
template <bool kStreamsKeys>
bool check_tiles(int queries, int keys, const BiasCase& c, std::map<TimeKind, int>& kinds) {
  BiasInput input(Case{"", {{queries, keys, 0, 0}}, {1, -1, 1}, 1, D, D, 1, false, c});
  OneTile<kStreamsKeys> one{input.relative(), {0, 0, 0, queries, 0, keys, 0, 0}, 0, std::vector<float>(64 * 64)};
  const int fixed_rows = kStreamsKeys ? queries : keys, streamed_rows = kStreamsKeys ? keys : queries;
  for (one.record.first = 0; one.record.first < fixed_rows; one.record.first += 64) {
    for (one.first_streamed = 0; one.first_streamed < streamed_rows; one.first_streamed += 64) {
      if (!emulator::launch(1, 128, sizeof(typename OneTile<kStreamsKeys>::Shared), [&] { one.run(); })) return false;
      ++kinds[one.kind];
      for (int r = one.record.first; r < std::min(one.record.first + 64, fixed_rows); ++r) {
        for (int s = one.first_streamed; s < std::min(one.first_streamed + 64, streamed_rows); ++s) {
          const int i = kStreamsKeys ? r : s, j = kStreamsKeys ? s : r;
          double wanted = 0;
          input.terms({queries, keys, 0, 0}, 0, 0, 0, 0, i, j, [&](float value, double&) { wanted += value; });
          const float got = 2 * one.h[(r - one.record.first) * 64 + s - one.first_streamed];
          if (std::abs(got - wanted) < 1e-5 * (1 + std::abs(wanted))) continue;
          std::printf("tile of kind %d: query %d, key %d: %g, wanted %g\n", int(one.kind), i, j, got, wanted);
          return false;
        }
      }
    }
  }
  return true;
}

// Every edge and its neighbours, and numbers of all sizes.
bool check_buckets() {
  for (int buckets : {1, 2, 8, 129, 146, 300}) {
    const std::vector<int64_t> edges = bucket_edges(buckets);
    const std::vector<float> weights(buckets, 1.f);
    RelativeBias bias{};
    bias.time = weights.data(), bias.edges = edges.data(), bias.buckets = buckets;
    auto tables = std::make_unique<BucketTables>();
    load_buckets(*tables, bias, 1.f, 0, 1);
    index_buckets(*tables, 0, 1);
    const auto good = [&](int64_t a, int64_t b) {
      const __int128 size = __int128(a) - b;
      const int wanted = plain_bucket(edges, a, b);
      if (size > INT64_MAX || size < INT64_MIN) return true;
      bool same = bucket_of(*tables, distance_of(a, b)) == wanted;
      if (size > -(1 << 30) && size < (1 << 30)) same = same && near_bucket_of(*tables, int(size)) == wanted;
      if (!same) std::printf("bucket of %ld, %d buckets\n", long(a - b), buckets);
      return same;
    };
    std::vector<int64_t> distances{0, 1, INT64_MAX, INT64_MIN, INT64_MAX - 1};
    for (int64_t edge : edges)
      for (int64_t near : {-1, 0, 1}) distances.push_back(edge == INT64_MAX ? edge : edge + near);
    for (int n = 0; n < 20000; ++n) {
      distances.push_back(n);
      distances.push_back(int64_t(std::exp2(63 * double(n) / 20001)));
    }
    for (int64_t d : distances)
      if (!good(d, 0) || (d != INT64_MIN && (!good(-d, 0) || !good(0, d)))) return false;
  }
  return true;
}

bool check_all_tiles() {
  std::map<TimeKind, int> kinds;
  bool good = true;
  for (Clock clock : {Clock::kSeconds, Clock::kTied, Clock::kYears, Clock::kAny}) {
    for (int buckets : {1, 8, 64, 200}) {
      for (bool asked : {false, true}) {
        const BiasCase c{Bias::kRelative, asked, buckets, clock, asked};
        good = good && check_tiles<true>(300, 300, c, kinds) && check_tiles<false>(300, 300, c, kinds);
        good = good && check_tiles<true>(70, 333, c, kinds) && check_tiles<false>(70, 333, c, kinds);
      }
    }
  }
  for (const auto& [kind, count] : kinds) std::printf("tiles of kind %d: %d\n", int(kind), count);
  return good && kinds.size() == 4;
}

// The emulated warp-wide instructions against CuTe's layouts of the GPU's.
bool check_warp_instructions() {
  using Mma = cute::MMA_Traits<cute::SM80_16x8x16_F32BF16BF16F32_TN>;
  std::vector<Element> a(16 * 16), b(8 * 16), rows(32 * 8);  // column by column, as Mma counts
  std::vector<float> wanted(16 * 8);
  for (auto* matrix : {&a, &b, &rows})
    for (Element& x : *matrix) x = Element(float(int(emulator::random_numbers() % 17) - 8));
  for (int e = 0; e < 16 * 8; ++e)
    for (int k = 0; k < 16; ++k) wanted[e] += float(a[e % 16 + 16 * k]) * float(b[e / 16 + 8 * k]);
  int bad = 0;
  const auto one_lane = [&] {
    const int lane = threadIdx.x;
    const auto pack = [&](const std::vector<Element>& from, auto layout, int word) {
      return from[layout(lane, 2 * word)].storage | uint32_t(from[layout(lane, 2 * word + 1)].storage) << 16;
    };
    float c[4] = {0, 0, 0, 0};
    typename Mma::ALayout left;
    typename Mma::BLayout right;
    add_product<Element>(c, pack(a, left, 0), pack(a, left, 1), pack(a, left, 2), pack(a, left, 3), pack(b, right, 0),
                         pack(b, right, 1));
    for (int e = 0; e < 4; ++e) bad += c[e] != wanted[typename Mma::CLayout{}(lane, e)];
    const auto check = [&](const uint32_t (&words)[4], auto layout) {
      for (int e = 0; e < 8; ++e)
        bad += Element::bitcast(uint16_t(words[e / 2] >> e % 2 * 16)) != rows[layout(lane, 16 * e) / 16];
    };
    uint32_t words[4];
    load_matrices(reinterpret_cast<const char*>(&rows[lane * 8]), words);
    check(words, typename cute::Copy_Traits<cute::SM75_U32x4_LDSM_N>::DstLayout{});
    load_matrices_transposed(reinterpret_cast<const char*>(&rows[lane * 8]), words);
    check(words, typename cute::Copy_Traits<cute::SM75_U16x8_LDSM_T>::DstLayout{});
    uint32_t plain[4];
    load_matrices(reinterpret_cast<const char*>(&rows[lane * 8]), plain);
    for (int m = 0; m < 4; ++m) bad += transposed_matrix(plain[m]) != words[m];
  };
  const bool ran = emulator::launch(1, 32, 0, one_lane);
  if (bad > 0) std::printf("warp instructions: %d elements differ\n", bad);
  return ran && bad == 0;
}

// Sums of a block's diagonals, one by one, by products and by additions.
bool check_diagonals() {
  std::vector<Element> block(64 * 64), tiled(64 * 64);
  double wanted[128] = {};
  for (int k = 0; k < 64; ++k) {
    for (int q = 0; q < 64; ++q) {
      const Element x(std::normal_distribution<float>()(emulator::random_numbers));
      std::memcpy(reinterpret_cast<char*>(block.data()) + score_offset<64>(q, k), &x, 2);
      std::memcpy(reinterpret_cast<char*>(tiled.data()) + TiledBlock::at(k, q / 8) + q % 8 * 2, &x, 2);
      wanted[k - q + 63] += float(x);
    }
  }
  double worst = 0;
  DiagonalSums<Element, true>::Memory memory;
  const bool ran = emulator::launch(1, 32, 0, [&] {
    const DiagonalSums<Element, true> products(memory, threadIdx.x);
    const DiagonalSums<Element, false> additions(memory, threadIdx.x);
    products.clear_margins();
    const char* at = reinterpret_cast<const char*>(block.data());
    const char* other = reinterpret_cast<const char*>(tiled.data());
    const PairedDiagonalSums<Element> pairs(memory, threadIdx.x);
    float sums[4], added[4], paired[4], slow[4];
    for (int again = 0; again < 2; ++again) products.add_up(at, sums), additions.add_up(at, added);
    pairs.add_up(other, paired);
    products.add_up_slowly(at, slow);
    for (int n = 0; n < 4; ++n) {
      const double one = wanted[threadIdx.x + 32 * n];
      for (float found : {sums[n], added[n], paired[n], slow[n]}) worst = std::max(worst, std::abs(found - one));
    }
  });
  if (!(worst < 1e-4)) std::printf("diagonals: off by %g\n", worst);
  return ran && worst < 1e-4;
}

// A gradient that isn't a number reaches the diagonals of its own pairs and no others.
bool check_not_finite() {
  constexpr int kRow = 20, kRows = 150;
  Problem problem({"not finite", {{kRows, kRows, 0, 0}}, {1, -1, 1}, 1, D, D, 1, false, {Bias::kRelative, true}});
  problem.d_out.data[problem.d_out.at(kRow, 0)] = Element::bitcast(0x7fc0);
  using Shape = BackwardShape<Element, D, false, D == 256 ? Part::kKeysAndQueries : Part::kAll, Bias::kRelative>;
  const List keys(problem.batch(), ListKind::kKeys, Shape::kKeys);
  Matrix dk(kRows, 1, D, true), dv(kRows, 1, D, true);
  std::vector<float> sums(list_capacity(kRows, 1, Shape::kQueries) * Shape::kQueries * D);
  BiasSums bias(problem.bias, Shape::Teams::kCopies);
  const BackwardParams p{problem.q.map(), problem.k.map(), problem.v.map(), problem.d_out.map(), {}, keys.list(),
                         dk.output(), dv.output(), sums.data(), nullptr};
  bool good = pass<Shape>(problem, p, bias);
  const int entries = int(problem.bias.position.size()), middle = problem.bias.max_positions - 1;
  int lost = 0;
  for (int e = 0; e < entries; ++e) {
    float found = 0;
    for (int copy = 0; copy < Shape::Teams::kCopies; ++copy) found += bias.position[copy * entries + e];
    lost += std::isnan(found);
    const bool own = e - middle >= -kRow;  // key - query of a pair of that row
    if (!own && !(std::abs(found - problem.bias.d_position[e]) < 0.01 * std::sqrt(problem.bias.squares))) good = false;
  }
  std::printf("not finite: %d entries of the position table, %s\n", lost, good ? "its own" : "others too");
  return good && lost >= kRow;
}

// The passes of a relative bias at D = 128, dS of the first `stored` sequences kept in memory.
template <bool kCausal>  // a template: of other D there are no such kernels
bool storing_backward(const Problem& problem, size_t stored) {
  using Keys = BiasedKeysShape<Element, kCausal>;
  using Stored = StoredSumsShape<Element, D, kCausal, typename Keys::Parts>;
  using LeftOver = BackwardShape<Element, D, kCausal, Part::kAll, Bias::kRelative>;
  const List keys(problem.batch(), ListKind::kKeys, Keys::kKeys);
  const List rows(problem.batch(), ListKind::kQueries, Stored::kQueries);
  const List queries(problem.batch(), ListKind::kQueries, LeftOver::kQueries);
  const int heads = problem.c.heads, blocks = problem.c.blocks;
  Matrix dq(problem.q.rows, heads, problem.c.qk_dim, true), dk(problem.k.rows, heads, problem.c.qk_dim, true);
  Matrix dv(problem.v.rows, heads, problem.c.v_dim, true);
  const int64_t tiles = list_capacity(dq.rows, problem.c.sequences.size(), LeftOver::kQueries) * heads;
  std::vector<float> sums(tiles * LeftOver::kQueries * D, NAN);
  std::vector<int> turns(tiles * 2);
  const int stored_copies = blocks * Stored::kCopies, copies = stored_copies + blocks * LeftOver::Teams::kCopies;
  BiasSums bias(problem.bias, copies);
  Store store(problem, stored);
  int counters[2] = {0, 0};
  BackwardParams p{problem.q.map(), problem.k.map(), problem.v.map(), problem.d_out.map(),
                   problem.common(&counters[0]), keys.list(), dk.output(), dv.output(), sums.data(),
                   problem.c.ordered ? turns.data() : nullptr, dq.output(), store.store()};
  FilledBias filled(store);
  bool ran = filled.fill(problem);
  const typename Keys::Params first{p, filled.store()};
  ran = emulator::launch(blocks, Keys::kThreads, sizeof(typename Keys::Shared),
                         [&] { pipelined_backward_kernel<Keys, BiasedKeysConsumer<Keys>>(first); }) && ran;
  auto second = problem.with_bias<Stored>(p);
  second.common = problem.common(&counters[1]), second.list = rows.list();
  if (!bias.position.empty()) second.bias.position_sums = bias.position.data();
  if (!bias.time.empty()) second.bias.time_sums = bias.time.data();
  ran = emulator::launch(blocks, Stored::kThreads, sizeof(typename Stored::Shared),
                         [&] { stored_sums_kernel<Stored>(second); }) && ran;
  ran = emulator::launch(2, 256, 0, [&] { clear_dq_kernel<LeftOver>(p); }) && ran;
  ran = pass<LeftOver>(problem, p, bias, stored_copies) && ran;
  const ConvertParams convert{problem.common(nullptr), queries.list(), sums.data(), dq.output(), store.store()};
  ran = emulator::launch(2, 256, 0, [&] { convert_dq_kernel<LeftOver>(convert); }) && ran;
  const double off[] = {error(dq.data, problem.dq), error(dk.data, problem.dk), error(dv.data, problem.dv),
                        table_error(bias.position, copies, problem.bias.d_position, problem.bias.squares),
                        table_error(bias.time, copies, problem.bias.d_time, problem.bias.squares)};
  std::printf("%s, D = %d, backward by stored dS: %s, dq %.1e, dk %.1e, dv %.1e, position %.1e, time %.1e, "
              "dS of %zu sequences kept\n", problem.c.name, D, ran ? "ran" : "hung", off[0], off[1], off[2], off[3],
              off[4], problem.c.sequences.size() - store.left);
  bool good = ran;
  for (double one : off) good = good && one < 0.005;
  return good;
}

// The passes of a relative bias at D = 256, dS of the first `stored` sequences kept in memory.
template <class Any>
bool wide_storing_backward(const Problem& problem, size_t stored) {
  using Keys = BiasedRelayShape<Any, false>;
  using Stored = StoredShape<Any, 256, false, typename Keys::Parts>;
  using Sums = TableSumsShape<Stored>;
  using LeftOver = BackwardShape<Any, D, false, Part::kKeysAndQueries, Bias::kRelative>;
  using LeftOverValues = BackwardShape<Any, D, false, Part::kValues, Bias::kRelative>;
  const List keys(problem.batch(), ListKind::kKeys, Keys::kKeys), other_keys(problem.batch(), ListKind::kKeys, LeftOver::kKeys);
  const List rows(problem.batch(), ListKind::kQueries, Stored::kQueries);
  const List queries(problem.batch(), ListKind::kQueries, LeftOver::kQueries);
  const int heads = problem.c.heads, blocks = problem.c.blocks;
  Matrix dq(problem.q.rows, heads, problem.c.qk_dim, true), dk(problem.k.rows, heads, problem.c.qk_dim, true);
  Matrix dv(problem.v.rows, heads, problem.c.v_dim, true);
  const int64_t tiles = list_capacity(dq.rows, problem.c.sequences.size(), LeftOver::kQueries) * heads;
  std::vector<float> sums(tiles * LeftOver::kQueries * D, NAN);
  std::vector<int> turns(tiles * 2);
  const int stored_copies = blocks * Sums::kCopies, copies = stored_copies + blocks * LeftOver::Teams::kCopies;
  BiasSums bias(problem.bias, copies);
  Store store(problem, stored);
  int counters[2] = {0, 0};
  BackwardParams p{problem.q.map(), problem.k.map(), problem.v.map(), problem.d_out.map(),
                   problem.common(&counters[0]), keys.list(), dk.output(), dv.output(), sums.data(),
                   problem.c.ordered ? turns.data() : nullptr, dq.output(), store.store()};
  FilledBias filled(store);
  bool ran = filled.fill(problem);
  const typename Keys::Params first{p, filled.store()};
  ran = emulator::launch(blocks, Keys::kThreads, sizeof(typename Keys::Shared),
                         [&] { pipelined_backward_kernel<Keys, RelayConsumer<Keys>>(first); }) && ran;
  p.common = problem.common(&counters[1]), p.list = rows.list();
  ran = emulator::launch(blocks, Stored::kThreads, sizeof(typename Stored::Shared), [&] { stored_kernel<Stored>(p); }) && ran;
  const auto sum = [&](BiasSums& into) {
    int counter = 0;
    auto all = problem.with_bias<Sums>(p);
    all.common = problem.common(&counter);
    if (!into.position.empty()) all.bias.position_sums = into.position.data();
    if (!into.time.empty()) all.bias.time_sums = into.time.data();
    return emulator::launch(blocks, Sums::kThreads, sizeof(typename Sums::Shared), [&] { table_sums_kernel<Sums>(all); });
  };
  ran = sum(bias) && ran;
  bool repeated = true;
  if (problem.c.ordered) {
    BiasSums again(problem.bias, copies);
    ran = sum(again) && ran;
    repeated = bias.position == again.position && bias.time == again.time;
  }
  p.list = other_keys.list();
  ran = emulator::launch(2, 256, 0, [&] { clear_dq_kernel<LeftOver>(p); }) && ran;
  ran = pass<LeftOver>(problem, p, bias, stored_copies) && ran;
  ran = pass<LeftOverValues>(problem, p, bias) && ran;
  const ConvertParams convert{problem.common(nullptr), queries.list(), sums.data(), dq.output(), store.store()};
  ran = emulator::launch(2, 256, 0, [&] { convert_dq_kernel<LeftOver>(convert); }) && ran;
  const double off[] = {error(dq.data, problem.dq), error(dk.data, problem.dk), error(dv.data, problem.dv),
                        table_error(bias.position, copies, problem.bias.d_position, problem.bias.squares),
                        table_error(bias.time, copies, problem.bias.d_time, problem.bias.squares)};
  std::printf("%s, D = %d, backward by stored dS: %s, dq %.1e, dk %.1e, dv %.1e, position %.1e, time %.1e, "
              "dS of %zu sequences kept\n", problem.c.name, D, ran ? "ran" : "hung", off[0], off[1], off[2], off[3],
              off[4], problem.c.sequences.size() - store.left);
  if (!repeated) std::printf("not the same twice\n");
  bool good = ran && repeated;
  for (double one : off) good = good && one < 0.005;
  return good;
}

// A bias in memory, every pair that is seen.
bool check_filled(const Problem& problem) {
  Store places(problem, problem.c.sequences.size());
  FilledBias filled(places);
  if (!filled.fill(problem)) return false;
  BiasInput bias = problem.bias;
  int64_t pairs = 0;
  for (size_t b = 0; b < problem.c.sequences.size(); ++b) {
    const Lengths s = problem.c.sequences[b];
    const SequenceMask<false> mask(s.keys, s.contexts, s.targets, problem.c.rule);
    const CellPlaces cells(filled.store(), stored_sequence(problem.batch(), problem.c.rule, int(b)), int(b), 0, 1);
    for (int i = 0; i < s.queries; ++i) {
      for (int j = 0; j < s.keys; ++j) {
        if (!mask.row(i + s.keys - s.queries).sees(j)) continue;
        double wanted = 0;
        bias.terms(s, problem.query_offsets[b], problem.key_offsets[b], int(b), 0, i, j,
                   [&](float value, double&) { wanted += 0.5 * value; });
        const int row = i % 64, column = j % 64;
        // A lane's eight: two columns of a row, of the row 8 below, then both 8 columns on.
        const int lane = row % 8 * 4 + column % 8 / 2, e = column % 2 + row / 8 % 2 * 2 + column / 8 % 2 * 4;
        const int64_t part = cells.part<BiasCell>(i / 64, j / 64);
        const size_t at = size_t(part) * BiasCell::kElements + ((row / 16 * 4 + column / 16) * 32 + lane) * 8 + e;
        const double got = float(cutlass::half_t::bitcast(filled.data[at]));
        ++pairs;
        if (part >= 0 && std::abs(got - wanted) < 1e-3 * (0.1 + std::abs(wanted))) continue;
        std::printf("%s, stored bias: query %d, key %d: %g, wanted %g\n", problem.c.name, i, j, got, wanted);
        return false;
      }
    }
  }
  std::printf("%s: %ld pairs of a stored bias\n", problem.c.name, long(pairs));
  return true;
}

// kCausal: forward by the kernel for the plain causal mask as well.
template <Bias kBias, bool kCausal = false>
bool check(const Case& c) {
  const Problem problem(c);
  bool good = forward<false, kBias>(problem) && (!kCausal || forward<true, kBias>(problem));
  good = backward<false, kBias>(problem) && good;
  const std::mt19937 numbers = emulator::random_numbers;  // the next cases' data don't depend on what follows
  if (kBias == Bias::kRelative && D == 32) good = check_filled(problem) && good;  // nor this on D
  if constexpr (kBias == Bias::kRelative && D >= 64) {
    const size_t all = c.sequences.size();
    const bool plain = std::all_of(c.sequences.begin(), c.sequences.end(),
                                   [](const Lengths& s) { return s.contexts == 0 && s.targets == 0; });
    for (size_t stored : {all, all / 2, size_t{0}}) {
      good = storing_forward<false>(problem, stored) && good;
      if constexpr (kBias == Bias::kRelative && D == 128) good = storing_backward<false>(problem, stored) && good;
      if constexpr (kBias == Bias::kRelative && D == 256) good = wide_storing_backward<Element>(problem, stored) && good;
    }
    if (plain && c.rule.window < 0 && c.rule.causal) good = storing_forward<true>(problem, all) && good;
  }
  emulator::random_numbers = numbers;
  std::fflush(stdout);
  return good;
}

}  // namespace

int main() {
  const std::vector<Lengths> plain{{330, 330, 0, 0}, {3, 3, 0, 0}, {0, 0, 0, 0}, {70, 70, 0, 0}};
  const std::vector<Lengths> mixed{{150, 150, 3, 40}, {40, 200, 5, 9}, {0, 5, 0, 0}};
  bool good = check_buckets() && check_warp_instructions() && check_diagonals();
  if (D == 32) good = good && check_all_tiles();  // they don't depend on D
  good &= check_not_finite();
  good &= check<Bias::kRelative, D == 128>({"position and seconds", plain, {1, -1, 1}, 1, D, D, 2, false,
                                      {Bias::kRelative, true, 129, Clock::kSeconds}});
  good &= check<Bias::kRelative>({"ties, cached keys, contexts, targets", mixed, {2, -1, 1}, 2, D, D - 8, 2, true,
                                  {Bias::kRelative, true, 64, Clock::kTied}});
  good &= check<Bias::kRelative>({"years, window, query times", {{520, 520, 4, 9}, {1, 1, 0, 0}}, {1, 300, 1}, 1, D, D,
                                  2, true, {Bias::kRelative, false, 200, Clock::kYears, true}});
  good &= check<Bias::kRelative>({"any times, not causal", {{200, 200, 0, 0}, {40, 90, 3, 5}}, {1, -1, 0}, 1, D, D, 3,
                                  true, {Bias::kRelative, true, 200, Clock::kAny}});
  good &= check<Bias::kRelative, D == 128>({"few buckets", plain, {1, -1, 1}, 1, D, D, 2, false,
                                  {Bias::kRelative, false, 8, Clock::kSeconds}});
  good &= check<Bias::kRelative>({"one bucket", mixed, {1, -1, 1}, 1, D, D, 1, false,
                                  {Bias::kRelative, false, 1, Clock::kSeconds}});
  good &= check<Bias::kRelative>({"position alone", mixed, {1, -1, 1}, 2, D, D, 2, false, {Bias::kRelative, true}});
  good &= check<Bias::kRelative>({"alpha of zero", {{70, 70, 0, 0}}, {1, -1, 1}, 1, D, D, 1, false,
                                  {Bias::kRelative, true, 64, Clock::kSeconds}, true});
  good &= check<Bias::kDense>({"dense", mixed, {2, -1, 1}, 2, D, D, 2, false, {Bias::kDense}});
  good &= check<Bias::kDense>({"dense, shared by heads", mixed, {2, 20, 0}, 2, D, D, 2, true,
                               {Bias::kDense, false, 0, Clock::kSeconds, false, true}});
  if (D == 64)  // more tiles of keys than few: turns are given late
    good &= check<Bias::kRelative>({"cached keys, many", {{140, 700, 0, 0}, {20, 300, 0, 0}}, {1, -1, 1}, 1, D, D, 2, false,
                                    {Bias::kRelative, true, 64, Clock::kSeconds}});
  std::printf(good ? "ok\n" : "bad\n");
  return good ? 0 : 1;
}
