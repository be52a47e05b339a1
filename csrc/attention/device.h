// What only the GPU can do: barriers, the copy engine, matrix products by warpgroups, a few single instructions.
//
// Everything else in the kernels is plain C++ over CuTe's layouts, so that with GENREC_EMULATED these primitives are
// replaced by those of tests/emulator.h and the kernels run on the host, thread for thread.
#pragma once

#if defined(GENREC_EMULATED)
#include "attention/tests/emulator.h"
#else

#include <cute/arch/copy_sm90_tma.hpp>
#include <cute/arch/mma_sm80.hpp>
#include <cute/tensor.hpp>
#include <cutlass/arch/barrier.h>
#include <cutlass/arch/reg_reconfig.h>
#include <cutlass/bfloat16.h>

#define GENREC_SHARED_MEMORY(name) extern __shared__ __align__(1024) char name[]

namespace genrec::attention {

using FullBarrier = cutlass::arch::ClusterTransactionBarrier;
using EmptyBarrier = cutlass::arch::ClusterBarrier;

// A kernel that is launched so (launch_kernel in instantiate.h) starts when all blocks of the one before it in the stream
// have said that it may, or have ended; what that one writes, and those before it, is there after the wait. All threads
// wait, whatever else they do: a block that ends sooner would let the next kernel believe that all is done.
__device__ inline void let_next_kernel_start() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
__device__ inline void wait_for_kernel_before() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
__device__ inline void follow_kernel_before() {
  wait_for_kernel_before();
  let_next_kernel_start();
}

// New barriers become visible to the copy engine.
__device__ inline void fence_new_barriers() { cutlass::arch::fence_barrier_init(); }

// The assembler moves no reads of memory across, so that it claims registers for a few of them at a time. All lanes of a
// warp come here.
__device__ inline void keep_order() { __syncwarp(); }

// The compiler moves no accesses of memory across. Waiting for a barrier alone does not tell it that others write.
__device__ inline void keep_accesses() { asm volatile("" ::: "memory"); }

// Zero, which the compiler doesn't know: launches have one dimension.
__device__ inline uint32_t unknown_zero() { return blockIdx.z; }

// What this thread wrote to shared memory becomes visible to the tensor cores and the copy engine.
__device__ inline void fence_shared_writes() { cutlass::arch::fence_view_async_shared(); }

__device__ inline void sync_block(int) { __syncthreads(); }
__device__ inline void sync_warp() { __syncwarp(); }

// Named barrier: `threads` threads take part, those that sync wait for all, those that arrive go on.
__device__ inline void sync_threads(uint32_t barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

__device__ inline void arrive_threads(uint32_t barrier, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// The value itself, which the compiler then neither computes again nor takes apart.
__device__ inline int settled(int value) {
  asm volatile("" : "+r"(value));
  return value;
}

__device__ inline float* settled(float* value) {
  asm volatile("" : "+l"(value));
  return value;
}

// The value in another register. ptxas puts a wait behind every wgmma of a loop whose accumulators were written in the
// round before: those are written elsewhere and copied.
__device__ inline float copied(float value) {
  float copy;
  asm volatile("mov.b32 %0, %1;" : "=f"(copy) : "f"(value));
  return copy;
}

// The same in all lanes, and the compiler knows it.
__device__ inline int uniform(int value) { return __shfl_sync(0xffffffffu, value, 0); }

__device__ inline uint32_t exchange(uint32_t word, int lanes) { return __shfl_xor_sync(0xffffffffu, word, lanes); }
__device__ inline int largest_of_warp(int value) { return __reduce_max_sync(0xffffffffu, value); }
__device__ inline uint32_t largest_of_warp(uint32_t value) { return __reduce_max_sync(0xffffffffu, value); }
__device__ inline float from_lane(float value, int lane) { return __shfl_sync(0xffffffffu, value, lane); }

__device__ inline uint32_t float_bits(float value) { return __float_as_uint(value); }
__device__ inline float float_of(uint32_t bits) { return __uint_as_float(bits); }

// The larger of the upper and of the lower halves.
__device__ inline uint32_t larger_halves(uint32_t a, uint32_t b) { return __vmaxu2(a, b); }

// All bits of a half where `a`, as a number of fp16, is less than `b`.
__device__ inline uint32_t halves_below(uint32_t a, uint32_t b) {
  uint32_t below;
  asm("set.lt.u32.f16x2 %0, %1, %2;" : "=r"(below) : "r"(a), "r"(b));
  return below;
}

// The bits of an integer's value in fp32, digits beyond cut off.
__device__ inline uint32_t float_bits_below(uint32_t value) { return __float_as_uint(__uint2float_rz(value)); }
__device__ inline uint32_t float_bits_below(uint64_t value) { return __float_as_uint(__ull2float_rz(value)); }

template <int kRegisters>
__device__ inline void give_registers() {
  cutlass::arch::warpgroup_reg_dealloc<kRegisters>();
}

template <int kRegisters>
__device__ inline void take_registers() {
  cutlass::arch::warpgroup_reg_alloc<kRegisters>();
}

__device__ inline void prefetch_map(const CUtensorMap& map) { cute::prefetch_tma_descriptor(&map); }

// A box of a (rows, heads, dim) tensor to shared memory; `full` has been told of its bytes. kRows, kColumns: the box.
template <int kRows, int kColumns, class Element>
__device__ inline void load_box(const CUtensorMap& map, FullBarrier& full, Element* to, int column, int head, int row) {
  // Evict-normal: keys and values are read by many blocks at the same time, all from the L2 cache.
  constexpr uint64_t kHint = static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_NORMAL);
  cute::SM90_TMA_LOAD_3D::copy(&map, reinterpret_cast<uint64_t*>(&full), kHint, to, column, head, row);
}

// `bytes` bytes to shared memory; `full` has been told of them. Addresses and size are multiples of 16. kOnce: nobody else
// reads them, the L2 cache need not keep them.
template <bool kOnce = true>
__device__ inline void copy_in_bulk(void* to, const void* from, int bytes, FullBarrier& full) {
  constexpr uint64_t kHint = static_cast<uint64_t>(kOnce ? cute::TMA::CacheHintSm90::EVICT_FIRST
                                                         : cute::TMA::CacheHintSm90::EVICT_NORMAL);
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(
          cute::cast_smem_ptr_to_uint(to)),
      "l"(from), "r"(bytes), "r"(cute::cast_smem_ptr_to_uint(&full)), "l"(kHint)
      : "memory");
}

// Two numbers in fp16, the first in the lower half; those beyond its range become its largest.
__device__ inline uint32_t pack_finite_halves(float low, float high) {
  uint32_t word;
  asm("cvt.rn.satfinite.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}

// 16 bytes that an earlier kernel wrote.
__device__ inline uint4 load_written(const uint4* from) {
  uint4 four;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(four.x), "=r"(four.y), "=r"(four.z), "=r"(four.w)
               : "l"(from)
               : "memory");
  return four;
}

// `bytes` bytes, a multiple of 16, into the L2 cache.
__device__ inline void prefetch_to_l2(const void* from, int bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
}

// To global memory, where it will be read once.
__device__ inline void store_once(uint32_t* where, uint32_t word) { __stcs(where, word); }

// Four 8 x 8 matrices of 16-bit elements to shared memory: lane l gives the address of row l % 8 of matrix l / 8, and
// of each matrix j holds columns 2 (l % 4) and the next of row l / 4 in word j.
__device__ inline void store_matrices(char* address, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                   cute::cast_smem_ptr_to_uint(address)),
               "r"(a), "r"(b), "r"(c), "r"(d)
               : "memory");
}

