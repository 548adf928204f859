// Warps over the chunks of a pack: finding a chunk, sums over lanes and over a segment's chunks,
// and reading a chunk 32 tokens at a time from right to left. Every sum has one order, fixed by the
// shapes, so that results are the same bits run after run.
#pragma once

#include <ATen/ops/empty.h>

#include <algorithm>

#include "checks.h"
#include "chunks.h"
#include "cuda/device.h"

namespace pear::cuda {

constexpr int kChunkThreads = 128;  // four warps, each on a chunk of its own
constexpr int kChunkWarps = kChunkThreads / kWarp;
constexpr int kChunkBlocksPerMultiprocessor = 4;

// All blocks of a launch must be resident at once, as they wait for each other.
#define PEAR_CHUNK_KERNEL \
  __global__ void __launch_bounds__(kChunkThreads, kChunkBlocksPerMultiprocessor)

__device__ __forceinline__ int lane_id() { return threadIdx.x % kWarp; }

// The chunk of an id. Its segment is the last whose first chunk is at or before id, found 32 probes
// at a time: each round is one trip to memory.
__device__ __forceinline__ Chunk find_chunk(const ChunkLayout& layout, int64_t id) {
  int64_t low = 0, high = layout.segments;  // the segment is in [low, high)
  while (high - low > 1) {
    const int64_t step = (high - low + kWarp - 1) / kWarp, probe = low + lane_id() * step;
    const bool before = probe < high && layout.first_chunk(probe) <= id;
    const int found = max(__popc(__ballot_sync(kFullWarp, before)), 1);
    low += (found - 1) * step;
    high = low + step < high ? low + step : high;
  }
  CUDA_KERNEL_ASSERT(valid_segment(layout, low) &&
                     "cu_seqlens must start at 0, not decrease, and end at the number of tokens");
  return chunk_of_segment(layout, low, id);
}

// Calls visit(chunk) for this warp's share of the chunks: every id once, over the whole grid.
template <typename Visit>
__device__ __forceinline__ void for_chunks(const ChunkLayout& layout, Visit&& visit) {
  const int64_t warp = int64_t(blockIdx.x) * kChunkWarps + threadIdx.x / kWarp;
  const int64_t warps = int64_t(gridDim.x) * kChunkWarps, chunks = layout.chunks();
  for (int64_t id = warp; id < chunks; id += warps) visit(find_chunk(layout, id));
}

// Calls body(token, inside, load(token)) for every token of a chunk, right to left, 32 at a time:
// lanes are neighbouring tokens, and lanes outside the chunk get a default-made value. The loads of
// kTiles groups are issued together.
template <int kTiles = 4, typename Load, typename Body>
__device__ __forceinline__ void for_tokens_from_right(const Chunk& chunk, Load&& load,
                                                      Body&& body) {
  using Value = decltype(load(chunk.begin));
  const int64_t tiles = (chunk.length() + kWarp - 1) / kWarp;
  for (int64_t last = tiles; last > 0; last -= kTiles) {
    Value values[kTiles];
#pragma unroll
    for (int k = 0; k < kTiles; ++k) {
      const int64_t token = chunk.begin + (last - 1 - k) * kWarp + lane_id();
      values[k] = chunk.begin <= token && token < chunk.end ? load(token) : Value{};
    }
#pragma unroll
    for (int k = 0; k < kTiles; ++k) {
      if (last - 1 - k < 0) break;
      const int64_t token = chunk.begin + (last - 1 - k) * kWarp + lane_id();
      body(token, token < chunk.end, values[k]);
    }
  }
}

// The sum over lanes, in every lane.
template <typename T>
__device__ __forceinline__ T warp_sum(T x) {
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) x += __shfl_xor_sync(kFullWarp, x, lanes);
  return x;
}

// The sum of get(id) over chunks [begin, end), in every lane.
template <typename Get>
__device__ __forceinline__ auto sum_chunks(int64_t begin, int64_t end, Get&& get) {
  decltype(get(begin)) sum = 0;
#pragma unroll 4
  for (int64_t id = begin + lane_id(); id < end; id += kWarp) sum += get(id);
  return warp_sum(sum);
}

// Lane i's sum of x over lanes i and up.
__device__ __forceinline__ double warp_suffix_sum(double x) {
#pragma unroll
  for (int lanes = 1; lanes < kWarp; lanes *= 2) {
    const double right = __shfl_down_sync(kFullWarp, x, lanes);
    if (lane_id() + lanes < kWarp) x += right;
  }
  return x;
}

inline ChunkLayout chunk_layout(const Tensor& cu_seqlens, const Tensor& x) {
  check_cu_seqlens(cu_seqlens, x);
  const int64_t T = x.numel(), segments = cu_seqlens.size(0) - 1;
  TORCH_CHECK_VALUE(segments > 0 || T == 0, "cu_seqlens must end at the number of tokens ", T,
                    ", but it has no segments");
  return {cu_seqlens.const_data_ptr<int32_t>(), T, segments, log2_chunk_tokens(T)};
}

// A warp per chunk, as far as half of the device holds all blocks at once. The other half is for
// whoever else is at work: NCCL's blocks, of which some stay until a peer has come, can then not
// keep blocks of a grid apart that wait for each other (benchmarks/NOTES.md, Beside NCCL).
inline int64_t chunk_blocks(const ChunkLayout& layout) {
  const int64_t wanted = (layout.chunks() + kChunkWarps - 1) / kChunkWarps;
  const int64_t most = int64_t(multiprocessors()) * kChunkBlocksPerMultiprocessor / 2;
  return std::clamp<int64_t>(wanted, 1, most);
}

// Room for `count` values of T, from torch's caching allocator.
template <typename T>
struct Scratch {
  Tensor bytes;
  T* data;

  Scratch(int64_t count, const Tensor& like)
      : bytes(at::empty({count * int64_t(sizeof(T))}, like.options().dtype(at::kByte))),
        data(reinterpret_cast<T*>(bytes.mutable_data_ptr<uint8_t>())) {}
};

}  // namespace pear::cuda
