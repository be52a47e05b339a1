// Builds the lists of a plan, one block for each; one more block places dS.
#include "attention/plan.h"

namespace genrec::attention {

namespace {

struct PlanParams {
  Batch batch;
  int size[kPlanLists];
  int* length[kPlanLists];
  TileRecord* tiles[kPlanLists];
  MaskRule rule;
  int64_t cells;
  int *places, *without_place;
};

__device__ void place_store(const PlanParams& p) {
  __shared__ StoreScratch scratch;
  const int thread = threadIdx.x, threads = blockDim.x;
  store_phase_count(scratch, p.batch, p.rule, thread, threads);
  __syncthreads();
  if (thread == 0) store_phase_sum(scratch, p.without_place, threads);
  __syncthreads();
  store_phase_place(scratch, p.batch, p.rule, p.cells, p.places, p.without_place, thread, threads);
}

__global__ void __launch_bounds__(1024) plan_kernel(const PlanParams p) {
  __shared__ ListScratch scratch;
  const int which = blockIdx.x, thread = threadIdx.x, threads = blockDim.x;
  if (which == kPlanLists) {
    if (p.size[kStoredQueries] > 0) place_store(p);
    return;
  }
  if (p.size[which] == 0) return;
  const ListKind kind = which == kBackwardKeys || which == kBiasedKeys ? ListKind::kKeys : ListKind::kQueries;
  for (int b = thread; b < kLengthBuckets; b += threads) scratch.tiles[b] = 0;
  __syncthreads();
  list_phase_count(scratch, p.batch, kind, p.size[which], thread, threads);
  __syncthreads();
  if (thread == 0) *p.length[which] = list_phase_sum(scratch);
  __syncthreads();
  for (int first = 0; first < p.batch.sequences; first += threads) {
    list_phase_chunk(scratch, p.batch, kind, p.size[which], first, thread);
    __syncthreads();
    list_phase_write(scratch, p.batch, kind, p.size[which], together_in(which), p.tiles[which], first, thread);
    __syncthreads();
    list_phase_advance(scratch, thread);
    __syncthreads();
  }
}

}  // namespace

cudaError_t make_plan(const Batch& batch, const MaskRule& rule, const PlanShape& shape, void* plan, cudaStream_t stream) {
  PlanParams params{};
  params.batch = batch;
  params.rule = rule;
  params.cells = shape.cells;
  params.places = const_cast<int*>(shape.places(plan));
  params.without_place = const_cast<int*>(shape.without_place(plan));
  for (int which = 0; which < kPlanLists; ++which) {
    const WorkList list = shape.list(plan, which);
    params.size[which] = shape.size[which];
    params.length[which] = const_cast<int*>(list.length);
    params.tiles[which] = const_cast<TileRecord*>(list.tiles);
  }
  plan_kernel<<<kPlanLists + 1, 1024, 0, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace genrec::attention
