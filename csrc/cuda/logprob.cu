// Vocab-parallel log-probabilities on CUDA. Both directions are bound by memory: of V columns of b
// bytes, forward moves V b per token (each logit read once; 12 bytes of statistics), backward 2 V b
// (read once, written once), in 16-byte accesses, kUnroll of them in flight per thread. Rows off
// the mask move nothing forward and V b backward.
#include <ATen/ops/empty.h>

#include "checks.h"
#include "cuda/device.h"
#include "cuda/vector.h"
#include "online_softmax.h"
#include "ops.h"

namespace pear::cuda {
namespace {

constexpr int kUnroll = 4;
constexpr float kLog2e = 1.44269504088896341f;

// A block is one row of kThreads threads, or for a short row several of a warp each. 1024 threads a
// multiprocessor with kUnroll vectors each keep 64 KB in flight, twice what latency times bandwidth
// asks for (about 30 KB on Hopper), and leave 64 registers a thread.
template <int kThreads>
constexpr int kRowsPerBlock = kThreads == kWarp ? 4 : 1;
template <int kThreads>
constexpr int kBlock = kThreads * kRowsPerBlock<kThreads>;
template <int kThreads>
constexpr int kBlocksPerMultiprocessor = 1024 / kBlock<kThreads>;

#define PEAR_ROW_KERNEL \
  __global__ void __launch_bounds__(kBlock<kThreads>, kBlocksPerMultiprocessor<kThreads>)

// The subtraction comes first, and not fused with the scaling: near the maximum it is exact, while
// base * log2(e) rounds as coarsely as the logits are large.
__device__ __forceinline__ float exp_difference(float x, float base) {
  return exp2_approx((x - base) * kLog2e);
}

template <int kThreads>
__device__ __forceinline__ SoftmaxPart merge_row(SoftmaxPart part) {
  const auto merge_warp = [](SoftmaxPart p) {
#pragma unroll
    for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
      p = merge(p, SoftmaxPart{__shfl_xor_sync(kFullWarp, p.max, lanes),
                               __shfl_xor_sync(kFullWarp, p.sum, lanes)});
    }
    return p;
  };
  part = merge_warp(part);
  if constexpr (kThreads == kWarp) return part;
  constexpr int kWarps = kThreads / kWarp;
  __shared__ SoftmaxPart by_warp[kWarps];
  if (threadIdx.x % kWarp == 0) by_warp[threadIdx.x / kWarp] = part;
  __syncthreads();
  if (threadIdx.x >= kWarp) return part;
  return merge_warp(threadIdx.x < kWarps ? by_warp[threadIdx.x] : no_columns());
}

// -inf in every place: adds nothing to a maximum.
__device__ __forceinline__ uint4 nothing(float) {
  return {0xff800000u, 0xff800000u, 0xff800000u, 0xff800000u};
}
__device__ __forceinline__ uint4 nothing(c10::BFloat16) {
  return {0xff80ff80u, 0xff80ff80u, 0xff80ff80u, 0xff80ff80u};
}
__device__ __forceinline__ uint4 nothing(c10::Half) {
  return {0xfc00fc00u, 0xfc00fc00u, 0xfc00fc00u, 0xfc00fc00u};
}

template <typename T, int kThreads>
PEAR_ROW_KERNEL forward_rows(const T* logits, int64_t stride, int64_t rows, VocabShard shard,
                             int64_t vocab_size, const int64_t* targets, const bool* mask,
                             float* stats) {
  constexpr int kColumns = kPerVector<T>;
  const int i = threadIdx.x % kThreads;
  const int64_t t = int64_t(blockIdx.x) * kRowsPerBlock<kThreads> + threadIdx.x / kThreads;
  if (t >= rows) return;
  float *row_max = stats + kRowMax * rows + t, *row_sum = stats + kRowSumExp * rows + t;
  float* target_logit = stats + kTargetLogit * rows + t;
  if (mask && !mask[t]) {
    if (i == 0) {
      *row_max = kNegativeInfinity;
      *row_sum = *target_logit = 0.0f;
    }
    return;
  }

  const T* row = logits + t * stride;
  const int columns = static_cast<int>(shard.columns);
  if (i == 0) {
    const int64_t target = targets[t], column = target - shard.start;
    CUDA_KERNEL_ASSERT(0 <= target && target < vocab_size && "a target is outside the vocabulary");
    const bool here = 0 <= column && column < columns;
    *target_logit = here ? static_cast<float>(row[column]) : kNegativeInfinity;
  }

  const RowSplit split = split_row(row, columns);
  const uint4* body = reinterpret_cast<const uint4*>(row + split.head);
  float single = kNegativeInfinity;  // head and tail are fewer than the threads
  if (i < split.head + split.tail) single = row[single_column(split, columns, i)];

  SoftmaxPart part = no_columns();
  for (int v = i; v < split.vectors; v += kUnroll * kThreads) {
    uint4 raw[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int at = v + u * kThreads;
      raw[u] = at < split.vectors ? load_streaming(body + at) : nothing(T(0.0f));
    }
    float max = part.max;
    float x[kColumns];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      unpack(raw[u], x, T(0.0f));
#pragma unroll
      for (int c = 0; c < kColumns; ++c) max = fmaxf(max, x[c]);
    }
    const float base = exponent_base(max);
    float sum = part.sum * exp_difference(part.max, base), other = 0.0f;  // two chains of additions
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (v + u * kThreads >= split.vectors) break;
      unpack(raw[u], x, T(0.0f));
#pragma unroll
      for (int c = 0; c < kColumns; c += 2) {
        sum += exp_difference(x[c], base);
        other += exp_difference(x[c + 1], base);
      }
    }
    part = {max, sum + other};
  }
  part = merge_row<kThreads>(merge(part, one_column(single)));
  if (i == 0) {
    *row_max = part.max;
    *row_sum = part.sum;
  }
}

