// device.h on the host: kernels run thread for thread, each thread a fiber, warps in random order; now and then a whole
// warpgroup stands still for a while.
//
// Strict where the GPU is lenient: copies arrive late and in any order, products are computed when they are waited for
// and no sooner, so a buffer given back too early or an operand overwritten in flight gives wrong numbers; fresh
// shared memory holds NaN; a run in which no thread can go on is reported as a deadlock.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#include <cuda.h>
#include <cuda_runtime.h>

#include <cute/tensor.hpp>
#include <cutlass/half.h>

#undef __device__
#undef __global__
#undef __launch_bounds__
#undef __grid_constant__
#define __device__
#define __global__
#define __launch_bounds__(...)
#define __grid_constant__
#define GENREC_SHARED_MEMORY(name) char* name = emulator::block().shared

struct EmulatedIndex {
  unsigned x;
};
inline EmulatedIndex threadIdx, blockIdx, gridDim;  // of the running fiber

namespace emulator {

// Where `count` threads meet.
struct Meeting {
  int arrived = 0;
  unsigned generation = 0;
};

struct Block {
  std::vector<char> memory;
  char* shared;
  Meeting all, named[16], warpgroup[4], warp[16];
  uint32_t words[16][32];         // of an exchange
  char* addresses[16][32];        // of a matrix store or load
  uint32_t operands[16][32][6];   // of a warp's product
  std::vector<float> operand[4];  // of a warpgroup's product from registers
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  int block, thread;
  bool done = false;
  std::function<void()> body;
  std::deque<std::function<void()>> products;  // issued, not waited for
  int additions = 0;                           // in bulk, under way
};

// A tensor that the copy engine reads; a CUtensorMap's first word is its number.
struct Source {
  const void* data;
  int dim, heads, rows;
  int64_t row_stride, head_stride;
};

inline std::vector<std::unique_ptr<Fiber>> fibers;
inline std::vector<std::unique_ptr<Block>> blocks;
inline std::deque<std::function<void()>> copies;  // under way
inline std::vector<Source> sources;
inline Fiber* running = nullptr;
inline ucontext_t scheduler;
inline long progress = 0;
inline std::mt19937 random_numbers(1);

inline Block& block() { return *blocks[running->block]; }
inline void yield() { swapcontext(&running->context, &scheduler); }

// Does nothing for some rounds.
inline void linger(int rounds) {
  for (; rounds > 0; --rounds, ++progress) yield();
}

template <class Condition>
void wait_until(Condition condition) {
  while (!condition()) yield();
  ++progress;
}

inline void arrive(Meeting& meeting, int count) {
  ++progress;
  if (++meeting.arrived == count) {
    meeting.arrived = 0;
    ++meeting.generation;
  }
}

inline void meet(Meeting& meeting, int count) {
  const unsigned generation = meeting.generation;
  arrive(meeting, count);
  wait_until([&] { return meeting.generation != generation; });
}

inline void enter() {
  running->body();
  running->done = true;
  ++progress;
  yield();
}

inline void finish_some_copies(bool at_least_one) {
  while (!copies.empty() && (at_least_one || random_numbers() % 2)) {
    at_least_one = false;
    const size_t which = random_numbers() % copies.size();
    const std::function<void()> copy = copies[which];
    copies.erase(copies.begin() + which);
    copy();
    ++progress;
  }
}

// Runs all fibers to their ends; false where none can go on.
inline bool run() {
  std::vector<size_t> warps(fibers.size() / 32);
  for (size_t w = 0; w < warps.size(); ++w) warps[w] = w;
  std::vector<int> rest((warps.size() + 3) / 4);  // rounds for which a warpgroup stands still
  for (;;) {
    const long before = progress;
    bool alive = false, resting = false;
    std::shuffle(warps.begin(), warps.end(), random_numbers);
    for (int& rounds : rest) {
      if (rounds == 0 && random_numbers() % 64 == 0) rounds = 1 + random_numbers() % 200;
      if (rounds > 0) --rounds, resting = true;
    }
    for (size_t warp : warps) {
      for (int lane = 0; lane < 32; ++lane) {
        Fiber* fiber = fibers[warp * 32 + lane].get();
        if (fiber->done) continue;
        alive = true;
        if (rest[warp / 4] > 0) break;
        running = fiber;
        threadIdx.x = fiber->thread, blockIdx.x = fiber->block;
        swapcontext(&scheduler, &fiber->context);
      }
    }
    if (!alive) return true;
    finish_some_copies(progress == before && !resting);
    if (progress == before && !resting) return false;
  }
}

// Launches `kernel` with `count` blocks; false after a deadlock, whose waiting warps are printed.
template <class Kernel>
bool launch(int count, int threads, size_t shared, Kernel kernel) {
  fibers.clear();
  blocks.clear();
  copies.clear();
  gridDim.x = count;
  for (int b = 0; b < count; ++b) {
    blocks.push_back(std::make_unique<Block>());
    Block& fresh = *blocks.back();
    fresh.memory.assign(shared + 1024, 0x7f);  // NaN in bf16 and fp16
    fresh.shared = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(fresh.memory.data()) + 1023) / 1024 * 1024);
    for (int t = 0; t < threads; ++t) {
      fibers.push_back(std::make_unique<Fiber>());
      Fiber& fiber = *fibers.back();
      constexpr size_t kStack = 128 * 1024;
      fiber.stack.reset(new char[kStack]);  // not cleared: most of it is never touched
      fiber.block = b, fiber.thread = t, fiber.body = kernel;
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.get();
      fiber.context.uc_stack.ss_size = kStack;
      fiber.context.uc_link = nullptr;
      makecontext(&fiber.context, enter, 0);
    }
  }
  if (run()) return true;
  std::printf("deadlock; waiting (block/thread):");
  for (const auto& fiber : fibers)
    if (!fiber->done && fiber->thread % 32 == 0) std::printf(" %d/%d", fiber->block, fiber->thread);
  std::printf("\n");
  return false;
}

