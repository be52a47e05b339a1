// Builds the lists of a plan, one block for each.
#include "attention/plan.h"

namespace genrec::attention {

namespace {

struct PlanParams {
  Batch batch;
  int size[kPlanLists];
  int* length[kPlanLists];
  TileRecord* tiles[kPlanLists];
};

__global__ void __launch_bounds__(1024) plan_kernel(const PlanParams p) {
  __shared__ ListScratch scratch;
  const int which = blockIdx.x, thread = threadIdx.x, threads = blockDim.x;
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
    list_phase_write(scratch, p.batch, kind, p.size[which], p.tiles[which], first, thread);
    __syncthreads();
    list_phase_advance(scratch, thread);
    __syncthreads();
  }
}

}  // namespace

cudaError_t make_plan(const Batch& batch, const PlanShape& shape, void* plan, cudaStream_t stream) {
  PlanParams params{};
  params.batch = batch;
  for (int which = 0; which < kPlanLists; ++which) {
    const WorkList list = shape.list(plan, which);
    params.size[which] = shape.size[which];
    params.length[which] = const_cast<int*>(list.length);
    params.tiles[which] = const_cast<TileRecord*>(list.tiles);
  }
  plan_kernel<<<kPlanLists, 1024, 0, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace genrec::attention
