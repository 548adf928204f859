// Vocab-parallel log-probabilities on CUDA. Both directions are bound by memory: of V columns of b
// bytes, forward moves V b per token (each logit read once; 12 bytes of statistics), backward 2 V b
// (read once, written once), in 16-byte accesses, kUnroll of them in flight per thread. Rows off
// the mask move nothing forward and V b backward. A top-k adds a sector of 32 bytes per entry to
// each direction, in the same launch.
#include <ATen/ops/empty.h>

#include "checks.h"
#include "cuda/device.h"
#include "cuda/exp2.h"
#include "cuda/vector.h"
#include "online_softmax.h"
#include "ops.h"
#include "topk_kl.h"

namespace pear::cuda {
namespace {

constexpr int kUnroll = 4;

// A block is one row of kThreads threads, or for a short row several of a warp each. 1024 threads a
// multiprocessor with kUnroll vectors each keep 64 KB in flight, twice what latency times bandwidth
// asks for (about 30 KB on Hopper), and leave 64 registers a thread.
template <int kThreads>
constexpr int kRowsPerBlock = kThreads == kWarp ? 4 : 1;
template <int kThreads>
constexpr int kBlock = kThreads * kRowsPerBlock<kThreads>;
template <int kThreads>
constexpr int kBlocksPerMultiprocessor = 1024 / kBlock<kThreads>;

template <int kThreads>
__device__ __forceinline__ int64_t row_index() {
  return int64_t(blockIdx.x) * kRowsPerBlock<kThreads> + threadIdx.x / kThreads;
}

#define PEAR_ROW_KERNEL \
  __global__ void __launch_bounds__(kBlock<kThreads>, kBlocksPerMultiprocessor<kThreads>)

// The subtraction comes first, and not fused with the scaling: near the maximum it is exact, while
// base * log2(e) rounds as coarsely as the logits are large.
__device__ __forceinline__ float exp_difference(float x, float base) {
  return exp2_approx((x - base) * kLog2e);
}

__device__ __forceinline__ SoftmaxPart of_lane(SoftmaxPart p, int bits) {
  return {__shfl_xor_sync(kFullWarp, p.max, bits), __shfl_xor_sync(kFullWarp, p.sum, bits)};
}
__device__ __forceinline__ EntropyPart of_lane(EntropyPart p, int bits) {
  return {__shfl_xor_sync(kFullWarp, p.max, bits), __shfl_xor_sync(kFullWarp, p.sum, bits),
          __shfl_xor_sync(kFullWarp, p.weighted, bits)};
}

template <bool kEntropy>
using RowPart = std::conditional_t<kEntropy, EntropyPart, SoftmaxPart>;

template <bool kEntropy>
__device__ __forceinline__ RowPart<kEntropy> row_part(SoftmaxPart part) {
  if constexpr (kEntropy) return with_entropy(part);
  if constexpr (!kEntropy) return part;
}

template <int kThreads, typename Part>
__device__ __forceinline__ Part merge_row(Part part) {
  const auto merge_warp = [](Part p) {
#pragma unroll
    for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) p = merge(p, of_lane(p, lanes));
    return p;
  };
  part = merge_warp(part);
  if constexpr (kThreads == kWarp) return part;
  constexpr int kWarps = kThreads / kWarp;
  __shared__ Part by_warp[kWarps];
  if (threadIdx.x % kWarp == 0) by_warp[threadIdx.x / kWarp] = part;
  __syncthreads();
  if (threadIdx.x >= kWarp) return part;
  constexpr bool kEntropy = std::is_same_v<Part, EntropyPart>;
  return merge_warp(threadIdx.x < kWarps ? by_warp[threadIdx.x] : row_part<kEntropy>(no_columns()));
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

// Where the statistics go, and the top-k whose logits are among them (k = 0: none).
struct StatisticsOut {
  float* first;
  int64_t token, statistic;
  const int32_t* topk_ids;
  int k;
};

template <typename T, int kThreads, bool kEntropy>
PEAR_ROW_KERNEL forward_rows(const T* logits, int64_t stride, int64_t rows, VocabShard shard,
                             int64_t vocab_size, const int64_t* targets, const bool* mask,
                             StatisticsOut stats) {
  constexpr int kColumns = kPerVector<T>;
  const int i = threadIdx.x % kThreads;
  const int64_t t = row_index<kThreads>();
  if (t >= rows) return;
  float* out = stats.first + t * stats.token;
  float *row_max = out + kRowMax * stats.statistic, *row_sum = out + kRowSumExp * stats.statistic;
  float* target_logit = out + kTargetLogit * stats.statistic;
  float* entries = out + (kLogprobStatistics + kEntropy) * stats.statistic;
  if (mask && !mask[t]) {
    if (i == 0) {
      *row_max = kNegativeInfinity;
      *row_sum = *target_logit = 0.0f;
      if constexpr (kEntropy) out[kRowEntropySum * stats.statistic] = 0.0f;
    }
    for (int j = i; j < stats.k; j += kThreads) entries[j * stats.statistic] = 0.0f;
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
  for (int j = i; j < stats.k; j += kThreads) {
    const int64_t id = stats.topk_ids[t * stats.k + j], column = id - shard.start;
    const bool here = id >= 0 && 0 <= column && column < columns;
    entries[j * stats.statistic] = here ? static_cast<float>(row[column]) : kNegativeInfinity;
  }

  const RowSplit split = split_row(row, columns);
  const uint4* body = reinterpret_cast<const uint4*>(row + split.head);
  float single = kNegativeInfinity;  // head and tail are fewer than the threads
  if (i < split.head + split.tail) single = row[single_column(split, columns, i)];

  RowPart<kEntropy> part = row_part<kEntropy>(no_columns());
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
    // Two chains of additions.
    float2 sum = {part.sum * exp_difference(part.max, base), 0.0f}, weighted = {0.0f, 0.0f};
    if constexpr (kEntropy) {
      const float less = finite_exponent(part.max - base);
      weighted.x = (part.weighted + less * part.sum) * exp_difference(part.max, base);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (v + u * kThreads >= split.vectors) break;
      unpack(raw[u], x, T(0.0f));
#pragma unroll
      for (int c = 0; c < kColumns; c += 2) {
        const float2 less = add({x[c], x[c + 1]}, both(-base));
        const float2 e = exp2_pair(multiply(less, both(kLog2e)), (u * kColumns + c) / 2);
        sum = add(sum, e);
        if constexpr (kEntropy) {
          weighted = multiply_add({finite_exponent(less.x), finite_exponent(less.y)}, e, weighted);
        }
      }
    }
    if constexpr (kEntropy) {
      part = {max, sum.x + sum.y, weighted.x + weighted.y};
    } else {
      part = {max, sum.x + sum.y};
    }
  }
  part = merge_row<kThreads>(merge(part, row_part<kEntropy>(one_column(single))));
  if (i == 0) {
    *row_max = part.max;
    *row_sum = part.sum;
    if constexpr (kEntropy) out[kRowEntropySum * stats.statistic] = part.weighted;
  }
}

__global__ void __launch_bounds__(256)
    combine_tokens(const float* stats, int64_t ranks, int64_t T, const bool* mask, float* logprob,
                   Normalizer* normalizers) {
  const int64_t t = int64_t(blockIdx.x) * 256 + threadIdx.x;
  if (t >= T) return;
  Logprob out = {};
  if (!mask || mask[t]) out = combine_ranks(stats, ranks, T, t);
  logprob[t] = out.logprob;
  normalizers[t] = out.normalizer;
}

// What the KL adds to a backward pass.
struct TopkGradient {
  int k;
  const int32_t* ids;
  const float *logprobs, *log_pi, *terms, *grad;

