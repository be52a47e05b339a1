// What is built, and which of it serves a problem. Host code: api.cpp alone includes it.
#pragma once

#include <cstdlib>
#include <cstring>
#include <string>

#include "attention/genrec_attention.h"
#include "attention/launch.h"
#include "attention/plan.h"

namespace genrec::attention {

// The generated list of what is built.
#define GENREC_FORWARD_INSTANCE(dtype, dim, mask, bias) ForwardInstance forward_##dtype##_##dim##_##mask##_##bias();
#define GENREC_BACKWARD_INSTANCE(dtype, dim, mask, bias) BackwardInstance backward_##dtype##_##dim##_##mask##_##bias();
#include "forward.inc"
#include "backward.inc"
#undef GENREC_FORWARD_INSTANCE
#undef GENREC_BACKWARD_INSTANCE

inline thread_local std::string last_error;

inline int32_t fail(const std::string& message) {
  last_error = message;
  return -1;
}

inline int32_t fail(const char* what, cudaError_t error) {
  return fail(std::string(what) + ": " + cudaGetErrorString(error));
}

constexpr const char *kStoredLimit = "GENREC_ATTENTION_STORED_GIB", *kKeptLimit = "GENREC_ATTENTION_KEPT_GIB";

// Bytes that an environment variable gives in GiB; -1: what stands there is no such number.
inline int64_t limit_of(const char* name, int64_t otherwise) {
  const char* text = std::getenv(name);
  if (text == nullptr) return otherwise;
  char* end = nullptr;
  const double gib = std::strtod(text, &end);
  constexpr double kMost = 1 << 20;
  return end == text || *end != 0 || !(gib >= 0) || gib > kMost ? -1 : static_cast<int64_t>(gib * (int64_t{1} << 30));
}

inline int32_t fail_limit(const char* name) {
  return fail(std::string(name) + " must be a number of GiB, got '" + std::getenv(name) + "'");
}

// The most memory that dS may take, or a bias forward, else 4 GiB. Read once: plans depend on it.
inline int64_t most_stored() {
  static const int64_t most = limit_of(kStoredLimit, int64_t{4} << 30);
  return most;
}

// The most that a forward pass may keep of its bias for the backward pass, else 1 GiB. Read once, too: both passes ask.
inline int64_t most_kept() {
  static const int64_t most = limit_of(kKeptLimit, int64_t{1} << 30);
  return most;
}

inline const ForwardInstance kForward[] = {
#define GENREC_FORWARD_INSTANCE(dtype, dim, mask, bias) forward_##dtype##_##dim##_##mask##_##bias(),
#include "forward.inc"
#undef GENREC_FORWARD_INSTANCE
};

inline const BackwardInstance kBackward[] = {
#define GENREC_BACKWARD_INSTANCE(dtype, dim, mask, bias) backward_##dtype##_##dim##_##mask##_##bias(),
#include "backward.inc"
#undef GENREC_BACKWARD_INSTANCE
};

inline const char* dtype_name(int32_t dtype) { return dtype == 0 ? "bf16" : dtype == 1 ? "fp16" : "unknown dtype"; }

inline const char* bias_name(Bias bias) {
  return bias == Bias::kNone ? "none" : bias == Bias::kRelative ? "relative" : "dense";
}

inline Bias bias_kind(const genrec_attention_problem& p) { return static_cast<Bias>(p.bias.kind); }

inline bool is_causal(const genrec_attention_problem& p) {
  return p.contexts == nullptr && p.targets == nullptr && p.window < 0 && p.causal != 0;
}

inline bool serves(const ForwardInstance&, const genrec_attention_problem&) { return true; }

inline bool serves(const BackwardInstance& one, const genrec_attention_problem& p) {
  return one.lengths == SequenceLengths::kAll || (one.lengths == SequenceLengths::kLong) == (p.key_rows >= kLongMean * p.sequences);
}

// Whether the forward pass puts the relative bias into memory first. Measured: from some 8,192 keys in the mean on that loses;
// there is no room for all, it isn't kept, and times are told by few edges beside the products.
constexpr int64_t kStoredMean = 8192;

inline bool stores_bias(const ForwardInstance& one, const genrec_attention_problem& p) {
  return one.blocks.stores_bias && p.key_rows < kStoredMean * p.sequences;
}

// The smallest instance that holds the dims. The general mask covers the causal one.
template <class Instance, size_t kCount>
const Instance* find(const Instance (&table)[kCount], const genrec_attention_problem& p, Bias bias) {
  const int dim = p.qk_dim > p.v_dim ? p.qk_dim : p.v_dim;
  const Instance* best = nullptr;
  for (const Instance& one : table) {
    if (std::strcmp(one.dtype, dtype_name(p.dtype)) != 0 || one.dim < dim || (one.causal && !is_causal(p))) continue;
    if (one.bias != bias || !serves(one, p)) continue;
    if (best == nullptr || one.dim < best->dim || (one.dim == best->dim && one.causal)) best = &one;
  }
  return best;
}

// The backward kernel that serves the problem, and its lists in the plan.
struct Backward {
  const BackwardInstance& kernel;
  int keys, queries;
};

inline bool same_tiles(const BackwardInstance& a, const BackwardInstance& b) {
  return a.blocks.keys == b.blocks.keys && a.blocks.listed_queries() == b.blocks.listed_queries();
}

inline Backward find_backward(const genrec_attention_problem& p) {
  const BackwardInstance& plain = *find(kBackward, p, Bias::kNone);
  const BackwardInstance& one = *find(kBackward, p, bias_kind(p));
  if (same_tiles(one, plain)) return {one, kBackwardKeys, kBackwardQueries};
  return {one, kBiasedKeys, kBiasedQueries};
}

// Any backward kernel with a bias, whose tiles are those of the other, or null where none is built.
inline const BackwardInstance* find_biased(const genrec_attention_problem& p) {
  const BackwardInstance* one = find(kBackward, p, Bias::kRelative);
  return one != nullptr ? one : find(kBackward, p, Bias::kDense);
}

inline int32_t check_bias(const genrec_attention_bias& bias) {
  if (bias.kind < 0 || bias.kind > 2) return fail("bias.kind must be 0, 1 or 2, got " + std::to_string(bias.kind));
  if (bias.kind != 1) return 0;
  if (bias.position != nullptr && bias.max_positions < 1)
    return fail("max_positions must be at least 1, got " + std::to_string(bias.max_positions));
  if (bias.time != nullptr && bias.buckets < 1)
    return fail("buckets must be at least 1, got " + std::to_string(bias.buckets));
  if (bias.time != nullptr && (bias.key_times == nullptr || (bias.buckets > 1 && bias.edges == nullptr)))
    return fail("a time table needs edges and key_times");
  return 0;
}

// Pointers of tensors aren't looked at: of the bias only what is given.
inline int32_t check_problem(const genrec_attention_problem* p, bool backward) {
  if (p == nullptr) return fail("no problem given");
  if (p->heads < 1) return fail("heads must be at least 1, got " + std::to_string(p->heads));
  for (int32_t dim : {p->qk_dim, p->v_dim}) {
    if (dim < 8 || dim % 8 != 0)
      return fail("dims must be multiples of 8 (the copy engine moves 16 bytes), got " + std::to_string(dim));
  }
  if (p->sequences < 0) return fail("sequences must not be negative, got " + std::to_string(p->sequences));
  if (p->target_group < 1) return fail("target_group must be at least 1, got " + std::to_string(p->target_group));
  for (int64_t rows : {p->query_rows, p->key_rows}) {
    if (rows < 0 || rows >= int64_t{1} << 31)
      return fail("rows must be fewer than 2^31, got " + std::to_string(rows));
  }
  if (check_bias(p->bias) != 0) return -1;
  if (most_stored() < 0) return fail_limit(kStoredLimit);
  if (most_kept() < 0) return fail_limit(kKeptLimit);
  const Bias bias = bias_kind(*p);
  // A plan lists the tiles of the kernels without a bias, whatever else it lists.
  if (find(kForward, *p, Bias::kNone) == nullptr || find(kBackward, *p, Bias::kNone) == nullptr ||
      find(kForward, *p, bias) == nullptr || (backward && find(kBackward, *p, bias) == nullptr)) {
    return fail(std::string("no ") + (backward ? "backward " : "") + "kernel is built for " + dtype_name(p->dtype) +
                ", qk_dim " + std::to_string(p->qk_dim) + ", v_dim " + std::to_string(p->v_dim) + ", bias " +
                bias_name(bias));
  }
  return 0;
}

inline MaskRule mask_rule(const genrec_attention_problem& p) { return {p.target_group, p.window, p.causal}; }

}  // namespace genrec::attention
