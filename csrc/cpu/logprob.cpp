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
#include "topk_kl.h"

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
  void (*sums)(const T*, int64_t, float*, float*, float*);
  void (*sums_and_entropy)(const T*, int64_t, float*, float*, float*);
  void (*scaled_softmax)(const T*, T*, int64_t, Normalizer, float);
};

template <typename T>
RowKernels<T> row_kernels() {
#if defined(__x86_64__)
  switch (detect_instruction_set()) {
    case InstructionSet::kAvx512:
      return {avx512::row_sums<false, T>, avx512::row_sums<true, T>, avx512::scaled_softmax_row<T>};
    case InstructionSet::kAvx2:
      return {avx2::row_sums<false, T>, avx2::row_sums<true, T>, avx2::scaled_softmax_row<T>};
    default:
      break;
  }
#endif
  return {baseline::row_sums<false, T>, baseline::row_sums<true, T>,
          baseline::scaled_softmax_row<T>};
}

// Rows a thread takes at once: at least 64 k logits.
int64_t row_grain(int64_t V) { return std::max<int64_t>(1, 65536 / std::max<int64_t>(V, 1)); }

const bool* mask_data(const OptionalTensor& mask) {
  return mask ? mask->const_data_ptr<bool>() : nullptr;
}

// What the KL adds to a backward pass; k = 0: nothing.
struct TopkGradient {
  int64_t k = 0;
  const int32_t* ids = nullptr;
  const float *logprobs = nullptr, *log_pi = nullptr, *terms = nullptr, *grad = nullptr;

  float outside(int64_t t) const { return k ? grad[t] * terms[t * kKlTerms + kOutsideFactor] : 0; }
  float q(int64_t t, int64_t j) const {
    return std::exp(logprobs[t * k + j] - terms[t * kKlTerms + kLogMass]);
  }
};

template <typename T>
void backward_rows(const Tensor& logits, Tensor& out, const Tensor& target,
                   const OptionalTensor& mask, const Tensor& normalizer, const Tensor& grad,
                   VocabShard shard, const TopkGradient& topk) {
  const auto kernels = row_kernels<T>();
  const T* x = logits.const_data_ptr<T>();
  T* y = out.mutable_data_ptr<T>();
  const int64_t V = logits.size(1), x_stride = logits.stride(0), y_stride = out.stride(0);
  const int64_t* targets = target.const_data_ptr<int64_t>();
  const bool* wanted = mask_data(mask);
  const Normalizer* normalizers = const_normalizers(normalizer);
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
      const float logprob = here ? normalizers[t].logprob(static_cast<float>(row[column])) : 0.0f;
      const float outside = topk.outside(t);
      kernels.scaled_softmax(row, out_row, shard.columns, normalizers[t],
                             topk.k ? outside - grads[t] : -grads[t]);
      std::fill(out_row + shard.columns, out_row + V, T(0));
      if (here) {
        const float of_logprob = -grads[t] * std::expm1(logprob);
        const float of_kl = topk.k ? outside * std::exp(logprob) : 0.0f;
        out_row[column] = static_cast<T>(of_logprob + of_kl);
      }
      for (int64_t j = 0; j < topk.k; ++j) {
        const int64_t id = topk.ids[t * topk.k + j], entry = id - shard.start;
        if (id < 0 || entry < 0 || entry >= shard.columns) continue;
        out_row[entry] = static_cast<T>(entry_gradient(topk.log_pi[t * topk.k + j], topk.q(t, j),
                                                       grads[t], topk.grad[t], id == targets[t]));
      }
    }
  });
}

void check_backward(const Tensor& logits, const Tensor& target, const OptionalTensor& mask,
                    const Tensor& normalizer, const Tensor& grad) {
  check_logits(logits, target, mask);
  check_normalizer(normalizer, logits.size(0));
  check_vector(grad, "grad", logits.size(0), at::kFloat);
}

void run_backward(const Tensor& logits, Tensor& out, const Tensor& target,
                  const OptionalTensor& mask, const Tensor& normalizer, const Tensor& grad,
                  VocabShard shard, const TopkGradient& topk = {}) {
  for_logits_dtype(logits, [&](auto zero) {
    backward_rows<decltype(zero)>(logits, out, target, mask, normalizer, grad, shard, topk);
  });
}