  __device__ __forceinline__ float outside(int64_t t) const {
    return grad[t] * terms[t * kKlTerms + kOutsideFactor];
  }
};

template <int kThreads>
__device__ __forceinline__ void sync_row() {
  if constexpr (kThreads == kWarp) {
    __syncwarp();
  } else {
    __syncthreads();
  }
}

// x may be y: a thread reads what it writes, before it writes it.
template <typename T, int kThreads, bool kTopk>
PEAR_ROW_KERNEL backward_rows(const T* x, int64_t x_stride, T* y, int64_t y_stride, int64_t rows,
                              int V, VocabShard shard, const int64_t* targets, const bool* mask,
                              const Normalizer* normalizers, const float* grad, TopkGradient topk) {
  constexpr int kColumns = kPerVector<T>;
  const int i = threadIdx.x % kThreads;
  const int64_t t = row_index<kThreads>();
  if (t >= rows) return;
  const T* in = x + t * x_stride;
  T* out = y + t * y_stride;
  if (mask && !mask[t]) return zero_columns(out, 0, V, i, kThreads);

  const int columns = static_cast<int>(shard.columns);
  const int64_t shifted = targets[t] - shard.start;
  const int target = 0 <= shifted && shifted < columns ? static_cast<int>(shifted) : -1;
  const float scale = kTopk ? topk.outside(t) - grad[t] : -grad[t];
  const float max = normalizers[t].max, log2_sum = normalizers[t].log_sum * kLog2e;
  const auto gradient = [&](float logit) {
    return scale * exp2_approx(fmaf(logit - max, kLog2e, -log2_sum));
  };
  // Vectors need rows of the same alignment; others (a slice into a new tensor) go one by one.
  RowSplit split = split_row(out, columns);
  if (misaligned_by(in) != misaligned_by(out)) split = {columns, 0, 0};
  // The target's column is written twice, by one thread, the second time rightly: asking every
  // vector whether it holds the target would double the loop's instructions.
  const bool has_target = target >= 0 && i == column_thread<T>(split, columns, target, kThreads);
  const float target_logit = has_target ? static_cast<float>(in[target]) : 0.0f;

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
      store_streaming(out_body + at, pack(g, T(0.0f)));
    }
  }
  for (int k = i; k < split.head + split.tail; k += kThreads) {
    const int column = single_column(split, columns, k);
    out[column] = static_cast<T>(gradient(in[column]));
  }
  zero_columns(out, columns, V, i, kThreads);
  const int64_t row = row_index<kThreads>();  // made and read again: kept, registers would spill
  if (has_target) {
    const float logprob = normalizers[row].logprob(target_logit);
    const float of_kl = kTopk ? topk.outside(row) * expf(logprob) : 0.0f;
    y[row * y_stride + targets[row] - shard.start] =
        static_cast<T>(of_kl - grad[row] * expm1f(logprob));
  }
  if constexpr (kTopk) {
    sync_row<kThreads>();  // their columns are written by other threads before
    const float log_mass = topk.terms[row * kKlTerms + kLogMass];
    for (int j = i; j < topk.k; j += kThreads) {
      const int64_t at = row * topk.k + j, id = topk.ids[at], column = id - shard.start;
      if (id < 0 || column < 0 || column >= shard.columns) continue;
      const float q = expf(topk.logprobs[at] - log_mass);
      y[row * y_stride + column] = static_cast<T>(
          entry_gradient(topk.log_pi[at], q, grad[row], topk.grad[row], id == targets[row]));
    }
  }
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

void run_forward(const Tensor& logits, const Tensor& target, const OptionalTensor& mask,
                 int64_t vocab_start, int64_t vocab_size, bool entropy, StatisticsOut out) {
  const auto shard = vocab_shard(logits.size(1), vocab_start, vocab_size);
  const int64_t rows = logits.size(0);
  if (rows == 0) return;
  for_logits_dtype(logits, [&](auto zero) {
    using T = decltype(zero);
    for_row_threads<T>(shard.columns, [&](auto threads) {
      constexpr int kThreads = threads();
      constexpr int kRows = kRowsPerBlock<kThreads>;
      const auto kernel =
          entropy ? forward_rows<T, kThreads, true> : forward_rows<T, kThreads, false>;
      launch(kernel, (rows + kRows - 1) / kRows, kBlock<kThreads>, logits.const_data_ptr<T>(),
             logits.stride(0), rows, shard, vocab_size, target.const_data_ptr<int64_t>(),
             mask_data(mask), out);
    });
  });
}

void run_backward(const Tensor& logits, Tensor& out, const Tensor& target,
                  const OptionalTensor& mask, const Tensor& normalizer, const Tensor& grad,
                  VocabShard shard, const TopkGradient& topk = {}) {
  const int64_t rows = logits.size(0), V = logits.size(1);
  if (rows == 0) return;
  for_logits_dtype(logits, [&](auto zero) {
    using T = decltype(zero);
    for_row_threads<T>(V, [&](auto threads) {
      constexpr int kThreads = threads();
      constexpr int kRows = kRowsPerBlock<kThreads>;
      const auto kernel =
          topk.k ? backward_rows<T, kThreads, true> : backward_rows<T, kThreads, false>;
      launch(kernel, (rows + kRows - 1) / kRows, kBlock<kThreads>, logits.const_data_ptr<T>(),
             logits.stride(0), out.mutable_data_ptr<T>(), out.stride(0), rows, static_cast<int>(V),
             shard, target.const_data_ptr<int64_t>(), mask_data(mask),
             const_normalizers(normalizer), grad.const_data_ptr<float>(), topk);
    });
  });
}

TopkGradient topk_gradient(const Tensor& logits, const Tensor& ids, const Tensor& logprobs,
                           const Tensor& log_pi, const Tensor& terms, const Tensor& grad) {
  const int64_t k = check_topk_gradient(logits, ids, logprobs, log_pi, terms, grad);
  return {static_cast<int>(k),
          ids.const_data_ptr<int32_t>(),
          logprobs.const_data_ptr<float>(),
          log_pi.const_data_ptr<float>(),
          terms.const_data_ptr<float>(),
          grad.const_data_ptr<float>()};
}

VocabShard check_backward(const Tensor& logits, const Tensor& target, const OptionalTensor& mask,
                          const Tensor& normalizer, const Tensor& grad, int64_t vocab_start,
                          int64_t vocab_size) {
  check_logits(logits, target, mask);
  check_columns(logits);
  check_normalizer(normalizer, logits.size(0));
  check_same_device(normalizer, "normalizer", logits);
  check_vector(grad, "grad", logits.size(0), at::kFloat);
  check_same_device(grad, "grad", logits);
  return vocab_shard(logits.size(1), vocab_start, vocab_size);
}

}  // namespace

