// Takes the place of csrc/cuda/device.h to run the kernels on a CPU, for tests: every CUDA thread
// is a fiber (ucontext), and the fibers of a block take turns on one OS thread. Shared memory is
// that thread's memory. A barrier or a warp primitive lets the others run until all have come
// there. The blocks of a cooperative launch are OS threads at once; others follow one another.
#pragma once

#include <ATen/core/Tensor.h>
#include <ucontext.h>

#include <algorithm>
#include <atomic>
#include <barrier>
#include <bit>
#include <cmath>
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <thread>
#include <tuple>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static thread_local

namespace pear::emulator {

constexpr int kLanes = 32;
constexpr size_t kStack = 128 * 1024;

struct Dim {
  unsigned x;
};

// A place that `expected` fibers must reach before any goes on.
struct Meeting {
  int arrived = 0;
  int64_t generation = 0;
};

struct Warp {
  Meeting meeting;
  alignas(16) unsigned char values[2][kLanes][16];  // used in turn, so that one meeting is enough
};

struct Block;

struct Fiber {
  ucontext_t context;
  std::unique_ptr<unsigned char[]> stack;
  Block* block;
  Dim thread;
  int turn = 0;
  bool done = false;
};

struct Block {
  Dim index, size, grid;
  std::function<void()> body;
  std::barrier<>* all_blocks = nullptr;
  ucontext_t scheduler;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  Meeting meeting;
  int64_t progress = 0;
  std::exception_ptr error;

  void run();
};

inline thread_local Fiber* current = nullptr;

inline void yield() {
  Fiber* self = current;
  swapcontext(&self->context, &self->block->scheduler);
  current = self;
}

template <typename WhenAll>
void meet(Meeting& meeting, int expected, WhenAll&& when_all) {
  const int64_t generation = meeting.generation;
  if (++meeting.arrived == expected) {
    when_all();
    meeting.arrived = 0;
    meeting.generation += 1;
    current->block->progress += 1;
    return;
  }
  while (meeting.generation == generation) yield();
}

inline void fiber_main() {
  Fiber* self = current;
  try {
    self->block->body();
  } catch (...) {
    self->block->error = std::current_exception();
  }
  self->done = true;
  self->block->progress += 1;
  swapcontext(&self->context, &self->block->scheduler);
}

inline void Block::run() {
  fibers.resize(size.x);
  warps.resize((size.x + kLanes - 1) / kLanes);
  for (unsigned i = 0; i < size.x; ++i) {
    Fiber& fiber = fibers[i];
    fiber.stack = std::make_unique_for_overwrite<unsigned char[]>(kStack);
    fiber.block = this;
    fiber.thread = {i};
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, fiber_main, 0);
  }
  for (bool running = true; running && !error;) {
    const int64_t before = progress;
    running = false;
    for (Fiber& fiber : fibers) {
      if (fiber.done) continue;
      running = true;
      current = &fiber;
      swapcontext(&scheduler, &fiber.context);
      if (error) break;
    }
    if (running && !error && progress == before) {
      error = std::make_exception_ptr(std::runtime_error(
          "deadlock: some threads of a block or warp wait where the others never come"));
    }
  }
  current = nullptr;
}

template <typename T>
T exchange(T value, int from) {
  static_assert(sizeof(T) <= 16);
  Fiber* self = current;
  const int lane = self->thread.x % kLanes;
  Warp& warp = self->block->warps[self->thread.x / kLanes];
  auto& values = warp.values[self->turn];
  self->turn ^= 1;
  std::memcpy(values[lane], &value, sizeof(T));
  meet(warp.meeting, kLanes, [] {});
  T other;
  std::memcpy(&other, values[from], sizeof(T));
  return other;
}

inline int& multiprocessor_count() {
  static int count = 3;
  return count;
}

}  // namespace pear::emulator