// mbarrier: a phase ends when all have arrived and all announced bytes have come.
class Barrier {
 public:
  void init(int count) { count_ = pending_ = count, bytes_ = 0, phase_ = 0; }
  void arrive() const { self().change(1, 0); }
  void arrive_and_expect_tx(int64_t bytes) const { self().change(1, bytes); }
  void receive(int64_t bytes) { change(0, -bytes); }
  void wait(uint32_t parity) const {
    wait_until([&] { return phase_ != parity; });
  }

 private:
  Barrier& self() const { return const_cast<Barrier&>(*this); }

  void change(int arrivals, int64_t bytes) {
    ++progress;
    pending_ -= arrivals, bytes_ += bytes;
    if (pending_ < 0) {
      std::printf("more arrivals than a barrier expects\n");
      std::exit(1);
    }
    if (pending_ == 0 && bytes_ == 0) phase_ ^= 1, pending_ = count_;
  }

  int8_t count_, pending_;
  uint16_t phase_;
  int32_t bytes_;
};
static_assert(sizeof(Barrier) == 8, "barriers take the room that the GPU's do");

inline CUtensorMap map_of(const Source& source) {
  CUtensorMap map;
  std::memset(&map, 0, sizeof(map));
  const int number = static_cast<int>(sources.size());
  std::memcpy(&map, &number, sizeof(number));
  sources.push_back(source);
  return map;
}

}  // namespace emulator

inline int atomicAdd(int* where, int value) {
  const int old = *where;
  *where += value;
  return old;
}