Tensor logprob_forward(const Tensor& logits, const Tensor& target, const OptionalTensor& mask,
                       int64_t vocab_start, int64_t vocab_size) {
  check_logits(logits, target, mask);
  check_columns(logits);
  const DeviceGuard guard(logits.device());
  const int64_t rows = logits.size(0);
  Tensor stats = at::empty({kLogprobStatistics, rows}, logits.options().dtype(at::kFloat));
  run_forward(logits, target, mask, vocab_start, vocab_size, false,
              {stats.mutable_data_ptr<float>(), 1, rows, nullptr, 0});
  return stats;
}

Tensor statistics_forward(const Tensor& logits, const Tensor& target, const OptionalTensor& mask,
                          const OptionalTensor& topk_ids, int64_t vocab_start, int64_t vocab_size,
                          bool entropy) {
  check_logits(logits, target, mask);
  check_columns(logits);
  const DeviceGuard guard(logits.device());
  const int64_t rows = logits.size(0), k = check_topk_ids(topk_ids, rows, logits);
  const int64_t width = kLogprobStatistics + entropy + k;
  Tensor stats = at::empty({rows, width}, logits.options().dtype(at::kFloat));
  run_forward(logits, target, mask, vocab_start, vocab_size, entropy,
              {stats.mutable_data_ptr<float>(), width, 1,
               k ? topk_ids->const_data_ptr<int32_t>() : nullptr, static_cast<int>(k)});
  return stats;
}