TopkGradient topk_gradient(const Tensor& logits, const Tensor& ids, const Tensor& logprobs,
                           const Tensor& log_pi, const Tensor& terms, const Tensor& grad) {
  const int64_t k = check_topk_gradient(logits, ids, logprobs, log_pi, terms, grad);
  return {k,
          ids.const_data_ptr<int32_t>(),
          logprobs.const_data_ptr<float>(),
          log_pi.const_data_ptr<float>(),
          terms.const_data_ptr<float>(),
          grad.const_data_ptr<float>()};
}

// Where the statistics go: which one of which token.
struct StatisticsOut {
  float* first;
  int64_t token, statistic;

  float* operator()(int64_t t, int64_t which) const {
    return first + t * token + which * statistic;
  }
};

template <typename T>
void forward_rows(const Tensor& logits, const Tensor& target, const OptionalTensor& mask,
                  const OptionalTensor& topk_ids, VocabShard shard, int64_t vocab_size,
                  bool entropy, StatisticsOut out) {
  const auto kernels = row_kernels<T>();
  const T* x = logits.const_data_ptr<T>();
  const int64_t rows = logits.size(0), stride = logits.stride(0);
  const int64_t* targets = target.const_data_ptr<int64_t>();
  const bool* wanted = mask_data(mask);
  const int64_t k = topk_ids ? topk_ids->size(1) : 0, first_entry = kLogprobStatistics + entropy;
  const int32_t* ids = topk_ids ? topk_ids->const_data_ptr<int32_t>() : nullptr;
  const auto sums = entropy ? kernels.sums_and_entropy : kernels.sums;
  constexpr float inf = std::numeric_limits<float>::infinity();
  std::atomic<int64_t> bad_row{rows};
  at::parallel_for(0, rows, row_grain(logits.size(1)), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      if (wanted && !wanted[t]) {
        for (int64_t which = 0; which < first_entry + k; ++which) *out(t, which) = 0.0f;
        *out(t, kRowMax) = -inf;
        continue;
      }
      if (targets[t] < 0 || targets[t] >= vocab_size) {
        for (int64_t seen = bad_row; t < seen && !bad_row.compare_exchange_weak(seen, t);) {
        }
        continue;
      }
      const T* row = x + t * stride;
      const auto logit = [&](int64_t id) {
        const int64_t column = id - shard.start;
        const bool here = id >= 0 && 0 <= column && column < shard.columns;
        return here ? static_cast<float>(row[column]) : -inf;
      };
      sums(row, shard.columns, out(t, kRowMax), out(t, kRowSumExp), out(t, kRowEntropySum));
      *out(t, kTargetLogit) = logit(targets[t]);
      for (int64_t j = 0; j < k; ++j) *out(t, first_entry + j) = logit(ids[t * k + j]);
    }
  });
  TORCH_CHECK_INDEX(bad_row == rows, "target ", targets[bad_row], " at token ", bad_row.load(),
                    " is outside the vocabulary of ", vocab_size,
                    "; mask out tokens that are not to be scored, or give the model's vocab_size "
                    "(added tokens count: len(tokenizer))");
}

}  // namespace

Tensor logprob_forward(const Tensor& logits, const Tensor& target, const OptionalTensor& mask,
                       int64_t vocab_start, int64_t vocab_size) {
  check_logits(logits, target, mask);
  const auto shard = vocab_shard(logits.size(1), vocab_start, vocab_size);
  Tensor stats =
      at::empty({kLogprobStatistics, logits.size(0)}, logits.options().dtype(at::kFloat));
  for_logits_dtype(logits, [&](auto zero) {
    forward_rows<decltype(zero)>(logits, target, mask, std::nullopt, shard, vocab_size, false,
                                 {stats.mutable_data_ptr<float>(), 1, logits.size(0)});
  });
  return stats;
}