__global__ void __launch_bounds__(256)
    combine_tokens(const float* stats, int64_t ranks, int64_t T, const bool* mask, float* logprob,
                   float* lse) {
  const int64_t t = int64_t(blockIdx.x) * 256 + threadIdx.x;
  if (t >= T) return;
  Logprob out = {0.0f, 0.0f};
  if (!mask || mask[t]) out = combine_ranks(stats, ranks, T, t);
  logprob[t] = out.logprob;
  lse[t] = out.lse;
}

// x may be y: a thread reads what it writes, before it writes it.
template <typename T, int kThreads>
PEAR_ROW_KERNEL backward_rows(const T* x, int64_t x_stride, T* y, int64_t y_stride, int64_t rows,
                              int V, VocabShard shard, const int64_t* targets, const bool* mask,
                              const float* lse, const float* grad) {
  constexpr int kColumns = kPerVector<T>;
  const int i = threadIdx.x % kThreads;
  const int64_t t = int64_t(blockIdx.x) * kRowsPerBlock<kThreads> + threadIdx.x / kThreads;
  if (t >= rows) return;
  const T* in = x + t * x_stride;
  T* out = y + t * y_stride;
  if (mask && !mask[t]) return zero_columns(out, 0, V, i, kThreads);

  const int columns = static_cast<int>(shard.columns);
  const int64_t shifted = targets[t] - shard.start;
  const int target = 0 <= shifted && shifted < columns ? static_cast<int>(shifted) : -1;
  const float row_lse = lse[t], scale = -grad[t];
  const auto gradient = [&](float logit) { return scale * exp_difference(logit, row_lse); };
  const auto target_gradient = [&](float logit) { return scale * expm1f(logit - row_lse); };

  // Vectors need rows of the same alignment; others (a slice into a new tensor) go one by one.
  RowSplit split = split_row(out, columns);
  if (misaligned_by(in) != misaligned_by(out)) split = {columns, 0, 0};
  const uint4* body = reinterpret_cast<const uint4*>(in + split.head);
  uint4* out_body = reinterpret_cast<uint4*>(out + split.head);
  for (int v = i; v < split.vectors; v += kUnroll * kThreads) {
    uint4 raw[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (v + u * kThreads < split.vectors) raw[u] = load_streaming(body + v + u * kThreads);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int at = v + u * kThreads;
      if (at >= split.vectors) break;
      float logit[kColumns], g[kColumns];
      unpack(raw[u], logit, T(0.0f));
#pragma unroll
      for (int c = 0; c < kColumns; ++c) g[c] = gradient(logit[c]);
      const int offset = target - split.head - at * kColumns;
      if (0 <= offset && offset < kColumns) {
        float target_logit = logit[0];  // by selection: an index would move the array to memory
#pragma unroll
        for (int c = 1; c < kColumns; ++c) target_logit = c == offset ? logit[c] : target_logit;
        const float at_target = target_gradient(target_logit);
#pragma unroll
        for (int c = 0; c < kColumns; ++c) g[c] = c == offset ? at_target : g[c];
      }
      store_streaming(out_body + at, pack(g, T(0.0f)));
    }
  }
  for (int k = i; k < split.head + split.tail; k += kThreads) {
    const int column = single_column(split, columns, k);
    const float logit = in[column];
    out[column] = static_cast<T>(column == target ? target_gradient(logit) : gradient(logit));
  }
  zero_columns(out, columns, V, i, kThreads);
}

// Calls f with the threads for a row of V columns, as a compile-time constant. Long rows get large
// blocks: with few rows under way at a time, few are left over for the last wave.
template <typename T, typename F>
void for_row_threads(int64_t V, F&& f) {
  const int64_t vectors = V / kPerVector<T>;
  if (vectors <= 256) return f(std::integral_constant<int, kWarp>());
  if (vectors <= 4096) return f(std::integral_constant<int, 256>());
  return f(std::integral_constant<int, 512>());
}