// The same way back.
__device__ inline void load_matrices(const char* address, uint32_t (&words)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(cute::cast_smem_ptr_to_uint(address))
               : "memory");
}

// Transposed: word j holds rows 2 (l % 4) and the next of column l / 4 of matrix j.
__device__ inline void load_matrices_transposed(const char* address, uint32_t (&words)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(cute::cast_smem_ptr_to_uint(address))
               : "memory");
}

// A warp's c += a b with a of 16 x 16, b of 16 x 8. Lane l holds, two neighbours to a word: of a the columns 2 (l % 4) and
// the next in rows l / 4 (a0) and l / 4 + 8 (a1), eight columns on likewise (a2, a3); of b the rows 2 (l % 4) and the next
// (b0) and eight rows on (b1) in column l / 4; of c the columns 2 (l % 4) and the next in rows l / 4 and l / 4 + 8.
template <class Element>
__device__ inline void add_product(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                   uint32_t b1) {
  using Mma = cute::conditional_t<cute::is_same_v<Element, cutlass::bfloat16_t>, cute::SM80_16x8x16_F32BF16BF16F32_TN,
                                  cute::SM80_16x8x16_F32F16F16F32_TN>;
  Mma::fma(c[0], c[1], c[2], c[3], a0, a1, a2, a3, b0, b1, c[0], c[1], c[2], c[3]);
}