#define threadIdx (pear::emulator::current->thread)
#define blockIdx (pear::emulator::current->block->index)
#define gridDim (pear::emulator::current->block->grid)
#undef CUDA_KERNEL_ASSERT
#define CUDA_KERNEL_ASSERT(condition)                                                 \
  do {                                                                                \
    if (!(condition)) throw std::runtime_error("device-side assertion: " #condition); \
  } while (false)

namespace pear::cuda {

using std::max;
using std::min;

constexpr unsigned kFullWarp = 0xffffffffu;
constexpr int kWarp = emulator::kLanes;

struct uint4 {
  uint32_t x, y, z, w;
};
struct float2 {
  float x, y;
};

struct DeviceGuard {
  explicit DeviceGuard(c10::Device) {}
};

inline void __syncthreads() {
  emulator::Block* block = emulator::current->block;
  emulator::meet(block->meeting, block->size.x, [] {});
}
inline void __syncwarp() {
  emulator::Fiber* self = emulator::current;
  emulator::meet(self->block->warps[self->thread.x / emulator::kLanes].meeting, emulator::kLanes,
                 [] {});
}
inline void sync_grid() {
  emulator::Block* block = emulator::current->block;
  emulator::meet(block->meeting, block->size.x, [&] { block->all_blocks->arrive_and_wait(); });
}
inline void __threadfence() { std::atomic_thread_fence(std::memory_order_seq_cst); }
inline unsigned atomicAdd(unsigned* p, unsigned x) {
  return std::atomic_ref<unsigned>(*p).fetch_add(x);
}
inline void atomicOr(unsigned* p, unsigned x) { std::atomic_ref<unsigned>(*p).fetch_or(x); }

inline int lane() { return threadIdx.x % kWarp; }
template <typename T>
T __shfl_sync(unsigned, T x, int from) {
  return emulator::exchange(x, from);
}
template <typename T>
T __shfl_xor_sync(unsigned, T x, int bits) {
  return emulator::exchange(x, lane() ^ bits);
}
template <typename T>
T __shfl_down_sync(unsigned, T x, int by) {
  return emulator::exchange(x, lane() + by < kWarp ? lane() + by : lane());
}
inline unsigned __ballot_sync(unsigned mask, bool x) {
  unsigned bits = unsigned(x) << lane();
  for (int by = 1; by < kWarp; by *= 2) bits |= __shfl_xor_sync(mask, bits, by);
  return bits;
}
inline int __popc(unsigned x) { return std::popcount(x); }
inline int __ffs(unsigned x) { return x == 0 ? 0 : std::countr_zero(x) + 1; }

inline float __uint_as_float(uint32_t x) { return std::bit_cast<float>(x); }
inline uint32_t __float_as_uint(float x) { return std::bit_cast<uint32_t>(x); }
inline float exp2_approx(float x) { return exp2f(x); }

constexpr bool kPolynomialExponentials = true;  // beside the others, so that both are tested
inline float2 add(float2 a, float2 b) { return {a.x + b.x, a.y + b.y}; }
inline float2 multiply(float2 a, float2 b) { return {a.x * b.x, a.y * b.y}; }
inline float2 multiply_add(float2 a, float2 b, float2 c) {
  return {fmaf(a.x, b.x, c.x), fmaf(a.y, b.y, c.y)};
}

inline uint4 load_streaming(const uint4* p) {
  if (reinterpret_cast<uintptr_t>(p) % 16 != 0) throw std::runtime_error("misaligned address");
  return *p;
}
inline void store_streaming(uint4* p, uint4 v) {
  if (reinterpret_cast<uintptr_t>(p) % 16 != 0) throw std::runtime_error("misaligned address");
  *p = v;
}

template <typename T>
float2 unpack_pair(uint32_t word, T) {
  T pair[2];
  std::memcpy(pair, &word, sizeof word);
  return {static_cast<float>(pair[0]), static_cast<float>(pair[1])};
}
template <typename T>
uint32_t pack_pair(float2 x, T) {
  const T pair[2] = {static_cast<T>(x.x), static_cast<T>(x.y)};
  uint32_t word;
  std::memcpy(&word, pair, sizeof word);
  return word;
}

inline int multiprocessors() { return emulator::multiprocessor_count(); }

template <bool kCooperative = false, typename... Params, typename... Args>
void launch(void (*kernel)(Params...), int64_t blocks, int threads, Args&&... args) {
  const std::tuple<Params...> params(std::forward<Args>(args)...);
  std::barrier<> all_blocks(kCooperative ? blocks : 1);
  const auto run = [&](int64_t index) {
    emulator::Block block;
    block.index = {static_cast<unsigned>(index)};
    block.size = {static_cast<unsigned>(threads)};
    block.grid = {static_cast<unsigned>(blocks)};
    block.body = [&] { std::apply(kernel, params); };
    block.all_blocks = &all_blocks;
    block.run();
    if (kCooperative && block.error) all_blocks.arrive_and_drop();
    return block.error;
  };
  std::vector<std::exception_ptr> errors(blocks);
  if (kCooperative) {
    std::vector<std::jthread> running;
    for (int64_t b = 0; b < blocks; ++b) running.emplace_back([&, b] { errors[b] = run(b); });
  } else {
    for (int64_t b = 0; b < blocks; ++b) errors[b] = run(b);
  }
  for (const auto& error : errors) {
    if (error) std::rethrow_exception(error);
  }
}

}  // namespace pear::cuda