namespace genrec::attention {

using FullBarrier = emulator::Barrier;
using EmptyBarrier = emulator::Barrier;

inline void let_next_kernel_start() {}
inline void wait_for_kernel_before() {}
inline void follow_kernel_before() {}
inline void fence_new_barriers() {}
inline void keep_accesses() {}
inline uint32_t unknown_zero() { return 0; }
inline void fence_shared_writes() {}
inline void fence_global() {}
inline void keep_order() {}
inline void prefetch_map(const CUtensorMap&) {}
template <int kRegisters>
void give_registers() {}
template <int kRegisters>
void take_registers() {}

inline void sync_block(int threads) { emulator::meet(emulator::block().all, threads); }
inline void sync_warp() { emulator::meet(emulator::block().warp[threadIdx.x / 32], 32); }
inline void sync_warpgroup() { emulator::meet(emulator::block().warpgroup[threadIdx.x / 128], 128); }
inline void sync_threads(uint32_t barrier, int threads) { emulator::meet(emulator::block().named[barrier], threads); }
inline void arrive_threads(uint32_t barrier, int threads) {
  emulator::arrive(emulator::block().named[barrier], threads);
}
inline int uniform(int value) { return value; }
inline float copied(float value) { return value; }

template <class Value>
Value settled(Value value) {
  return value;
}

inline uint32_t exchange(uint32_t word, int lanes) {
  auto& words = emulator::block().words[threadIdx.x / 32];
  words[threadIdx.x % 32] = word;
  sync_warp();
  const uint32_t got = words[threadIdx.x % 32 ^ lanes];
  sync_warp();
  return got;
}

template <class Word>
Word largest_of_warp(Word value) {
  auto& words = emulator::block().words[threadIdx.x / 32];
  words[threadIdx.x % 32] = static_cast<uint32_t>(value);
  sync_warp();
  for (uint32_t word : words) value = std::max(value, static_cast<Word>(word));
  sync_warp();
  return value;
}

inline float from_lane(float value, int lane) {
  auto& words = emulator::block().words[threadIdx.x / 32];
  std::memcpy(&words[threadIdx.x % 32], &value, 4);
  sync_warp();
  float got;
  std::memcpy(&got, &words[lane], 4);
  sync_warp();
  return got;
}

inline uint32_t float_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline uint32_t larger_halves(uint32_t a, uint32_t b) {
  return std::max(a >> 16, b >> 16) << 16 | std::max(a & 0xffff, b & 0xffff);
}

// Not for NaN: numbers of one sign in the order of their bits.
inline uint32_t halves_below(uint32_t a, uint32_t b) {
  const auto below = [](uint32_t x, uint32_t y) { return int16_t(x) < int16_t(y) ? 0xffffu : 0u; };
  return below(a >> 16, b >> 16) << 16 | below(a & 0xffff, b & 0xffff);
}

template <class Unsigned>
uint32_t float_bits_below(Unsigned value) {
  float nearest = static_cast<float>(value);
  if (static_cast<long double>(nearest) > static_cast<long double>(value)) nearest = std::nextafter(nearest, 0.f);
  uint32_t bits;
  std::memcpy(&bits, &nearest, 4);
  return bits;
}

// The copy engine's swizzle: 16-byte units of a line of 128 bytes, by the line's number.
template <int kRows, int kColumns, class Element>
void load_box(const CUtensorMap& map, FullBarrier& full, Element* to, int column, int head, int row) {
  int number;
  std::memcpy(&number, &map, sizeof(number));
  FullBarrier* barrier = &full;
  emulator::copies.push_back([=] {
    const emulator::Source& from = emulator::sources[number];
    for (int r = 0; r < kRows; ++r) {
      for (int c = 0; c < kColumns; ++c) {
        Element value(0.f);
        if (row + r < from.rows && column + c < from.dim) {
          value = static_cast<const Element*>(from.data)[(row + r) * from.row_stride + head * from.head_stride + column + c];
        }
        unsigned offset = (r * kColumns + c) * 2;
        offset ^= offset >> 3 & (kColumns == 64 ? 0x70 : 0x30);
        std::memcpy(reinterpret_cast<char*>(to) + offset, &value, 2);
      }
    }
    barrier->receive(kRows * kColumns * 2);
  });
}

template <bool kOnce = true>
inline void copy_in_bulk(void* to, const void* from, int bytes, FullBarrier& full) {
  FullBarrier* barrier = &full;
  emulator::copies.push_back([=] {
    std::memcpy(to, from, bytes);
    barrier->receive(bytes);
  });
}

inline uint32_t pack_finite_halves(float low, float high) {
  const auto half = [](float x) {
    constexpr float kMost = 65504.f;
    return uint32_t(cutlass::half_t(x > kMost ? kMost : x < -kMost ? -kMost : x).storage);
  };
  return half(low) | half(high) << 16;
}

inline uint4 load_written(const uint4* from) { return *from; }
inline void prefetch_to_l2(const void*, int) {}

inline void store_once(uint32_t* where, uint32_t word) { *where = word; }

inline void store_matrices(char* address, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  auto& addresses = emulator::block().addresses[threadIdx.x / 32];
  const int lane = threadIdx.x % 32;
  addresses[lane] = address;
  sync_warp();
  const uint32_t words[4] = {a, b, c, d};
  for (int m = 0; m < 4; ++m) std::memcpy(addresses[8 * m + lane / 4] + lane % 4 * 4, &words[m], 4);
  sync_warp();
}

inline void load_matrices(const char* address, uint32_t (&words)[4]) {
  auto& addresses = emulator::block().addresses[threadIdx.x / 32];
  const int lane = threadIdx.x % 32;
  addresses[lane] = const_cast<char*>(address);
  sync_warp();
  for (int m = 0; m < 4; ++m) std::memcpy(&words[m], addresses[8 * m + lane / 4] + lane % 4 * 4, 4);
  sync_warp();
}

inline void load_matrices_transposed(const char* address, uint32_t (&words)[4]) {
  auto& addresses = emulator::block().addresses[threadIdx.x / 32];
  const int lane = threadIdx.x % 32;
  addresses[lane] = const_cast<char*>(address);
  sync_warp();
  for (int m = 0; m < 4; ++m) {
    for (int row = 0; row < 2; ++row)
      std::memcpy(reinterpret_cast<char*>(&words[m]) + 2 * row, addresses[8 * m + lane % 4 * 2 + row] + lane / 4 * 2, 2);
  }
  sync_warp();
}

inline uint32_t transposed_matrix(uint32_t word) {
  auto& words = emulator::block().words[threadIdx.x / 32];
  const int lane = threadIdx.x % 32;
  words[lane] = word;
  sync_warp();
  const auto element = [&](int row) { return words[row * 4 + lane / 8] >> lane / 4 % 2 * 16 & 0xffff; };
  const uint32_t column = element(lane % 4 * 2) | element(lane % 4 * 2 + 1) << 16;
  sync_warp();
  return column;
}

// Whose lane holds which element: as the PTX manual has it (mma.m16n8k16).
template <class Element>
void add_product(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  auto& operands = emulator::block().operands[threadIdx.x / 32];
  const int lane = threadIdx.x % 32;
  const uint32_t own[6] = {a0, a1, a2, a3, b0, b1};
  std::memcpy(operands[lane], own, sizeof(own));
  sync_warp();
  const auto half = [&](int of, int word, int which) {
    return float(Element::bitcast(static_cast<uint16_t>(operands[of][word] >> 16 * which)));
  };
  for (int e = 0; e < 4; ++e) {
    const int row = lane / 4 + e / 2 * 8, column = lane % 4 * 2 + e % 2;
    for (int k = 0; k < 16; ++k) {
      const float left = half(row % 8 * 4 + k % 8 / 2, row / 8 + k / 8 * 2, k % 2);
      c[e] += left * half(column * 4 + k % 8 / 2, 4 + k / 8, k % 2);
    }
  }
  sync_warp();
}

inline void add_to_shared(int* where, int value) { *where += value; }

inline bool any_lane(bool condition) {
  auto& words = emulator::block().words[threadIdx.x / 32];
  words[threadIdx.x % 32] = condition;
  sync_warp();
  bool any = false;
  for (uint32_t word : words) any = any || word != 0;
  sync_warp();
  return any;
}

template <int kOffset>
void add_to_global(float* where, float a, float b, float c, float d) {
  where += kOffset;
  where[0] += a, where[1] += b, where[2] += c, where[3] += d;
}

inline void add_to_global(float* where, float value) { *where += value; }

inline void add_in_bulk(float* where, const float* numbers, int bytes) {
  emulator::Fiber* fiber = emulator::running;
  ++fiber->additions;
  emulator::copies.push_back([=] {
    for (int i = 0; i < bytes / 4; ++i) where[i] += numbers[i];
    --fiber->additions;
  });
}

inline void wait_for_bulk_sums() {
  emulator::wait_until([fiber = emulator::running] { return fiber->additions == 0; });
}
inline void wait_for_bulk_reads() { wait_for_bulk_sums(); }

inline void await_turn(const int* turn, int mine) {
  emulator::wait_until([=] { return *turn == mine; });
}

inline void pass_turn(int* turn) {
  *turn += 1;
  ++emulator::progress;
}

inline float fast_tanh(float x) { return std::tanh(x); }

// Operands in shared memory: the elements themselves.
template <class Slice, class Tile>
auto operand_a(Slice const& slice, Tile const& tile) {
  return slice.partition_A(tile);
}

template <class Slice, class Tile>
auto operand_b(Slice const& slice, Tile const& tile) {
  return slice.partition_B(tile);
}

template <class Operand>
Operand settled_operand(Operand operand) {
  return operand;
}

// wgmma's m64nNk16 by its documentation: who holds which accumulator and which element of A in registers.
template <bool kZero, class A, class B, class C>
void compute_product(A const& a, B const& b, C& c) {
  constexpr bool kRegisters = decltype(cute::size<0>(a))::value == 8;
  constexpr int kSteps = decltype(cute::size<2>(a))::value, kWidth = 16 * kSteps;
  constexpr int kColumns = decltype(cute::size<0>(b))::value / 16;  // of one instruction
  const int lane = threadIdx.x % 32, row0 = threadIdx.x / 32 % 4 * 16 + lane / 4, column0 = lane % 4 * 2;
  std::vector<float>& matrix = emulator::block().operand[threadIdx.x / 128];
  if constexpr (kRegisters) {
    if (matrix.size() < 64 * kWidth) matrix.resize(64 * kWidth);
    for (int k = 0; k < kSteps; ++k)
      for (int e = 0; e < 8; ++e)
        matrix[(row0 + e / 2 % 2 * 8) * kWidth + 16 * k + column0 + e / 4 * 8 + e % 2] = float(a(e, 0, k));
    sync_warpgroup();
  }
  for (int e = 0; e < int(cute::size(c)); ++e) {
    const int row = row0 + e / 2 % 2 * 8, column = column0 + e / 4 * 8 + e % 2;
    float sum = kZero ? 0.f : c(e);
    for (int k = 0; k < kSteps; ++k) {
      for (int i = 0; i < 16; ++i) {
        float left;
        if constexpr (kRegisters) {
          left = matrix[row * kWidth + 16 * k + i];
        } else {
          left = float(a(cute::make_coord(row, i), 0, k));
        }
        sum += left * float(b(cute::make_coord(column % kColumns, i), column / kColumns, k));
      }
    }
    c(e) = sum;
  }
  if constexpr (kRegisters) sync_warpgroup();
}

template <bool kZero, class Mma, class A, class B, class C>
void issue_product(Mma&, A const& a, B const& b, C& c) {
  auto& products = emulator::running->products;
  if constexpr (decltype(cute::size<0>(a))::value == 8) {
    const A* registers = &a;
    products.push_back([registers, b, &c] { compute_product<kZero>(*registers, b, c); });
  } else {
    products.push_back([a, b, &c] { compute_product<kZero>(a, b, c); });
  }
  sync_warpgroup();
}

template <int kPending, class C>
void wait_for(C&) {
  auto& products = emulator::running->products;
  if (emulator::random_numbers() % 64 == 0) emulator::linger(8);
  while (static_cast<int>(products.size()) > kPending) {
    const std::function<void()> product = products.front();
    products.pop_front();
    product();
  }
  sync_warpgroup();
}

}  // namespace genrec::attention
