// The C interface: checks, copy-engine maps, launches.
#include <cstdio>
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

namespace {

thread_local std::string last_error;

int32_t fail(const std::string& message) {
  last_error = message;
  return -1;
}

int32_t fail(const char* what, cudaError_t error) {
  return fail(std::string(what) + ": " + cudaGetErrorString(error));
}

const ForwardInstance kForward[] = {
#define GENREC_FORWARD_INSTANCE(dtype, dim, mask, bias) forward_##dtype##_##dim##_##mask##_##bias(),
#include "forward.inc"
#undef GENREC_FORWARD_INSTANCE
};

const BackwardInstance kBackward[] = {
#define GENREC_BACKWARD_INSTANCE(dtype, dim, mask, bias) backward_##dtype##_##dim##_##mask##_##bias(),
#include "backward.inc"
#undef GENREC_BACKWARD_INSTANCE
};

const char* dtype_name(int32_t dtype) { return dtype == 0 ? "bf16" : dtype == 1 ? "fp16" : "unknown dtype"; }

const char* bias_name(Bias bias) {
  return bias == Bias::kNone ? "none" : bias == Bias::kRelative ? "relative" : "dense";
}

Bias bias_kind(const genrec_attention_problem& p) { return static_cast<Bias>(p.bias.kind); }

bool is_causal(const genrec_attention_problem& p) {
  return p.contexts == nullptr && p.targets == nullptr && p.window < 0 && p.causal != 0;
}

bool serves(const ForwardInstance&, const genrec_attention_problem&) { return true; }

bool serves(const BackwardInstance& one, const genrec_attention_problem& p) {
  return one.lengths == SequenceLengths::kAll || (one.lengths == SequenceLengths::kLong) == (p.key_rows >= kLongMean * p.sequences);
}

// Whether the forward pass puts the relative bias into memory first. Measured: from some 8,192 keys in the mean on that loses;
// there is no room for all, it isn't kept, and times are told by few edges beside the products.
constexpr int64_t kStoredMean = 8192;

bool stores_bias(const ForwardInstance& one, const genrec_attention_problem& p) {
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

bool same_tiles(const BackwardInstance& a, const BackwardInstance& b) {
  return a.blocks.keys == b.blocks.keys && a.blocks.listed_queries() == b.blocks.listed_queries();
}

Backward find_backward(const genrec_attention_problem& p) {
  const BackwardInstance& plain = *find(kBackward, p, Bias::kNone);
  const BackwardInstance& one = *find(kBackward, p, bias_kind(p));
  if (same_tiles(one, plain)) return {one, kBackwardKeys, kBackwardQueries};
  return {one, kBiasedKeys, kBiasedQueries};
}

// Any backward kernel with a bias, whose tiles are those of the other, or null where none is built.
const BackwardInstance* find_biased(const genrec_attention_problem& p) {
  const BackwardInstance* one = find(kBackward, p, Bias::kRelative);
  return one != nullptr ? one : find(kBackward, p, Bias::kDense);
}

int32_t check_bias(const genrec_attention_bias& bias) {
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

constexpr const char *kStoredLimit = "GENREC_ATTENTION_STORED_GIB", *kKeptLimit = "GENREC_ATTENTION_KEPT_GIB";

// Bytes that an environment variable gives in GiB; -1: what stands there is no such number.
int64_t limit_of(const char* name, int64_t otherwise) {
  const char* text = std::getenv(name);
  if (text == nullptr) return otherwise;
  char* end = nullptr;
  const double gib = std::strtod(text, &end);
  constexpr double kMost = 1 << 20;
  return end == text || *end != 0 || !(gib >= 0) || gib > kMost ? -1 : static_cast<int64_t>(gib * (int64_t{1} << 30));
}

int32_t fail_limit(const char* name) {
  return fail(std::string(name) + " must be a number of GiB, got '" + std::getenv(name) + "'");
}

// The most memory that dS may take, or a bias forward, else 4 GiB. Read once: plans depend on it.
int64_t most_stored() {
  static const int64_t most = limit_of(kStoredLimit, int64_t{4} << 30);
  return most;
}

// The most that a forward pass may keep of its bias for the backward pass, else 1 GiB. Read once, too: both passes ask.
int64_t most_kept() {
  static const int64_t most = limit_of(kKeptLimit, int64_t{1} << 30);
  return most;
}

// Pointers of tensors aren't looked at: of the bias only what is given.
int32_t check_problem(const genrec_attention_problem* p, bool backward) {
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

MaskRule mask_rule(const genrec_attention_problem& p) { return {p.target_group, p.window, p.causal}; }

// Cells of dS for each head that are given room. Lengths are not known here: one and a half times what equal ones would
// take, so that sequences may differ. Those that find no room then have dS computed twice.
int64_t stored_cells(const genrec_attention_problem& p) {
  if (p.sequences == 0) return 0;
  const auto mean = [&](int64_t rows) { return static_cast<int>((rows + p.sequences - 1) / p.sequences); };
  const int queries = mean(p.query_rows), keys = larger(queries, mean(p.key_rows));
  const int contexts = p.contexts == nullptr ? 0 : keys - queries + 1;  // some, in the first cells
  const int64_t cells = int64_t{StoredSequence(queries, keys, contexts, p.causal != 0).cells()} * p.sequences;
  const int64_t most = most_stored() / (int64_t{kCellElements} * 2 * p.heads);
  const int64_t wanted = p.sequences > 1 ? cells + cells / 2 : cells;
  return wanted < most ? wanted : most;
}

// Rows of the tiles of stored dS, or of a stored bias; 0 where no kernel stores any. All store the same cells.
int stored_rows_of(const genrec_attention_problem& p) {
  int rows = 0;
  for (Bias bias : {Bias::kNone, Bias::kRelative}) {
    const BackwardInstance* one = find(kBackward, p, bias);
    if (one != nullptr) rows = larger(rows, one->blocks.stored_rows);
    const ForwardInstance* forward = find(kForward, p, bias);
    if (forward != nullptr && stores_bias(*forward, p)) rows = kCellQueries;
  }
  return rows;
}

PlanShape plan_shape(const genrec_attention_problem& p) {
  const ForwardInstance& forward = *find(kForward, p, Bias::kNone);
  const BackwardInstance& backward = *find(kBackward, p, Bias::kNone);
  const int stored_rows = stored_rows_of(p);
  PlanShape shape{{forward.blocks.queries, backward.blocks.keys, backward.blocks.listed_queries(), 0, 0, stored_rows},
                  {}, p.sequences, stored_rows > 0 ? stored_cells(p) : 0};
  const BackwardInstance* biased = find_biased(p);
  if (biased != nullptr && !same_tiles(*biased, backward)) {
    shape.size[kBiasedKeys] = biased->blocks.keys;
    shape.size[kBiasedQueries] = biased->blocks.listed_queries();
  }
  for (int which = 0; which < kPlanLists; ++which) {
    if (shape.size[which] == 0) continue;
    const int64_t rows = which == kBackwardKeys || which == kBiasedKeys ? p.key_rows : p.query_rows;
    shape.capacity[which] = list_capacity(rows, p.sequences, shape.size[which]);
  }
  return shape;
}

using EncodeTiled = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                                 const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                                 CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

// Looked up at run time, so that the library loads where there is no driver.
EncodeTiled encode_tiled() {
  static const EncodeTiled function = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
    return error == cudaSuccess && result == cudaDriverEntryPointSuccess ? reinterpret_cast<EncodeTiled>(found)
                                                                         : nullptr;
  }();
  return function;
}

// A thread that has not used CUDA before has no context, and the driver's own functions want one: autograd's thread in
// its first backward pass. It gets the context of the device that holds `data`.
bool enter_context(const void* data) {
  cudaPointerAttributes attributes;
  return cudaPointerGetAttributes(&attributes, data) == cudaSuccess && attributes.type == cudaMemoryTypeDevice &&
         cudaSetDevice(attributes.device) == cudaSuccess;
}

// A (rows, heads, dim) tensor read in boxes of `box_rows` rows of one head, 64 columns (all, where the instance has
// fewer); what lies beyond `rows` or `dim` reads as zero.
int32_t encode(CUtensorMap* map, const char* name, const genrec_attention_problem& p,
               const genrec_attention_tensor* tensor, int64_t rows, int dim, int instance_dim, int box_rows) {
  if (tensor == nullptr || tensor->data == nullptr) return fail(std::string(name) + " is missing");
  if (reinterpret_cast<uintptr_t>(tensor->data) % 16 != 0) return fail(std::string(name) + " is not 16-byte aligned");
  if (tensor->row_stride % 8 != 0 || (p.heads > 1 && tensor->head_stride % 8 != 0))
    return fail(std::string("the strides of ") + name + " are not multiples of 8 elements");
  if (encode_tiled() == nullptr) return fail("the CUDA driver has no cuTensorMapEncodeTiled: it needs CUDA 12 or newer");
  const int columns = instance_dim < 64 ? instance_dim : 64;
  // A stride that nothing is reached by must still be a valid one.
  const int64_t head_stride = p.heads > 1 ? tensor->head_stride : dim;
  const cuuint64_t sizes[3] = {static_cast<cuuint64_t>(dim), static_cast<cuuint64_t>(p.heads),
                               static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[2] = {static_cast<cuuint64_t>(head_stride) * 2,
                                 static_cast<cuuint64_t>(tensor->row_stride) * 2};
  const cuuint32_t box[3] = {static_cast<cuuint32_t>(columns), 1, static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t steps[3] = {1, 1, 1};
  const auto encode_once = [&] {
    return encode_tiled()(
        map, p.dtype == 0 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 3, tensor->data, sizes,
        strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
        columns == 64 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  };
  CUresult result = encode_once();
  if (result == CUDA_ERROR_INVALID_CONTEXT && enter_context(tensor->data)) result = encode_once();
  if (result != CUDA_SUCCESS)
    return fail(std::string("cuTensorMapEncodeTiled refused ") + name + " with error " + std::to_string(result));
  return 0;
}

int32_t check_output(const char* name, const genrec_attention_tensor* tensor) {
  if (tensor == nullptr || tensor->data == nullptr) return fail(std::string(name) + " is missing");
  if (reinterpret_cast<uintptr_t>(tensor->data) % 16 != 0 || tensor->row_stride % 8 != 0 || tensor->head_stride % 8 != 0)
    return fail(std::string(name) + " is not 16-byte aligned in every row");
  return 0;
}

Output output(const genrec_attention_tensor* tensor, int dim) {
  return {tensor->data, tensor->row_stride, tensor->head_stride, dim};
}

Common common(const genrec_attention_problem& p, int* counter) {
  return {mask_rule(p), p.heads, 0.5f * p.alpha, p.scale, p.scales, counter};
}

BiasParams bias_params(const genrec_attention_bias& b) {
  return {{b.position, b.time, b.edges, b.key_times, b.query_times, b.max_positions, b.buckets, nullptr, nullptr, {}},
          {b.dense, b.dense_batch_stride, b.dense_head_stride, b.dense_row_stride, b.d_dense, b.d_dense_batch_stride,
           b.d_dense_head_stride, b.d_dense_row_stride}};
}

int32_t multiprocessors(int* count) {
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(count, cudaDevAttrMultiProcessorCount, device);
  return error == cudaSuccess ? 0 : fail("cudaGetDevice", error);
}

// A persistent kernel needs no more blocks than there may be units of work.
int blocks_for(int64_t tiles, int heads, int most) {
  const int64_t units = tiles * heads;
  return static_cast<int>(units < most ? units : most);
}

// The list of tiles that a pass goes over.
int list_of(const Backward& one, int pass) {
  const BackwardBlocks& blocks = one.kernel.blocks;
  if (pass == 0 && blocks.plain_keys) return kBackwardKeys;
  if (pass > 0 && pass <= blocks.stored_passes) return kStoredQueries;
  return !blocks.gathers() && pass == blocks.passes - 1 ? one.queries : one.keys;
}

// Blocks of the backward pass's launches: over tiles of keys, and over those of stored dS.
struct BackwardLaunches {
  int keys, stored;
};

// Without tables to sum the memory doesn't depend on them.
int32_t backward_launches(const genrec_attention_problem& p, const PlanShape& shape, BackwardLaunches* blocks) {
  int most = 0;
  if (multiprocessors(&most) != 0) return -1;
  *blocks = {blocks_for(shape.capacity[find_backward(p).keys], p.heads, most),
             blocks_for(shape.capacity[kStoredQueries], p.heads, most)};
  return 0;
}

// Of a stored bias, for all heads.
int64_t bias_bytes(const PlanShape& shape) { return shape.cells * kCellElements * 2; }

bool reads_bias(const BackwardInstance& one) { return one.bias == Bias::kRelative && one.blocks.stored_rows > 0; }

// Of the bias that the forward pass leaves for the backward pass, in the places that the plan gives both.
int64_t kept_bytes(const genrec_attention_problem& p, const PlanShape& shape) {
  const BackwardInstance* backward = find(kBackward, p, bias_kind(p));
  if (backward == nullptr || !reads_bias(*backward) || !stores_bias(*find(kForward, p, bias_kind(p)), p)) return 0;
  const int64_t bytes = bias_bytes(shape);
  return bytes <= most_kept() ? bytes : 0;
}

constexpr const char* kNothingKept = "memory was given to keep a bias in, where none is kept";

// The forward pass's memory: counters, the bias where none is kept.
struct ForwardMemory {
  int64_t zeroed = 64, bias_at = 128, bytes;

  ForwardMemory(bool stored, const PlanShape& shape, bool kept)
      : bytes(stored && !kept ? bias_at + bias_bytes(shape) : zeroed) {}
};

// The backward pass's memory: counters, the order of sums, the sums of the tables, a part of zeros; the sums of dQ;
// dS; the relative bias, where dS is stored with one and none was kept. All before the sums of dQ is zeroed, and these,
// too, but where few sequences or none have any: kernels see to those then.
struct BackwardMemory {
  int64_t turns_at, position_at, time_at, zeros_at, sum_at, stored_at, bias_at, zeroed, bytes;
  // Of the tables' sums. The first copies are those of the pass over stored dS: one of the position table for each of its
  // blocks, or, where the order is fixed, for each warp that sums, as of the time table.
  struct Copies {
    int entries, stored, all;

    int64_t bytes() const { return aligned(int64_t{all} * entries * 4); }
  };
  Copies position, time;

  BackwardMemory(const genrec_attention_problem& p, const PlanShape& shape, bool deterministic, bool kept,
                 const BackwardLaunches& blocks) {
    const Backward one = find_backward(p);
    const bool stores = one.kernel.blocks.stored_rows > 0, gathers = one.kernel.blocks.gathers();
    const int64_t tiles = gathers ? shape.capacity[one.queries] * p.heads : 0;
    turns_at = 128;
    position_at = turns_at + (deterministic ? aligned(tiles * 2 * 4) : 0);
    const int stored = one.kernel.blocks.stored_tables, others = blocks.keys * one.kernel.blocks.tables;
    const auto copies = [&](bool wanted, int entries, int each) {
      return Copies{wanted ? entries : 0, blocks.stored * each, blocks.stored * each + others};
    };
    position = copies(p.bias.d_position != nullptr && p.bias.position != nullptr, 2 * p.bias.max_positions - 1,
                      deterministic || stored == 0 ? stored : 1);
    time = copies(p.bias.d_time != nullptr && p.bias.time != nullptr, p.bias.buckets, stored);
    time_at = position_at + position.bytes();
    zeros_at = time_at + time.bytes();
    sum_at = zeros_at + (stores ? kLargestPart * 2 : 0);
    stored_at = sum_at + aligned(tiles * shape.size[one.queries] * one.kernel.dim * 4);
    zeroed = stores ? sum_at : stored_at;
    bias_at = stored_at + (stores ? shape.cells * p.heads * kCellElements * 2 : 0);
    bytes = bias_at + (reads_bias(one.kernel) && !kept ? bias_bytes(shape) : 0);
  }

 private:
  static int64_t aligned(int64_t size) { return (size + 127) / 128 * 128; }
};

std::string list_instances() {
  std::string lines;
  for (const ForwardInstance& one : kForward) {
    lines += std::string("forward ") + one.dtype + " " + std::to_string(one.dim) + (one.causal ? " causal " : " general ") +
             bias_name(one.bias) + "\n";
  }
  for (const BackwardInstance& one : kBackward) {
    lines += std::string("backward ") + one.dtype + " " + std::to_string(one.dim) + (one.causal ? " causal " : " general ") +
             bias_name(one.bias) + (one.lengths == SequenceLengths::kLong ? " long\n" : "\n");
  }
  return lines;
}

}  // namespace

}  // namespace genrec::attention

using namespace genrec::attention;

const char* genrec_attention_error(void) { return last_error.c_str(); }

int32_t genrec_attention_abi_version(void) { return 5; }

const char* genrec_attention_instances(void) {
  static const std::string lines = list_instances();
  return lines.c_str();
}

int32_t genrec_attention_check(const genrec_attention_problem* problem, int32_t backward) {
  return check_problem(problem, backward != 0);
}

int64_t genrec_attention_plan_bytes(const genrec_attention_problem* problem) {
  return check_problem(problem, false) != 0 ? -1 : plan_shape(*problem).bytes();
}

int32_t genrec_attention_make_plan(const genrec_attention_problem* problem, void* plan, void* stream) {
  if (check_problem(problem, false) != 0) return -1;
  const genrec_attention_problem& p = *problem;
  if (plan == nullptr || p.query_offsets == nullptr || p.key_offsets == nullptr)
    return fail("plan, query_offsets and key_offsets must be given");
  const Batch batch{p.query_offsets, p.key_offsets, p.contexts, p.targets, p.sequences};
  const cudaError_t error = make_plan(batch, mask_rule(p), plan_shape(p), plan, static_cast<cudaStream_t>(stream));
  return error == cudaSuccess ? 0 : fail("plan_kernel", error);
}

int64_t genrec_attention_kept_bytes(const genrec_attention_problem* problem) {
  return check_problem(problem, false) != 0 ? -1 : kept_bytes(*problem, plan_shape(*problem));
}

int64_t genrec_attention_workspace_bytes(const genrec_attention_problem* problem, int32_t backward,
                                         int32_t deterministic, int32_t kept) {
  if (check_problem(problem, backward != 0) != 0) return -1;
  const PlanShape shape = plan_shape(*problem);
  if (!backward) {
    const bool stored = stores_bias(*find(kForward, *problem, bias_kind(*problem)), *problem);
    return ForwardMemory(stored, shape, kept != 0).bytes;
  }
  BackwardLaunches blocks{0, 0};
  if (bias_kind(*problem) == Bias::kRelative && backward_launches(*problem, shape, &blocks) != 0) return -1;
  return BackwardMemory(*problem, shape, deterministic != 0, kept != 0, blocks).bytes;
}

int32_t genrec_attention_forward(const genrec_attention_problem* problem, const void* plan, void* workspace, void* kept,
                                 const genrec_attention_tensor* q, const genrec_attention_tensor* k,
                                 const genrec_attention_tensor* v, const genrec_attention_tensor* out, void* stream) {
  if (check_problem(problem, false) != 0 || check_output("out", out) != 0) return -1;
  const genrec_attention_problem& p = *problem;
  if (plan == nullptr || workspace == nullptr) return fail("plan and workspace must be given");
  if (p.query_rows == 0 || p.key_rows == 0) return fail("a batch without rows has nothing to compute");
  const ForwardInstance& one = *find(kForward, p, bias_kind(p));
  const PlanShape shape = plan_shape(p);
  if (kept != nullptr && kept_bytes(p, shape) == 0) return fail(kNothingKept);
  ForwardParams params{};
  int most = 0;
  const bool stored = stores_bias(one, p);
  if (encode(&params.q, "q", p, q, p.query_rows, p.qk_dim, one.dim, one.blocks.queries) != 0 ||
      encode(&params.k, "k", p, k, p.key_rows, p.qk_dim, one.dim, one.blocks.keys) != 0 ||
      encode(&params.v, "v", p, v, p.key_rows, p.v_dim, one.dim, one.blocks.keys) != 0 || multiprocessors(&most) != 0)
    return -1;
  const auto on = static_cast<cudaStream_t>(stream);
  const ForwardMemory memory(stored, shape, kept != nullptr);
  int* counters = static_cast<int*>(workspace);
  cudaError_t error = cudaMemsetAsync(workspace, 0, static_cast<size_t>(memory.zeroed), on);
  if (error != cudaSuccess) return fail("cudaMemsetAsync", error);
  params.out = output(out, p.v_dim);
  BiasParams bias = bias_params(p.bias);
  params.list = shape.list(plan, kForwardQueries);
  const auto pass = [&](int number) -> int32_t {
    params.common = common(p, counters + number);
    error = one.launch(params, bias, number, blocks_for(shape.capacity[kForwardQueries], p.heads, most), on);
    return error == cudaSuccess ? 0 : fail("forward_kernel", error);
  };
  if (stored) {
    void* data = kept != nullptr ? kept : static_cast<char*>(workspace) + memory.bias_at;
    bias.relative.store = {data, shape.places(plan), shape.without_place(plan)};
    error = fill_bias(bias.relative, shape.list(plan, kStoredQueries), mask_rule(p), counters + 2, most, on);
    if (error != cudaSuccess) return fail("fill_bias_kernel", error);
    if (pass(0) != 0) return -1;
  }
  return pass(one.blocks.stores_bias);
}

int32_t genrec_attention_backward(const genrec_attention_problem* problem, const void* plan, void* workspace,
                                  const void* kept, int32_t deterministic, const genrec_attention_tensor* q,
                                  const genrec_attention_tensor* k, const genrec_attention_tensor* v,
                                  const genrec_attention_tensor* d_out, const genrec_attention_tensor* dq,
                                  const genrec_attention_tensor* dk, const genrec_attention_tensor* dv, void* stream) {
  if (check_problem(problem, true) != 0 || check_output("dq", dq) != 0 || check_output("dk", dk) != 0 ||
      check_output("dv", dv) != 0)
    return -1;
  const genrec_attention_problem& p = *problem;
  if (plan == nullptr || workspace == nullptr) return fail("plan and workspace must be given");
  if (p.query_rows == 0 || p.key_rows == 0) return fail("a batch without rows has nothing to compute");
  const Backward found = find_backward(p);
  const BackwardInstance& one = found.kernel;
  const PlanShape shape = plan_shape(p);
  if (kept != nullptr && kept_bytes(p, shape) == 0) return fail(kNothingKept);
  BackwardParams params{};
  int most = 0;
  const bool gathers = one.blocks.gathers();
  const int key_box = one.blocks.key_box;
  const auto encode_queries = [&](int box) {
    if (encode(&params.q, "q", p, q, p.query_rows, p.qk_dim, one.dim, box) != 0) return -1;
    return encode(&params.d_out, "d_out", p, d_out, p.query_rows, p.v_dim, one.dim, box);
  };
  if (encode_queries(one.blocks.query_box) != 0 ||
      encode(&params.k, "k", p, k, p.key_rows, p.qk_dim, one.dim, key_box) != 0 ||
      encode(&params.v, "v", p, v, p.key_rows, p.v_dim, one.dim, key_box) != 0 ||
      multiprocessors(&most) != 0)
    return -1;
  BackwardLaunches blocks{};
  if (backward_launches(p, shape, &blocks) != 0) return -1;
  const auto on = static_cast<cudaStream_t>(stream);
  const BackwardMemory memory(p, shape, deterministic != 0, kept != nullptr, blocks);
  char* base = static_cast<char*>(workspace);
  cudaError_t error = cudaMemsetAsync(workspace, 0, static_cast<size_t>(memory.zeroed), on);
  if (error != cudaSuccess) return fail("cudaMemsetAsync", error);
  params.dk = output(dk, p.qk_dim);
  params.dv = output(dv, p.v_dim);
  params.dq = output(dq, p.qk_dim);
  params.dq_sum = reinterpret_cast<float*>(base + memory.sum_at);
  params.turns = deterministic ? reinterpret_cast<int*>(base + memory.turns_at) : nullptr;
  if (one.blocks.stored_rows > 0)
    params.store = {base + memory.stored_at, shape.places(plan), shape.without_place(plan), base + memory.zeros_at};
  BiasParams bias = bias_params(p.bias);
  const auto sums = [&](const BackwardMemory::Copies& copies, int64_t at, float* table) {
    return SumParams{reinterpret_cast<float*>(base + at), copies.all, copies.entries, table};
  };
  const SumParams position = sums(memory.position, memory.position_at, p.bias.d_position);
  const SumParams time = sums(memory.time, memory.time_at, p.bias.d_time);
  if (reads_bias(one))
    bias.relative.store = {kept != nullptr ? kept : base + memory.bias_at, params.store.first, params.store.left};
  if (reads_bias(one) && kept == nullptr) {
    int* counter = reinterpret_cast<int*>(base) + one.blocks.passes;
    error = fill_bias(bias.relative, shape.list(plan, kStoredQueries), mask_rule(p), counter, most, on);
    if (error != cudaSuccess) return fail("fill_bias_kernel", error);
  }
  for (int pass = 0; pass < one.blocks.passes; ++pass) {
    params.common = common(p, reinterpret_cast<int*>(base) + pass);
    const int list = list_of(found, pass);
    const bool of_stored = list == kStoredQueries;
    params.list = shape.list(plan, list);
    // Behind those over stored dS passes may read Q and dO by other boxes than the first.
    const bool others = !gathers || one.blocks.plain_keys;
    if (others && pass == 1 + one.blocks.stored_passes && one.blocks.query_box != kBoxRows && encode_queries(kBoxRows) != 0)
      return -1;
    const int used = blocks_for(shape.capacity[list], p.heads, most);
    const auto sums_of = [&](const SumParams& table, const BackwardMemory::Copies& copies) {
      const int64_t before = of_stored ? 0 : copies.stored;
      return table.entries == 0 ? nullptr : const_cast<float*>(table.copies) + before * table.entries;
    };
    bias.relative.position_sums = sums_of(position, memory.position);
    bias.relative.time_sums = sums_of(time, memory.time);
    error = one.launch(params, bias, pass, used, on);
    if (error != cudaSuccess) return fail("backward_kernel", error);
  }
  for (const SumParams* table : {&position, &time}) {
    if (table->entries == 0 || one.sum_tables == nullptr) continue;
    error = one.sum_tables(*table, on);
    if (error != cudaSuccess) return fail("sum_tables_kernel", error);
  }
  if (!gathers) return 0;
  const ConvertParams convert{common(p, nullptr), shape.list(plan, found.queries), params.dq_sum, output(dq, p.qk_dim),
                              params.store};
  error = one.convert(convert, blocks_for(shape.capacity[found.queries], p.heads, 16 * most), on);
  return error == cudaSuccess ? 0 : fail("convert_dq_kernel", error);
}
