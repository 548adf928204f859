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
#include <vector>

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
      const int64_t column = shard.column(targets[t]);
      const bool here = column >= 0;
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
        const int64_t id = topk.ids[t * topk.k + j], entry = shard.column(id);
        if (entry < 0) continue;
        out_row[entry] = static_cast<T>(entry_gradient(topk.log_pi[t * topk.k + j], topk.q(t, j),
                                                       grads[t], topk.grad[t], id == targets[t]));
      }
    }
  });
}

void run_backward(const Tensor& logits, Tensor& out, PEAR_BACKWARD_PARAMETERS) {
  TopkGradient topk;
  if (topk_ids) {
    topk = {topk_ids->size(1),
            topk_ids->const_data_ptr<int32_t>(),
            topk_logprobs->const_data_ptr<float>(),
            topk_log_pi->const_data_ptr<float>(),
            kl_terms->const_data_ptr<float>(),
            kl_grad->const_data_ptr<float>()};
  }
  const auto shard = vocab_shard(logits.size(1), vocab_start, vocab_size);
  for_logits_dtype(logits, [&](auto zero) {
    backward_rows<decltype(zero)>(logits, out, target, mask, normalizer, grad, shard, topk);
  });
}

template <typename T>
void forward_rows(const Tensor& logits, const Tensor& target, const OptionalTensor& mask,
                  const OptionalTensor& topk_ids, VocabShard shard, int64_t vocab_size,
                  bool entropy, Tensor& stats) {
  const auto kernels = row_kernels<T>();
  const auto sums = entropy ? kernels.sums_and_entropy : kernels.sums;
  const T* x = logits.const_data_ptr<T>();
  const int64_t rows = logits.size(0), stride = logits.stride(0), width = stats.size(1);
  const int64_t* targets = target.const_data_ptr<int64_t>();
  const bool* wanted = mask_data(mask);
  const int64_t k = topk_ids ? topk_ids->size(1) : 0;
  const int32_t* ids = topk_ids ? topk_ids->const_data_ptr<int32_t>() : nullptr;
  float* first = stats.mutable_data_ptr<float>();
  std::atomic<int64_t> bad_row{rows};
  at::parallel_for(0, rows, row_grain(logits.size(1)), [&](int64_t begin, int64_t end) {
    std::vector<int64_t> entries;  // the top-k's columns that are here
    for (int64_t t = begin; t < end; ++t) {
      float* out = first + t * width;
      if (wanted && !wanted[t]) {
        std::fill_n(out, width, 0.0f);
        out[kRowMax] = kNegativeInfinity;
        continue;
      }
      if (targets[t] < 0 || targets[t] >= vocab_size) {
        for (int64_t seen = bad_row; t < seen && !bad_row.compare_exchange_weak(seen, t);) {
        }
        continue;
      }
      const T* row = x + t * stride;
      const auto logit = [&](int64_t column) {
        return column < 0 ? kNegativeInfinity : static_cast<float>(row[column]);
      };
      out[kTargetLogit] = logit(shard.column(targets[t]));
      entries.clear();
      for (int64_t j = 0; j < k; ++j) {
        const int64_t column = shard.column(ids[t * k + j]);
        out[width - k + j] = logit(column);
        if (column >= 0) entries.push_back(column);
      }
      std::sort(entries.begin(), entries.end());
      entries.push_back(shard.columns);
      EntropyPart part = with_entropy(no_columns());
      int64_t from = 0;
      for (const int64_t entry : entries) {
        EntropyPart between = {};
        if (from < entry) {
          sums(row + from, entry - from, &between.max, &between.sum, &between.weighted);
          part = merge(part, between);
        }
        from = std::max(from, entry + 1);
      }
      out[kRowMax] = part.max;
      out[kRowSumExp] = part.sum;
      if (entropy) out[kRowEntropySum] = part.weighted;
    }
  });
  TORCH_CHECK_INDEX(bad_row == rows, "target ", targets[bad_row], " at token ", bad_row.load(),
                    " is outside the vocabulary of ", vocab_size,
                    "; mask out tokens that are not to be scored, or give the model's vocab_size "
                    "(added tokens count: len(tokenizer))");
}

}  // namespace

Tensor statistics_forward(const Tensor& logits, const Tensor& target, const OptionalTensor& mask,
                          int64_t vocab_start, int64_t vocab_size, const OptionalTensor& topk_ids,
                          bool entropy) {
  check_logits(logits, target, mask);
  const int64_t width =
      kTokenStatistics + entropy + check_topk_ids(topk_ids, logits.size(0), logits);
  const auto shard = vocab_shard(logits.size(1), vocab_start, vocab_size);
  Tensor stats = at::empty({logits.size(0), width}, logits.options().dtype(at::kFloat));
  for_logits_dtype(logits, [&](auto zero) {
    forward_rows<decltype(zero)>(logits, target, mask, topk_ids, shard, vocab_size, entropy, stats);
  });
  return stats;
}

Tensor statistics_backward(const Tensor& logits, PEAR_BACKWARD_PARAMETERS) {
  check_backward(logits, PEAR_BACKWARD_ARGUMENTS);
  Tensor out = at::empty(logits.sizes(), logits.options());
  run_backward(logits, out, PEAR_BACKWARD_ARGUMENTS);
  return out;
}

void statistics_backward_(Tensor& logits, PEAR_BACKWARD_PARAMETERS) {
  check_backward(logits, PEAR_BACKWARD_ARGUMENTS);
  run_backward(logits, logits, PEAR_BACKWARD_ARGUMENTS);
}

}  // namespace pear::cpu
