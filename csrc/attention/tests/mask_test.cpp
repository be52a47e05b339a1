// mask.h against the mask written out entry by entry: rows, columns, tiles that anything sees, tiles that need no mask.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "attention/mask.h"

using namespace genrec::attention;

namespace {

long checks = 0;

struct Words {
  int keys, queries, contexts, targets, group, window, causal;
};

[[noreturn]] void fail(const char* what, const Words& w, int a, int b) {
  std::printf("%s at (%d, %d): keys %d queries %d contexts %d targets %d group %d window %d causal %d\n", what, a, b,
              w.keys, w.queries, w.contexts, w.targets, w.group, w.window, w.causal);
  std::exit(1);
}

void check(bool good, const char* what, const Words& w, int a, int b) {
  ++checks;
  if (!good) fail(what, w, a, b);
}

enum Region { kContext, kHistory, kTarget };

Region region(const Words& w, int p) {
  if (p < w.contexts) return kContext;
  return p >= w.keys - w.targets ? kTarget : kHistory;
}

// The words of AttentionMask's docstring, one by one.
bool sees(const Words& w, int i, int j) {
  const Region row = region(w, i), column = region(w, j);
  if (row == kContext) return column != kTarget;
  if (row == kHistory) {
    if (column != kHistory) return column == kContext;
    const int distance = i > j ? i - j : j - i;
    return (w.window < 0 || distance <= w.window) && (j <= i || !w.causal);
  }
  if (column != kTarget) return true;
  const int first = w.keys - w.targets;
  return j <= i && (i - first) / w.group == (j - first) / w.group;
}

template <bool kCausal>
void check_tiles(const Words& w, const SequenceMask<kCausal>& mask, const std::vector<char>& seen, int height,
                 int width) {
  const int shift = w.keys - w.queries;
  const int row_tiles = divide_up(w.queries, height), column_tiles = divide_up(w.keys, width);
  std::vector<char> any(row_tiles * column_tiles, 0), all(row_tiles * column_tiles, 1);
  for (int r = 0; r < row_tiles * height; ++r) {
    for (int j = 0; j < column_tiles * width; ++j) {
      const bool exists = r < w.queries && j < w.keys;
      const bool visible = exists && seen[(r + shift) * w.keys + j];
      const int tile = r / height * column_tiles + j / width;
      any[tile] |= visible;
      all[tile] &= visible;
    }
  }
  for (int m = 0; m < row_tiles; ++m) {
    const int i0 = m * height + shift, i1 = i0 + height;
    const TileRanges ranges = mask.key_tiles(i0, smaller(i1, w.keys), width);
    std::vector<char> visited(column_tiles, 0);
    int last = -1;
    for (int k = 0; k < ranges.count(); ++k) {
      const int n = ranges.tile(k);
      check(n > last && n < column_tiles, "key tiles out of order", w, m, n);
      check(ranges.rank(n) == k, "rank of a key tile", w, m, n);
      visited[n] = 1;
      last = n;
    }
    for (int n = 0; n < column_tiles; ++n) {
      const int j0 = n * width, j1 = j0 + width;
      check(visited[n] == any[m * column_tiles + n], "key tiles of a query tile", w, m, n);
      // The backward pass masks rows that don't exist, the forward pass ignores them.
      check(mask.columns(j0, j1).all_seen(i0, i1) == static_cast<bool>(all[m * column_tiles + n]), "full tile", w, m, n);
      bool full = true;
      for (int i = i0; i < smaller(i1, w.keys); ++i)
        for (int j = j0; j < j1; ++j) full = full && j < w.keys && seen[i * w.keys + j];
      check(mask.rows(i0, smaller(i1, w.keys)).all_see(j0, j1) == full, "full rows", w, m, n);
    }
  }
  for (int n = 0; n < column_tiles; ++n) {
    const TileRanges ranges = mask.query_tiles(n * width, n * width + width, height, w.queries);
    std::vector<char> visited(row_tiles, 0);
    int last = -1;
    for (int k = 0; k < ranges.count(); ++k) {
      const int m = ranges.tile(k);
      check(m > last && m < row_tiles, "query tiles out of order", w, m, n);
      visited[m] = 1;
      last = m;
    }
    for (int m = 0; m < row_tiles; ++m)
      check(visited[m] == any[m * column_tiles + n], "query tiles of a key tile", w, m, n);
  }
}

template <bool kCausal>
void check_mask(const Words& w) {
  const SequenceMask<kCausal> mask(w.keys, w.contexts, w.targets, MaskRule{w.group, w.window, w.causal});
  std::vector<char> seen(w.keys * w.keys);
  for (int i = 0; i < w.keys; ++i)
    for (int j = 0; j < w.keys; ++j) seen[i * w.keys + j] = sees(w, i, j);
  for (int i = 0; i < w.keys + 3; ++i) {
    const RowSight sight = mask.row(i);
    for (int j = 0; j < w.keys + 3; ++j) {
      const bool visible = i < w.keys && j < w.keys && seen[i * w.keys + j];
      check(sight.sees(j) == visible, "row sight", w, i, j);
      check(mask.column(j).seen_by(i) == visible, "column sight", w, i, j);
    }
  }
  for (int height : {1, 2, 3, 4, 8})
    for (int width : {1, 2, 3, 5, 8}) check_tiles(w, mask, seen, height, width);
}

void check_words(const Words& w) {
  check_mask<false>(w);
  if (w.contexts == 0 && w.targets == 0 && w.window < 0 && w.causal) check_mask<true>(w);
}

}  // namespace

int main() {
  for (int keys = 0; keys <= 9; ++keys)
    for (int queries : {keys, keys / 2, 1, 0})
      for (int contexts = 0; contexts <= keys; ++contexts)
        for (int targets = 0; targets <= keys; targets += 1 + (keys > 6))
          for (int group : {1, 2, 3})
            for (int window : {-1, 0, 1, 3, kNever})
              for (int causal : {1, 0})
                if (queries <= keys) check_words({keys, queries, contexts, targets, group, window, causal});
  unsigned state = 1;
  auto draw = [&state](int n) { return static_cast<int>((state = state * 1664525u + 1013904223u) >> 8) % n; };
  for (int round = 0; round < 300; ++round) {
    const int keys = 1 + draw(40), contexts = draw(2) ? draw(keys + 1) : 0;
    const int targets = draw(2) ? draw(keys - contexts + 1) : 0;
    check_words({keys, draw(keys + 1), contexts, targets, 1 + draw(5), draw(2) ? draw(20) : -1, draw(2)});
    check_words({keys, draw(keys + 1), 0, 0, 1, -1, 1});
  }
  std::printf("ok %ld checks\n", checks);
}
