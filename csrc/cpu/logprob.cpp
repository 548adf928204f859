// Vocab-parallel log-probabilities on CPU: threads over rows, vectors over columns.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>

#include "checks.h"
#include "cpu/simd.h"
#include "online_softmax.h"
#include "ops.h"

namespace pear::cpu {
namespace {

#define PEAR_LANES 4
namespace baseline {
#include "cpu/logprob_kernel.inl"
}
#undef PEAR_LANES

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#define PEAR_LANES 8
namespace avx2 {
#include "cpu/logprob_kernel.inl"
}
#undef PEAR_LANES
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,fma")
#define PEAR_LANES 16
namespace avx512 {
#include "cpu/logprob_kernel.inl"
}
#undef PEAR_LANES
#pragma GCC pop_options
#endif

template <typename T>
struct RowKernels {
  void (*max_and_sum_exp)(const T*, int64_t, float*, float*);
  void (*scaled_softmax)(const T*, T*, int64_t, float, float);
};

template <typename T>
RowKernels<T> row_kernels() {
#if defined(__x86_64__)
  switch (detect_instruction_set()) {
    case InstructionSet::kAvx512:
      return {avx512::row_max_and_sum_exp<T>, avx512::scaled_softmax_row<T>};
    case InstructionSet::kAvx2:
      return {avx2::row_max_and_sum_exp<T>, avx2::scaled_softmax_row<T>};
    default:
      break;
  }
#endif
  return {baseline::row_max_and_sum_exp<T>, baseline::scaled_softmax_row<T>};
}

// Rows a thread takes at once: at least 64 k logits.
int64_t row_grain(int64_t V) { return std::max<int64_t>(1, 65536 / std::max<int64_t>(V, 1)); }

const bool* mask_data(const OptionalTensor& mask) {
  return mask ? mask->const_data_ptr<bool>() : nullptr;
}

template <typename T>
void backward_rows(const Tensor& logits, Tensor& out, const Tensor& target,
                   const OptionalTensor& mask, const Tensor& lse, const Tensor& grad,
                   VocabShard shard) {
  const auto kernels = row_kernels<T>();
  const T* x = logits.const_data_ptr<T>();
  T* y = out.mutable_data_ptr<T>();
  const int64_t V = logits.size(1), x_stride = logits.stride(0), y_stride = out.stride(0);
  const int64_t* targets = target.const_data_ptr<int64_t>();
  const bool* wanted = mask_data(mask);
  const float* lses = lse.const_data_ptr<float>();
  const float* grads = grad.const_data_ptr<float>();
  at::parallel_for(0, logits.size(0), row_grain(V), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const T* row = x + t * x_stride;
      T* out_row = y + t * y_stride;
      if (wanted && !wanted[t]) {
        std::fill(out_row, out_row + V, T(0));
        continue;
      }
      const int64_t column = targets[t] - shard.start;
      const bool here = 0 <= column && column < shard.columns;
      const float target_logit = here ? static_cast<float>(row[column]) : 0.0f;
      kernels.scaled_softmax(row, out_row, shard.columns, lses[t], -grads[t]);
      std::fill(out_row + shard.columns, out_row + V, T(0));
      if (here) out_row[column] = static_cast<T>(-grads[t] * std::expm1(target_logit - lses[t]));
    }
  });
}

void check_backward(const Tensor& logits, const Tensor& target, const OptionalTensor& mask,
                    const Tensor& lse, const Tensor& grad) {
  check_logits(logits, target, mask);
  check_vector(lse, "lse", logits.size(0), at::kFloat);
  check_vector(grad, "grad", logits.size(0), at::kFloat);
}

void run_backward(const Tensor& logits, Tensor& out, const Tensor& target,
                  const OptionalTensor& mask, const Tensor& lse, const Tensor& grad,
                  VocabShard shard) {
  for_logits_dtype(logits, [&](auto zero) {
    backward_rows<decltype(zero)>(logits, out, target, mask, lse, grad, shard);
  });
}

