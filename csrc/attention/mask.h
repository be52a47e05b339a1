// Who sees whom: the mask of one sequence `contexts | history | targets`, for rows, columns and tiles of both.
//
// Rows and columns are counted in the key sequence: query row r stands at key row r + (keys - queries). Every row sees
// at most two intervals of columns, every column is seen by at most three of rows; tiles take the unions. Host and
// device run this very code, and tests/mask_test.cpp holds it against the mask written out entry by entry.
#pragma once

#include "common/macros.h"

namespace genrec::attention {

GENREC_HOST_DEVICE constexpr int smaller(int a, int b) { return a < b ? a : b; }
GENREC_HOST_DEVICE constexpr int larger(int a, int b) { return a > b ? a : b; }
GENREC_HOST_DEVICE constexpr int divide_up(int a, int b) { return (a + b - 1) / b; }

constexpr int kNever = 0x7fffffff;

// What all sequences of a batch share.
struct MaskRule {
  int target_group;  // targets of one group see each other, causally
  int window;        // reach of history rows into history; -1 for all of it
  int causal;
};

// A row sees columns [0, head) and [begin, end), head <= begin unless the second is empty.
struct RowSight {
  int head, begin, end;

  GENREC_HOST_DEVICE bool sees(int column) const {
    return (column < head) | ((column >= begin) & (column < end));  // no branches
  }
};

// A column is hidden from rows [hide0, show0), from [hide1, show1), and from those at `end` and beyond.
struct ColumnSight {
  int hide0, show0, hide1, show1, end;

  GENREC_HOST_DEVICE bool seen_by(int row) const {
    return (row < end) & ((row < hide0) | (row >= show0)) & ((row < hide1) | (row >= show1));
  }
};

// What all rows of a tile see: columns before `contexts`, seen by its contexts, that its history and its targets see.
struct RowBand {
  int contexts;
  RowSight history, targets;

  // Whether each of the rows sees each of columns [j0, j1).
  GENREC_HOST_DEVICE bool all_see(int j0, int j1) const {
    return j1 <= contexts && within(history, j0, j1) && within(targets, j0, j1);
  }

 private:
  GENREC_HOST_DEVICE static bool within(RowSight sight, int j0, int j1) {
    return j1 <= sight.head || (j0 >= sight.begin && j1 <= sight.end);
  }
};

// What hides any of a tile's columns: rows [hide, show), and those at `end` and beyond.
struct ColumnBand {
  int hide[3], show[3], end;

  // Whether each of the columns is seen by each of rows [i0, i1).
  GENREC_HOST_DEVICE bool all_seen(int i0, int i1) const {
    bool seen = i1 <= end;
    for (int k = 0; k < 3; ++k) seen = seen && (hide[k] >= show[k] || i1 <= hide[k] || i0 >= show[k]);
    return seen;
  }
};

// Ascending, disjoint intervals of tiles.
struct TileRanges {
  int begin[3], end[3];

  GENREC_HOST_DEVICE int count() const { return end[0] - begin[0] + end[1] - begin[1] + end[2] - begin[2]; }

  // The k-th tile, k < count().
  GENREC_HOST_DEVICE int tile(int k) const {
    const int first = end[0] - begin[0], second = end[1] - begin[1];
    if (k < first) return begin[0] + k;
    if (k < first + second) return begin[1] + k - first;
    return begin[2] + k - first - second;
  }

  // How many of the tiles come before `t`.
  GENREC_HOST_DEVICE int rank(int t) const {
    int before = 0;
    for (int r = 0; r < 3; ++r) before += larger(0, smaller(t, end[r]) - begin[r]);
    return before;
  }
};

// kCausal: no contexts, targets or window, and causal; the compiler then drops what those need.
template <bool kCausal>
struct SequenceMask {
  int keys, contexts, first_target, group_origin;
  MaskRule rule;

  GENREC_HOST_DEVICE SequenceMask(int keys_, int contexts_, int targets_, MaskRule rule_) : keys(keys_), rule(rule_) {
    contexts = kCausal ? 0 : smaller(larger(contexts_, 0), keys);
    group_origin = kCausal ? keys : keys - smaller(larger(targets_, 0), keys);
    first_target = larger(group_origin, contexts);
    if (kCausal) rule = MaskRule{1, -1, 1};
    if (rule.window > keys) rule.window = keys;
  }

  GENREC_HOST_DEVICE int group_begin(int target) const {
    return group_origin + (target - group_origin) / rule.target_group * rule.target_group;
  }

  GENREC_HOST_DEVICE int group_end(int target) const {
    const int begin = group_begin(target);
    return keys - begin > rule.target_group ? begin + rule.target_group : keys;
  }

  GENREC_HOST_DEVICE RowSight row(int i) const {
    if (i >= keys) return {0, 0, 0};
    if (kCausal) return {i + 1, 0, 0};
    if (i < contexts) return {first_target, 0, 0};
    if (i >= first_target) return {first_target, larger(first_target, group_begin(i)), i + 1};
    if (rule.window < 0) return {rule.causal ? i + 1 : first_target, 0, 0};
    return {contexts, larger(contexts, i - rule.window), rule.causal ? i + 1 : smaller(first_target, i + rule.window + 1)};
  }