Tensor statistics_forward(const Tensor& logits, const Tensor& target, const OptionalTensor& mask,
                          const OptionalTensor& topk_ids, int64_t vocab_start, int64_t vocab_size,
                          bool entropy) {
  check_logits(logits, target, mask);
  const int64_t width =
      kLogprobStatistics + entropy + check_topk_ids(topk_ids, logits.size(0), logits);
  const auto shard = vocab_shard(logits.size(1), vocab_start, vocab_size);
  Tensor stats = at::empty({logits.size(0), width}, logits.options().dtype(at::kFloat));
  for_logits_dtype(logits, [&](auto zero) {
    forward_rows<decltype(zero)>(logits, target, mask, topk_ids, shard, vocab_size, entropy,
                                 {stats.mutable_data_ptr<float>(), width, 1});
  });
  return stats;
}

std::tuple<Tensor, Tensor> logprob_combine(const Tensor& stats, const OptionalTensor& mask) {
  check_stats(stats);
  const int64_t ranks = stats.size(0), T = stats.size(2);
  check_mask(mask, T, stats);
  Tensor logprob = at::empty({T}, stats.options());
  Tensor normalizer = at::empty({T, 2}, stats.options());
  const float* in = stats.const_data_ptr<float>();
  const bool* wanted = mask_data(mask);
  float* lp = logprob.mutable_data_ptr<float>();
  Normalizer* normalizers = mutable_normalizers(normalizer);
  at::parallel_for(0, T, 4096, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      Logprob token = {};
      if (!wanted || wanted[t]) token = combine_ranks(in, ranks, T, t);
      lp[t] = token.logprob;
      normalizers[t] = token.normalizer;
    }
  });
  return {logprob, normalizer};
}

Tensor logprob_backward(const Tensor& logits, const Tensor& target, const OptionalTensor& mask,
                        const Tensor& normalizer, const Tensor& grad, int64_t vocab_start,
                        int64_t vocab_size) {
  check_backward(logits, target, mask, normalizer, grad);
  Tensor out = at::empty(logits.sizes(), logits.options());
  run_backward(logits, out, target, mask, normalizer, grad,
               vocab_shard(logits.size(1), vocab_start, vocab_size));
  return out;
}

void logprob_backward_(Tensor& logits, const Tensor& target, const OptionalTensor& mask,
                       const Tensor& normalizer, const Tensor& grad, int64_t vocab_start,
                       int64_t vocab_size) {
  check_backward(logits, target, mask, normalizer, grad);
  run_backward(logits, logits, target, mask, normalizer, grad,
               vocab_shard(logits.size(1), vocab_start, vocab_size));
}

Tensor topk_kl_backward(const Tensor& logits, const Tensor& target, const OptionalTensor& mask,
                        const Tensor& normalizer, const Tensor& grad, const Tensor& topk_ids,
                        const Tensor& topk_logprobs, const Tensor& topk_log_pi,
                        const Tensor& kl_terms, const Tensor& kl_grad, int64_t vocab_start,
                        int64_t vocab_size) {
  check_backward(logits, target, mask, normalizer, grad);
  const auto topk = topk_gradient(logits, topk_ids, topk_logprobs, topk_log_pi, kl_terms, kl_grad);
  Tensor out = at::empty(logits.sizes(), logits.options());
  run_backward(logits, out, target, mask, normalizer, grad,
               vocab_shard(logits.size(1), vocab_start, vocab_size), topk);
  return out;
}

void topk_kl_backward_(Tensor& logits, const Tensor& target, const OptionalTensor& mask,
                       const Tensor& normalizer, const Tensor& grad, const Tensor& topk_ids,
                       const Tensor& topk_logprobs, const Tensor& topk_log_pi,
                       const Tensor& kl_terms, const Tensor& kl_grad, int64_t vocab_start,
                       int64_t vocab_size) {
  check_backward(logits, target, mask, normalizer, grad);
  run_backward(logits, logits, target, mask, normalizer, grad,
               vocab_shard(logits.size(1), vocab_start, vocab_size),
               topk_gradient(logits, topk_ids, topk_logprobs, topk_log_pi, kl_terms, kl_grad));
}

}  // namespace pear::cpu
