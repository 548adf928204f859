// Vocab-parallel log-probabilities on CUDA. Both directions are bound by memory: of V columns of b
// bytes, forward moves V b per token (each logit read once; 12 bytes of statistics), backward 2 V b
// (read once, written once), in 16-byte accesses, kUnroll of them in flight per thread. Rows off
// the mask move nothing forward and V b backward. A top-k adds a sector of 32 bytes per entry to
// each direction, in the same launch.
#include <ATen/ops/empty.h>

#include "checks.h"
#include "cuda/device.h"
#include "cuda/exp2.h"
#include "cuda/merge_warp.h"
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

template <int kThreads>
__device__ __forceinline__ void sync_row() {
  if constexpr (kThreads == kWarp) {
    __syncwarp();
  } else {
    __syncthreads();
  }
}

// The subtraction comes first, and not fused with the scaling: near the maximum it is exact, while
// base * log2(e) rounds as coarsely as the logits are large.
__device__ __forceinline__ float exp_difference(float x, float base) {
  return exp2_approx((x - base) * kLog2e);
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

// The top-k of a row.
struct TopkIds {
  const int32_t* ids;
  int k;
  VocabShard shard;

  __device__ __forceinline__ int column(int j) const {
    return static_cast<int>(shard.column(ids[j]));
  }

  // Calls visit(column) for some of the entries, the j-th where bit j % 32 is set.
  template <typename Visit>
  __device__ __forceinline__ void for_entries(uint32_t some, Visit&& visit) const {
    for (; some != 0; some &= some - 1) {
      for (int j = __ffs(some) - 1; j < k; j += 32) visit(column(j));
    }
  }
};

// Takes the top-k's columns out of a thread's kUnroll vectors, of which v is the first.
template <typename T, int kThreads>
__device__ __forceinline__ void without_topk(uint4 (&raw)[kUnroll], int v, const TopkIds& topk,
                                             uint32_t own, const RowSplit& split) {
  topk.for_entries(own, [&](int column) {
    const int in_body = column - split.head, ahead = in_body / kPerVector<T> - v;
    if (in_body < 0 || ahead & ~((kUnroll - 1) * kThreads)) return;  // in none of them
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (ahead == u * kThreads) raw[u] = without(raw[u], in_body % kPerVector<T>, T(0.0f));
    }
  });
}