std::tuple<Tensor, Tensor> logprob_combine(const Tensor& stats, const OptionalTensor& mask) {
  check_stats(stats);
  const int64_t ranks = stats.size(0), T = stats.size(2);
  check_mask(mask, T, stats);
  const DeviceGuard guard(stats.device());
  Tensor logprob = at::empty({T}, stats.options());
  Tensor normalizer = at::empty({T, 2}, stats.options());
  if (T > 0) {
    launch(combine_tokens, (T + 255) / 256, 256, stats.const_data_ptr<float>(), ranks, T,
           mask_data(mask), logprob.mutable_data_ptr<float>(), mutable_normalizers(normalizer));
  }
  return {logprob, normalizer};
}

Tensor logprob_backward(const Tensor& logits, const Tensor& target, const OptionalTensor& mask,
                        const Tensor& normalizer, const Tensor& grad, int64_t vocab_start,
                        int64_t vocab_size) {
  const auto shard =
      check_backward(logits, target, mask, normalizer, grad, vocab_start, vocab_size);
  const DeviceGuard guard(logits.device());
  Tensor out = at::empty(logits.sizes(), logits.options());
  run_backward(logits, out, target, mask, normalizer, grad, shard);
  return out;
}

void logprob_backward_(Tensor& logits, const Tensor& target, const OptionalTensor& mask,
                       const Tensor& normalizer, const Tensor& grad, int64_t vocab_start,
                       int64_t vocab_size) {
  const auto shard =
      check_backward(logits, target, mask, normalizer, grad, vocab_start, vocab_size);
  const DeviceGuard guard(logits.device());
  run_backward(logits, logits, target, mask, normalizer, grad, shard);
}

