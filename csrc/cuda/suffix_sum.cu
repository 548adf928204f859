// Segmented suffix sums on CUDA: one cooperative launch, sums in float64. Floor: 12 bytes per token
// (x is read twice, the second time mostly from cache; the sums are written once).
#include <ATen/ops/empty_like.h>

#include "cuda/chunk_warps.h"
#include "ops.h"

namespace pear::cuda {
namespace {

__device__ __forceinline__ double chunk_sum(const Chunk& chunk, const float* x) {
  double sum = 0.0;
  for_tokens_from_right(
      chunk, [&](int64_t t) { return x[t]; }, [&](int64_t, bool, float value) { sum += value; });
  return warp_sum(sum);
}

PEAR_CHUNK_KERNEL sum_segments(const float* x, ChunkLayout layout, double* totals, float* sums) {
  for_chunks(layout, [&](const Chunk& chunk) {
    const double sum = chunk_sum(chunk, x);
    if (lane_id() == 0) totals[chunk.id] = sum;
  });
  sync_grid();
  for_chunks(layout, [&](const Chunk& chunk) {
    if (chunk.id != chunk.first) return;
    const double sum = sum_chunks(chunk.first, chunk.last, [&](int64_t id) { return totals[id]; });
    if (lane_id() == 0) sums[chunk.segment] = static_cast<float>(sum);
  });
}

PEAR_CHUNK_KERNEL scan_segments(const float* x, ChunkLayout layout, const float* carry,
                                bool exclusive, double* totals, float* sums) {
  for_chunks(layout, [&](const Chunk& chunk) {
    const double sum = chunk_sum(chunk, x);
    if (lane_id() == 0) totals[chunk.id] = sum;
  });
  sync_grid();
  for_chunks(layout, [&](const Chunk& chunk) {
    double suffix = sum_chunks(chunk.id + 1, chunk.last, [&](int64_t id) { return totals[id]; });
    if (carry) suffix += carry[chunk.segment];
    for_tokens_from_right(
        chunk, [&](int64_t t) { return x[t]; },
        [&](int64_t t, bool inside, float value) {
          const double from_here = warp_suffix_sum(value);
          // Shifted, not "from here less x": an infinite x must not turn its own sum into NaN.
          double after = __shfl_down_sync(kFullWarp, from_here, 1);
          if (lane_id() == kWarp - 1) after = 0.0;
          if (inside) sums[t] = static_cast<float>(suffix + (exclusive ? after : from_here));
          suffix += __shfl_sync(kFullWarp, from_here, 0);
        });
  });
}

}  // namespace

Tensor segmented_suffix_sum(const Tensor& x, const Tensor& cu_seqlens, const OptionalTensor& carry,
                            bool exclusive) {
  check_vector(x, "x", x.numel(), at::kFloat);
  const ChunkLayout layout = chunk_layout(cu_seqlens, x);
  if (carry) {
    check_vector(*carry, "carry", layout.segments, at::kFloat);
    check_same_device(*carry, "carry", x);
  }
  const DeviceGuard guard(x.device());
  Tensor out = at::empty_like(x);
  const Scratch<double> totals(layout.chunks(), x);
  if (layout.segments > 0) {
    launch<true>(scan_segments, chunk_blocks(layout), kChunkThreads, x.const_data_ptr<float>(),
                 layout, carry ? carry->const_data_ptr<float>() : nullptr, exclusive, totals.data,
                 out.mutable_data_ptr<float>());
  }
  return out;
}

Tensor segment_sum(const Tensor& x, const Tensor& cu_seqlens) {
  check_vector(x, "x", x.numel(), at::kFloat);
  const ChunkLayout layout = chunk_layout(cu_seqlens, x);
  const DeviceGuard guard(x.device());
  Tensor out = at::empty({layout.segments}, x.options());
  const Scratch<double> totals(layout.chunks(), x);
  if (layout.segments > 0) {
    launch<true>(sum_segments, chunk_blocks(layout), kChunkThreads, x.const_data_ptr<float>(),
                 layout, totals.data, out.mutable_data_ptr<float>());
  }
  return out;
}

}  // namespace pear::cuda
