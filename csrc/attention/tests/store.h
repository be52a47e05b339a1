// The room for dS of an emulated kernel.
#pragma once

#include "attention/tests/problem.h"

namespace genrec::attention {

// Places of dS for the first `stored` sequences, the others' room left out.
struct Store {
  std::vector<int> first;
  int left = 0, cells = 0;
  std::vector<Element> data, zeros;

  Store(const Problem& problem, size_t stored) : first(problem.c.sequences.size() + 1), zeros(kLargestPart, Element(0.f)) {
    const Batch batch = problem.batch();
    for (size_t b = 0; b < stored; ++b) cells += stored_sequence(batch, problem.c.rule, int(b)).cells();
    auto scratch = std::make_unique<StoreScratch>();
    constexpr int kThreads = 2;
    for (int t = 0; t < kThreads; ++t) store_phase_count(*scratch, batch, problem.c.rule, t, kThreads);
    store_phase_sum(*scratch, &left, kThreads);
    for (int t = 0; t < kThreads; ++t)
      store_phase_place(*scratch, batch, problem.c.rule, cells, first.data(), &left, t, kThreads);
    data.assign(size_t(cells) * problem.c.heads * kCellElements, Element::bitcast(0x7fc0));
  }
  DsStore store() { return {data.data(), first.data(), &left, zeros.data()}; }
};

}  // namespace genrec::attention
