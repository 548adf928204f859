// Shape and dtype checks shared by the CPU and CUDA ops, a line each.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>

#include "online_softmax.h"
#include "ops.h"

namespace pear {

// The part of the vocabulary that one rank's logits hold.
struct VocabShard {
  int64_t start;    // global id of column 0
  int64_t columns;  // columns that are tokens; the rest is padding

  // That of a global id; -1 where another rank holds it, or none, as of -1.
  PEAR_HOST_DEVICE int64_t column(int64_t id) const {
    const int64_t at = id - start;
    return 0 <= at && at < columns ? at : -1;
  }
};

inline VocabShard vocab_shard(int64_t V, int64_t vocab_start, int64_t vocab_size) {
  TORCH_CHECK_VALUE(vocab_start >= 0, "vocab_start must be >= 0, got ", vocab_start);
  TORCH_CHECK_VALUE(vocab_size > 0, "vocab_size must be > 0, got ", vocab_size);
  return {vocab_start, std::clamp<int64_t>(vocab_size - vocab_start, 0, V)};
}

inline void check_vector(const Tensor& x, const char* name, int64_t T, at::ScalarType dtype) {
  TORCH_CHECK_VALUE(x.dim() == 1 && x.size(0) == T, name, " must have shape [", T, "], got ",
                    x.sizes());
  TORCH_CHECK_VALUE(x.scalar_type() == dtype, name, " must be ", dtype, ", got ", x.scalar_type());
  TORCH_CHECK_VALUE(x.is_contiguous(), name, " must be contiguous");
}

// [T, 2]: a Normalizer per row.
inline void check_normalizer(const Tensor& x, int64_t T) {
  TORCH_CHECK_VALUE(x.dim() == 2 && x.size(0) == T && x.size(1) == 2,
                    "normalizer must have shape [", T, ", 2], got ", x.sizes());
  TORCH_CHECK_VALUE(x.scalar_type() == at::kFloat && x.is_contiguous(),
                    "normalizer must be contiguous and float32");
}

inline const Normalizer* const_normalizers(const Tensor& x) {
  return reinterpret_cast<const Normalizer*>(x.const_data_ptr<float>());
}

inline Normalizer* mutable_normalizers(Tensor& x) {
  return reinterpret_cast<Normalizer*>(x.mutable_data_ptr<float>());
}

inline void check_same_device(const Tensor& x, const char* name, const Tensor& as) {
  TORCH_CHECK_VALUE(x.device() == as.device(), name, " is on ", x.device(), ", expected ",
                    as.device());
}

inline void check_mask(const OptionalTensor& mask, int64_t T, const Tensor& as) {
  if (!mask) return;
  check_vector(*mask, "mask", T, at::kBool);
  check_same_device(*mask, "mask", as);
}

inline void check_logits(const Tensor& logits, const Tensor& target, const OptionalTensor& mask) {
  TORCH_CHECK_VALUE(logits.dim() == 2, "logits must be [T, V], got ", logits.sizes());
  const auto dtype = logits.scalar_type();
  TORCH_CHECK_VALUE(dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf,
                    "logits must be float32, bfloat16 or float16, got ", dtype);
  TORCH_CHECK_VALUE(logits.size(1) > 0, "logits must have at least one column");
  TORCH_CHECK_VALUE(logits.stride(1) == 1 || logits.size(1) == 1,
                    "logits must be contiguous in the last dimension, got strides ",
                    logits.strides());
  check_vector(target, "target", logits.size(0), at::kLong);
  check_same_device(target, "target", logits);
  check_mask(mask, logits.size(0), logits);
}

// [T, k] of one dtype, k >= 1.
inline void check_topk(const Tensor& x, const char* name, int64_t T, int64_t k,
                       at::ScalarType dtype, const Tensor& as) {
  TORCH_CHECK_VALUE(x.dim() == 2 && x.size(0) == T && x.size(1) == k && k > 0, name,
                    " must have shape [", T, ", k], k > 0 and alike in ids and log-probs, got ",
                    x.sizes());
  TORCH_CHECK_VALUE(x.scalar_type() == dtype, name, " must be ", dtype, ", got ", x.scalar_type());
  TORCH_CHECK_VALUE(x.is_contiguous(), name, " must be contiguous");
  check_same_device(x, name, as);
}

// The number k of entries per token, 0 without any.
inline int64_t check_topk_ids(const OptionalTensor& ids, int64_t T, const Tensor& as) {
  if (!ids) return 0;
  const int64_t k = ids->dim() == 2 ? ids->size(1) : 0;
  check_topk(*ids, "topk_ids", T, k, at::kInt, as);
  return k;
}

// Of statistics_combine -> k.
inline int64_t check_statistics(const Tensor& stats, const OptionalTensor& topk_ids,
                                const OptionalTensor& topk_logprobs, bool entropy) {
  TORCH_CHECK_VALUE(stats.dim() == 3 && stats.scalar_type() == at::kFloat && stats.is_contiguous(),
                    "stats must be contiguous float32 [ranks, T, W], got ", stats.sizes());
  TORCH_CHECK_VALUE(topk_ids.has_value() == topk_logprobs.has_value(),
                    "topk_ids and topk_logprobs are wanted together");
  const int64_t k = check_topk_ids(topk_ids, stats.size(1), stats);
  if (k) check_topk(*topk_logprobs, "topk_logprobs", stats.size(1), k, at::kFloat, stats);
  TORCH_CHECK_VALUE(stats.size(2) == kTokenStatistics + entropy + k, "stats have ", stats.size(2),
                    " numbers a token, expected ", kTokenStatistics + entropy + k);
  return k;
}

// Of statistics_backward.
inline void check_backward(const Tensor& logits, PEAR_BACKWARD_PARAMETERS) {
  check_logits(logits, target, mask);
  const int64_t T = logits.size(0), k = check_topk_ids(topk_ids, T, logits);
  check_normalizer(normalizer, T);
  check_same_device(normalizer, "normalizer", logits);
  check_vector(grad, "grad", T, at::kFloat);
  check_same_device(grad, "grad", logits);
  for (const auto* given : {&topk_logprobs, &topk_log_pi, &kl_terms, &kl_grad}) {
    TORCH_CHECK_VALUE(given->has_value() == topk_ids.has_value(),
                      "a top-k's gradient wants all of its tensors, or none");
  }
  if (k == 0) return;
  check_topk(*topk_logprobs, "topk_logprobs", T, k, at::kFloat, logits);
  check_topk(*topk_log_pi, "topk_log_pi", T, k, at::kFloat, logits);
  check_topk(*kl_terms, "kl_terms", T, kKlTerms, at::kFloat, logits);
  check_vector(*kl_grad, "kl_grad", T, at::kFloat);
  check_same_device(*kl_grad, "kl_grad", logits);
}

inline void check_cu_seqlens(const Tensor& cu_seqlens, const Tensor& as) {
  TORCH_CHECK_VALUE(cu_seqlens.dim() == 1 && cu_seqlens.size(0) >= 1,
                    "cu_seqlens must have shape [segments + 1], got ", cu_seqlens.sizes());
  TORCH_CHECK_VALUE(cu_seqlens.scalar_type() == at::kInt, "cu_seqlens must be int32, got ",
                    cu_seqlens.scalar_type());
  TORCH_CHECK_VALUE(cu_seqlens.is_contiguous(), "cu_seqlens must be contiguous");
  check_same_device(cu_seqlens, "cu_seqlens", as);
}

// Calls f with a zero of the logits' element type: f(auto zero) { using T = decltype(zero); ... }.
template <typename F>
void for_logits_dtype(const Tensor& logits, F&& f) {
  switch (logits.scalar_type()) {
    case at::kFloat:
      return f(0.0f);
    case at::kBFloat16:
      return f(c10::BFloat16(0.0f));
    default:
      return f(c10::Half(0.0f));
  }
}

}  // namespace pear