Tensor topk_kl_backward(const Tensor& logits, const Tensor& target, const OptionalTensor& mask,
                        const Tensor& normalizer, const Tensor& grad, const Tensor& topk_ids,
                        const Tensor& topk_logprobs, const Tensor& topk_log_pi,
                        const Tensor& kl_terms, const Tensor& kl_grad, int64_t vocab_start,
                        int64_t vocab_size) {
  const auto shard =
      check_backward(logits, target, mask, normalizer, grad, vocab_start, vocab_size);
  const auto topk = topk_gradient(logits, topk_ids, topk_logprobs, topk_log_pi, kl_terms, kl_grad);
  const DeviceGuard guard(logits.device());
  Tensor out = at::empty(logits.sizes(), logits.options());
  run_backward(logits, out, target, mask, normalizer, grad, shard, topk);
  return out;
}

void topk_kl_backward_(Tensor& logits, const Tensor& target, const OptionalTensor& mask,
                       const Tensor& normalizer, const Tensor& grad, const Tensor& topk_ids,
                       const Tensor& topk_logprobs, const Tensor& topk_log_pi,
                       const Tensor& kl_terms, const Tensor& kl_grad, int64_t vocab_start,
                       int64_t vocab_size) {
  const auto shard =
      check_backward(logits, target, mask, normalizer, grad, vocab_start, vocab_size);
  const auto topk = topk_gradient(logits, topk_ids, topk_logprobs, topk_log_pi, kl_terms, kl_grad);
  const DeviceGuard guard(logits.device());
  run_backward(logits, logits, target, mask, normalizer, grad, shard, topk);
}

}  // namespace pear::cuda