template <typename T, int kThreads, bool kEntropy, bool kTopk>
PEAR_ROW_KERNEL forward_rows(const T* logits, int64_t stride, int64_t rows, VocabShard shard,
                             int64_t vocab_size, const int64_t* targets, const bool* mask,
                             const int32_t* topk_ids, int k, float* stats) {
  constexpr int kColumns = kPerVector<T>;
  const int i = threadIdx.x % kThreads;
  const int64_t t = row_index<kThreads>();
  if (t >= rows) return;
  constexpr int kFirstEntry = kTokenStatistics + kEntropy;
  const int width = kTopk ? kFirstEntry + k : kFirstEntry;
  float* out = stats + t * width;
  if (mask && !mask[t]) {
    for (int which = i; which < width; which += kThreads) {
      out[which] = which == kRowMax ? kNegativeInfinity : 0.0f;
    }
    return;
  }

  const T* row = logits + t * stride;
  const int columns = static_cast<int>(shard.columns);
  if (i == 0) {
    const int64_t target = targets[t], column = shard.column(target);
    CUDA_KERNEL_ASSERT(0 <= target && target < vocab_size && "a target is outside the vocabulary");
    out[kTargetLogit] = column < 0 ? kNegativeInfinity : static_cast<float>(row[column]);
  }

  const RowSplit split = split_row(row, columns);
  const uint4* body = reinterpret_cast<const uint4*>(row + split.head);
  float single = kNegativeInfinity;  // head and tail are fewer than the threads
  const int single_at = i < split.head + split.tail ? single_column(split, columns, i) : -1;
  if (single_at >= 0) single = row[single_at];

  const TopkIds topk = {topk_ids + t * k, k, shard};
  // Each thread's own entries, those of its columns, the j-th as bit j % 32. Were all k looked at
  // by every thread, instructions would bind, not memory (benchmarks/NOTES.md).
  __shared__ uint32_t own_entries[kBlock<kThreads>];
  uint32_t with_topk = 0;  // the turns of the loop that meet own entries, the n-th as bit n % 32
  if constexpr (kTopk) {
    own_entries[threadIdx.x] = 0;
    sync_row<kThreads>();
    for (int j = i; j < k; j += kThreads) {
      const int column = topk.column(j);
      out[kFirstEntry + j] = column < 0 ? kNegativeInfinity : static_cast<float>(row[column]);
      if (column < 0) continue;
      const int owner = column_thread<T>(split, columns, column, kThreads);
      atomicOr(&own_entries[threadIdx.x - i + owner], 1u << j % 32);
    }
    sync_row<kThreads>();
    topk.for_entries(own_entries[threadIdx.x], [&](int column) {
      const int in_body = column - split.head, vector = in_body / kColumns;
      if (column == single_at) single = kNegativeInfinity;
      if (in_body >= 0 && vector % kThreads == i) {
        with_topk |= 1u << vector / (kUnroll * kThreads) % 32;
      }
    });
  }

  RowPart<kEntropy> part = row_part<kEntropy>(no_columns());
  for (int v = i; v < split.vectors; v += kUnroll * kThreads) {
    uint4 raw[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int at = v + u * kThreads;
      raw[u] = at < split.vectors ? load_streaming(body + at) : nothing(T(0.0f));
    }
    if constexpr (kTopk) {
      if (with_topk >> v / (kUnroll * kThreads) % 32 & 1) {
        without_topk<T, kThreads>(raw, v, topk, own_entries[threadIdx.x], split);
      }
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
    out[kRowMax] = part.max;
    out[kRowSumExp] = part.sum;
    if constexpr (kEntropy) out[kRowEntropySum] = part.weighted;
  }
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
  const int target = static_cast<int>(shard.column(targets[t]));
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
      const int64_t at = row * topk.k + j, id = topk.ids[at], column = shard.column(id);
      if (column < 0) continue;
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

// Calls f with whether, as a compile-time constant.
template <typename F>
void for_bool(bool whether, F&& f) {
  if (whether) return f(std::true_type());
  return f(std::false_type());
}

void run_backward(const Tensor& logits, Tensor& out, PEAR_BACKWARD_PARAMETERS) {
  const int64_t rows = logits.size(0), V = logits.size(1);
  const auto shard = vocab_shard(V, vocab_start, vocab_size);
  if (rows == 0) return;
  TopkGradient topk = {};
  if (topk_ids) {
    topk = {static_cast<int>(topk_ids->size(1)),    topk_ids->const_data_ptr<int32_t>(),
            topk_logprobs->const_data_ptr<float>(), topk_log_pi->const_data_ptr<float>(),
            kl_terms->const_data_ptr<float>(),      kl_grad->const_data_ptr<float>()};
  }
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

}  // namespace

Tensor statistics_forward(const Tensor& logits, const Tensor& target, const OptionalTensor& mask,
                          int64_t vocab_start, int64_t vocab_size, const OptionalTensor& topk_ids,
                          bool entropy) {
  check_logits(logits, target, mask);
  check_columns(logits);
  const DeviceGuard guard(logits.device());
  const int64_t rows = logits.size(0), k = check_topk_ids(topk_ids, rows, logits);
  const auto shard = vocab_shard(logits.size(1), vocab_start, vocab_size);
  Tensor stats =
      at::empty({rows, kTokenStatistics + entropy + k}, logits.options().dtype(at::kFloat));
  if (rows == 0) return stats;
  for_logits_dtype(logits, [&](auto zero) {
    using T = decltype(zero);
    for_row_threads<T>(shard.columns, [&](auto threads) {
      for_bool(entropy, [&](auto entropies) {
        for_bool(k > 0, [&](auto topk) {
          constexpr int kThreads = threads();
          constexpr int kRows = kRowsPerBlock<kThreads>;
          launch(forward_rows<T, kThreads, entropies(), topk()>, (rows + kRows - 1) / kRows,
                 kBlock<kThreads>, logits.const_data_ptr<T>(), logits.stride(0), rows, shard,
                 vocab_size, target.const_data_ptr<int64_t>(), mask_data(mask),
                 k ? topk_ids->const_data_ptr<int32_t>() : nullptr, static_cast<int>(k),
                 stats.mutable_data_ptr<float>());
        });
      });
    });
  });
  return stats;
}

Tensor statistics_backward(const Tensor& logits, PEAR_BACKWARD_PARAMETERS) {
  check_backward(logits, PEAR_BACKWARD_ARGUMENTS);
  check_columns(logits);
  const DeviceGuard guard(logits.device());
  Tensor out = at::empty(logits.sizes(), logits.options());
  run_backward(logits, out, PEAR_BACKWARD_ARGUMENTS);
  return out;
}

void statistics_backward_(Tensor& logits, PEAR_BACKWARD_PARAMETERS) {
  check_backward(logits, PEAR_BACKWARD_ARGUMENTS);
  check_columns(logits);
  const DeviceGuard guard(logits.device());
  run_backward(logits, logits, PEAR_BACKWARD_ARGUMENTS);
}

}  // namespace pear::cuda