void check_columns(const Tensor& logits) {
  TORCH_CHECK_VALUE(logits.size(1) < (int64_t(1) << 31), "logits have ", logits.size(1),
                    " columns; at most 2^31 - 1 are supported");
}

const bool* mask_data(const OptionalTensor& mask) {
  return mask ? mask->const_data_ptr<bool>() : nullptr;
}

void run_backward(const Tensor& logits, Tensor& out, const Tensor& target,
                  const OptionalTensor& mask, const Tensor& lse, const Tensor& grad,
                  VocabShard shard) {
  const int64_t rows = logits.size(0), V = logits.size(1);
  if (rows == 0) return;
  for_logits_dtype(logits, [&](auto zero) {
    using T = decltype(zero);
    for_row_threads<T>(V, [&](auto threads) {
      constexpr int kThreads = threads();
      constexpr int kRows = kRowsPerBlock<kThreads>;
      launch(backward_rows<T, kThreads>, (rows + kRows - 1) / kRows, kBlock<kThreads>,
             logits.const_data_ptr<T>(), logits.stride(0), out.mutable_data_ptr<T>(), out.stride(0),
             rows, static_cast<int>(V), shard, target.const_data_ptr<int64_t>(), mask_data(mask),
             lse.const_data_ptr<float>(), grad.const_data_ptr<float>());
    });
  });
}

VocabShard check_backward(const Tensor& logits, const Tensor& target, const OptionalTensor& mask,
                          const Tensor& lse, const Tensor& grad, int64_t vocab_start,
                          int64_t vocab_size) {
  check_logits(logits, target, mask);
  check_columns(logits);
  for (const auto& [x, name] : {std::pair(&lse, "lse"), std::pair(&grad, "grad")}) {
    check_vector(*x, name, logits.size(0), at::kFloat);
    check_same_device(*x, name, logits);
  }
  return vocab_shard(logits.size(1), vocab_start, vocab_size);
}

}  // namespace

Tensor logprob_forward(const Tensor& logits, const Tensor& target, const OptionalTensor& mask,
                       int64_t vocab_start, int64_t vocab_size) {
  check_logits(logits, target, mask);
  check_columns(logits);
  const auto shard = vocab_shard(logits.size(1), vocab_start, vocab_size);
  const DeviceGuard guard(logits.device());
  const int64_t rows = logits.size(0);
  Tensor stats = at::empty({kLogprobStatistics, rows}, logits.options().dtype(at::kFloat));
  if (rows == 0) return stats;
  for_logits_dtype(logits, [&](auto zero) {
    using T = decltype(zero);
    for_row_threads<T>(shard.columns, [&](auto threads) {
      constexpr int kThreads = threads();
      constexpr int kRows = kRowsPerBlock<kThreads>;
      launch(forward_rows<T, kThreads>, (rows + kRows - 1) / kRows, kBlock<kThreads>,
             logits.const_data_ptr<T>(), logits.stride(0), rows, shard, vocab_size,
             target.const_data_ptr<int64_t>(), mask_data(mask), stats.mutable_data_ptr<float>());
    });
  });
  return stats;
}

std::tuple<Tensor, Tensor> logprob_combine(const Tensor& stats, const OptionalTensor& mask) {
  check_stats(stats);
  const int64_t ranks = stats.size(0), T = stats.size(2);
  check_mask(mask, T, stats);
  const DeviceGuard guard(stats.device());
  Tensor logprob = at::empty({T}, stats.options()), lse = at::empty({T}, stats.options());
  if (T > 0) {
    launch(combine_tokens, (T + 255) / 256, 256, stats.const_data_ptr<float>(), ranks, T,
           mask_data(mask), logprob.mutable_data_ptr<float>(), lse.mutable_data_ptr<float>());
  }
  return {logprob, lse};
}

Tensor logprob_backward(const Tensor& logits, const Tensor& target, const OptionalTensor& mask,
                        const Tensor& lse, const Tensor& grad, int64_t vocab_start,
                        int64_t vocab_size) {
  const auto shard = check_backward(logits, target, mask, lse, grad, vocab_start, vocab_size);
  const DeviceGuard guard(logits.device());
  Tensor out = at::empty(logits.sizes(), logits.options());
  run_backward(logits, out, target, mask, lse, grad, shard);
  return out;
}

void logprob_backward_(Tensor& logits, const Tensor& target, const OptionalTensor& mask,
                       const Tensor& lse, const Tensor& grad, int64_t vocab_start,
                       int64_t vocab_size) {
  const auto shard = check_backward(logits, target, mask, lse, grad, vocab_start, vocab_size);
  const DeviceGuard guard(logits.device());
  run_backward(logits, logits, target, mask, lse, grad, shard);
}

}  // namespace pear::cuda
