// The C interface: what is asked for is checked, given its memory and launched.
#include "attention/genrec_attention.h"
#include "attention/host_memory.h"
#include "attention/host_tensors.h"

namespace genrec::attention {

namespace {

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