// An 8 x 8 matrix of 16-bit elements, two neighbours of row l / 4 in lane l, transposed.
__device__ inline uint32_t transposed_matrix(uint32_t word) {
  uint32_t columns;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(columns) : "r"(word));
  return columns;
}

__device__ inline void add_to_shared(int* where, int value) {
  asm volatile("red.relaxed.cta.shared::cta.add.s32 [%0], %1;" ::"r"(cute::cast_smem_ptr_to_uint(where)), "r"(value)
               : "memory");
}

__device__ inline bool any_lane(bool condition) { return __any_sync(0xffffffffu, condition); }

// Adds to where[kOffset] and the next three; the offset costs no arithmetic.
template <int kOffset>
__device__ inline void add_to_global(float* where, float a, float b, float c, float d) {
  asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0 + %5], {%1, %2, %3, %4};" ::"l"(where), "f"(a), "f"(b), "f"(c),
               "f"(d), "n"(4 * kOffset)
               : "memory");
}

__device__ inline void add_to_global(float* where, float value) {
  asm volatile("red.relaxed.gpu.global.add.f32 [%0], %1;" ::"l"(where), "f"(value) : "memory");
}

// Adds `bytes` bytes of fp32 numbers in shared memory to as many at `where`, by the copy engine; returns at once. Both
// addresses and the size are multiples of 16; the numbers were made visible by fence_shared_writes.
__device__ inline void add_in_bulk(float* where, const float* numbers, int bytes) {
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;\n"
               "cp.async.bulk.commit_group;" ::"l"(where),
               "r"(cute::cast_smem_ptr_to_uint(numbers)), "r"(bytes)
               : "memory");
}

// Until the numbers of all this thread's additions in bulk have been read, and until they have been added.
__device__ inline void wait_for_bulk_reads() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }
__device__ inline void wait_for_bulk_sums() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

__device__ inline void await_turn(const int* turn, int mine) {
  int taken;
  do {
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(taken) : "l"(turn) : "memory");
  } while (taken != mine);
}

__device__ inline void pass_turn(int* turn) {
  asm volatile("red.release.gpu.global.add.s32 [%0], 1;" ::"l"(turn) : "memory");
}

__device__ inline void fence_global() { __threadfence(); }

__device__ inline float fast_tanh(float x) {
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// A warpgroup's part of a tile in shared memory as an operand: descriptors that wgmma reads.
template <class Slice, class Tile>
__device__ inline auto operand_a(Slice const& slice, Tile const& tile) {
  return slice.partition_fragment_A(tile);
}

template <class Slice, class Tile>
__device__ inline auto operand_b(Slice const& slice, Tile const& tile) {
  return slice.partition_fragment_B(tile);
}

// An operand in shared memory whose addresses the compiler computes where they are used: kept over a loop, they take
// registers that are not there.
template <class Operand>
__device__ inline Operand settled_operand(Operand operand) {
  asm volatile("" : "+l"(operand.data().desc_.desc_));
  return operand;
}

// Issues c (+)= a b and returns at once; the product is done when wait_for says so.
template <bool kZero, class Mma, class A, class B, class C>
__device__ inline void issue_product(Mma& mma, A const& a, B const& b, C& c) {
  cute::warpgroup_fence_operand(c);
  if constexpr (!cute::is_base_of<cute::GMMA::DescriptorIterator, typename A::iterator>::value) {
    cute::warpgroup_fence_operand(const_cast<A&>(a));
  }
  cute::warpgroup_arrive();
  if constexpr (kZero) mma.accumulate_ = cute::GMMA::ScaleOut::Zero;
  CUTE_UNROLL
  for (int k = 0; k < cute::size<2>(a); ++k) {
    cute::gemm(mma, a(cute::_, cute::_, k), b(cute::_, cute::_, k), c);
    mma.accumulate_ = cute::GMMA::ScaleOut::One;
  }
  cute::warpgroup_commit_batch();
  cute::warpgroup_fence_operand(c);
}

// Waits until all products but the last kPending are done; c is the result of one that then is.
template <int kPending, class C>
__device__ inline void wait_for(C& c) {
  cute::warpgroup_wait<kPending>();
  cute::warpgroup_fence_operand(c);
}

}  // namespace genrec::attention

#endif