template <typename T>
void forward_rows(const Tensor& logits, const Tensor& target, const OptionalTensor& mask,
                  VocabShard shard, int64_t vocab_size, Tensor& stats) {
  const auto kernels = row_kernels<T>();
  const T* x = logits.const_data_ptr<T>();
  const int64_t rows = logits.size(0), stride = logits.stride(0);
  const int64_t* targets = target.const_data_ptr<int64_t>();
  const bool* wanted = mask_data(mask);
  float* row_max = stats.mutable_data_ptr<float>() + kRowMax * rows;
  float* row_sum = stats.mutable_data_ptr<float>() + kRowSumExp * rows;
  float* target_logit = stats.mutable_data_ptr<float>() + kTargetLogit * rows;
  constexpr float inf = std::numeric_limits<float>::infinity();
  std::atomic<int64_t> bad_row{rows};
  at::parallel_for(0, rows, row_grain(logits.size(1)), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      if (wanted && !wanted[t]) {
        row_max[t] = -inf;
        row_sum[t] = 0.0f;
        target_logit[t] = 0.0f;
        continue;
      }
      if (targets[t] < 0 || targets[t] >= vocab_size) {
        for (int64_t seen = bad_row; t < seen && !bad_row.compare_exchange_weak(seen, t);) {
        }
        continue;
      }
      const int64_t column = targets[t] - shard.start;
      kernels.max_and_sum_exp(x + t * stride, shard.columns, row_max + t, row_sum + t);
      const bool here = 0 <= column && column < shard.columns;
      target_logit[t] = here ? static_cast<float>(x[t * stride + column]) : -inf;
    }
  });
  TORCH_CHECK_INDEX(bad_row == rows, "target ", targets[bad_row], " at token ", bad_row.load(),
                    " is outside the vocabulary of ", vocab_size,
                    "; mask out tokens that are not to be scored");
}

}  // namespace

Tensor logprob_forward(const Tensor& logits, const Tensor& target, const OptionalTensor& mask,
                       int64_t vocab_start, int64_t vocab_size) {
  check_logits(logits, target, mask);
  const auto shard = vocab_shard(logits.size(1), vocab_start, vocab_size);
  Tensor stats =
      at::empty({kLogprobStatistics, logits.size(0)}, logits.options().dtype(at::kFloat));
  for_logits_dtype(logits, [&](auto zero) {
    forward_rows<decltype(zero)>(logits, target, mask, shard, vocab_size, stats);
  });
  return stats;
}

std::tuple<Tensor, Tensor> logprob_combine(const Tensor& stats, const OptionalTensor& mask) {
  check_stats(stats);
  const int64_t ranks = stats.size(0), T = stats.size(2);
  check_mask(mask, T, stats);
  Tensor logprob = at::empty({T}, stats.options()), lse = at::empty({T}, stats.options());
  const float* in = stats.const_data_ptr<float>();
  const bool* wanted = mask_data(mask);
  float *lp = logprob.mutable_data_ptr<float>(), *out_lse = lse.mutable_data_ptr<float>();
  at::parallel_for(0, T, 4096, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      Logprob token = {0.0f, 0.0f};
      if (!wanted || wanted[t]) token = combine_ranks(in, ranks, T, t);
      lp[t] = token.logprob;
      out_lse[t] = token.lse;
    }
  });
  return {logprob, lse};
}

Tensor logprob_backward(const Tensor& logits, const Tensor& target, const OptionalTensor& mask,
                        const Tensor& lse, const Tensor& grad, int64_t vocab_start,
                        int64_t vocab_size) {
  check_backward(logits, target, mask, lse, grad);
  Tensor out = at::empty(logits.sizes(), logits.options());
  run_backward(logits, out, target, mask, lse, grad,
               vocab_shard(logits.size(1), vocab_start, vocab_size));
  return out;
}

void logprob_backward_(Tensor& logits, const Tensor& target, const OptionalTensor& mask,
                       const Tensor& lse, const Tensor& grad, int64_t vocab_start,
                       int64_t vocab_size) {
  check_backward(logits, target, mask, lse, grad);
  run_backward(logits, logits, target, mask, lse, grad,
               vocab_shard(logits.size(1), vocab_start, vocab_size));
}

}  // namespace pear::cpu