  GENREC_HOST_DEVICE ColumnSight column(int j) const {
    if (j >= keys) return {0, kNever, 0, kNever, 0};
    if (kCausal) return {0, j, 0, 0, keys};
    if (j < contexts) return {0, 0, 0, 0, keys};
    if (j >= first_target) return {0, j, group_end(j), keys, keys};
    const int begin = rule.causal ? j : rule.window < 0 ? contexts : larger(contexts, j - rule.window);
    const int end = rule.window < 0 ? first_target : smaller(first_target, j + rule.window + 1);
    return {contexts, begin, end, first_target, keys};
  }

  // Tiles of `width` columns of which rows [i0, i1) see any; i1 <= keys.
  GENREC_HOST_DEVICE TileRanges key_tiles(int i0, int i1, int width) const {
    int head = 0, begin = kNever, end = 0;
    if (kCausal) {
      head = i1;
    } else {
      if (i0 < contexts) head = first_target;
      const int h0 = larger(i0, contexts), h1 = smaller(i1, first_target), t0 = larger(i0, first_target);
      if (h0 < h1) {
        const RowSight first = row(h0), last = row(h1 - 1);
        head = larger(head, last.head);
        if (rule.window >= 0) begin = first.begin, end = last.end;
      }
      if (t0 < i1) {
        head = larger(head, first_target);
        begin = smaller(begin, row(t0).begin);
        end = i1;
      }
    }
    const int middle = divide_up(head, width);
    const int second = larger(middle, begin / width);
    return {{0, second, 0}, {middle, larger(second, divide_up(end, width)), 0}};
  }

  // Tiles of `height` query rows that see any of columns [j0, j1), counted from the first of `queries` query rows.
  GENREC_HOST_DEVICE TileRanges query_tiles(int j0, int j1, int height, int queries) const {
    const int shift = keys - queries;
    int head = 0, begin = kNever, end = 0, tail = keys;
    j1 = smaller(j1, keys);
    if (kCausal) {
      begin = j0, end = keys;
    } else {
      if (j0 < contexts) head = keys;
      const int h0 = larger(j0, contexts), h1 = smaller(j1, first_target), t0 = larger(j0, first_target);
      if (h0 < h1) {
        head = larger(head, contexts);
        tail = first_target;
        begin = column(h0).show0;
        end = column(h1 - 1).hide1;
      }
      if (t0 < j1) {
        begin = smaller(begin, t0);
        end = larger(end, group_end(j1 - 1));
      }
    }
    if (j0 >= j1) head = 0, end = 0, tail = keys;
    const int last = divide_up(queries, height);
    const int a = divide_up(larger(0, head - shift), height);
    const int b = larger(a, end > begin ? larger(0, begin - shift) / height : 0);
    const int c = larger(b, end > begin ? divide_up(larger(0, end - shift), height) : 0);
    const int d = larger(c, tail < keys ? larger(0, tail - shift) / height : last);
    return {{0, b, d}, {a, c, larger(d, last)}};
  }

  // What is common to rows [i0, i1), i1 <= keys.
  GENREC_HOST_DEVICE RowBand rows(int i0, int i1) const {
    constexpr RowSight kNobody{kNever, 0, kNever};
    if (kCausal) return {kNever, {i0 + 1, 0, 0}, kNobody};
    const int h0 = larger(i0, contexts), h1 = smaller(i1, first_target), t0 = larger(i0, first_target);
    return {i0 < contexts ? first_target : kNever, h0 < h1 ? common(row(h0), row(h1 - 1)) : kNobody,
            t0 < i1 ? common(row(t0), row(i1 - 1)) : kNobody};
  }

  // What is common to columns [j0, j1).
  GENREC_HOST_DEVICE ColumnBand columns(int j0, int j1) const {
    if (j1 > keys) return {{0, 0, 0}, {kNever, kNever, kNever}, 0};
    if (kCausal) return {{0, 0, 0}, {j1 - 1, 0, 0}, keys};
    ColumnBand band{{0, 0, 0}, {0, 0, 0}, keys};
    const int h0 = larger(j0, contexts), h1 = smaller(j1, first_target), t0 = larger(j0, first_target);
    if (h0 < h1) {
      band.hide[0] = contexts, band.show[0] = column(h1 - 1).show0;
      band.hide[1] = column(h0).hide1, band.show[1] = first_target;
    }
    if (t0 < j1) {
      band.show[2] = j1 - 1;
      band.end = group_end(t0);
    }
    return band;
  }

 private:
  // Rows of one region: heads, begins and ends rise from `first` to `last`.
  GENREC_HOST_DEVICE static RowSight common(RowSight first, RowSight last) {
    return {first.head, last.begin <= first.head ? 0 : last.begin, first.end};
  }
};

}  // namespace genrec::attention
