// The contract of every op. csrc/cpu and csrc/cuda implement the same functions, one file per op.
//
// Common to all: tensors live on one device; rows of `logits` are contiguous (stride 1 in the last
// dimension, any row stride); everything else is contiguous. Sums are taken in float32 or wider.
// Violations of shape or dtype raise ValueError before anything runs. CUDA ops run on the current
// stream and never synchronise with the host; what only the device can see (a target outside the
// vocabulary, cu_seqlens that do not end at T, behaviour log-probs that are none) is an exception
// on CPU and a device-side assertion on CUDA. Names: T tokens, V columns of this rank's logits, n
// tensor-parallel ranks, S trajectories.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace pear {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// What statistics_forward finds of a token and statistics_combine takes: these, then, where they
// are wanted, sum (x - max) exp(x - max) and the logits of the token's top-k. Maximum and sums are
// over the columns outside the top-k: what is left of a confident model's softmax could not be told
// from a sum over all of them.
enum TokenStatistic {
  kRowMax = 0,
  kRowSumExp = 1,
  kTargetLogit = 2,
  kTokenStatistics = 3,
  kRowEntropySum = 3,
};

// Columns of kl_terms, which statistics_combine gives and statistics_backward takes.
enum KlTerm {
  kOutsideFactor = 0,  // d KL / d logit is this times the softmax outside the top-k
  kLogMass = 1,        // log of what the behaviour policy's probabilities are divided by
  kKlTerms = 2,
};

// Which importance weights; the order is that of PearConfig.variant.
enum class Variant : int64_t { kNone = 0, kToken = 1, kBlock = 2, kSequence = 3, kOwn = 4 };

// Rows of the statistics of pear_weights; each is a (sum, count) pair.
enum WeightStatistic {
  kLogRatio = 0,      // raw log ratio over decisions
  kRatioLow,          // decisions whose log ratio was clipped from below
  kRatioHigh,         // ... from above
  kWeightFloor,       // decisions whose log weight was clipped from below
  kWeightCeiling,     // ... from above
  kWeight,            // weight, times its factor, over decisions
  kEffectiveSample,   // (sum w)^2 / (T sum w^2) over trajectories with a decision
  kWeightStatistics,  // how many there are
};

#define PEAR_BACKWARD_PARAMETERS                                                                  \
  const Tensor &target, const OptionalTensor &mask, const Tensor &normalizer, const Tensor &grad, \
      int64_t vocab_start, int64_t vocab_size, const OptionalTensor &topk_ids,                    \
      const OptionalTensor &topk_logprobs, const OptionalTensor &topk_log_pi,                     \
      const OptionalTensor &kl_terms, const OptionalTensor &kl_grad
#define PEAR_BACKWARD_ARGUMENTS                                                                  \
  target, mask, normalizer, grad, vocab_start, vocab_size, topk_ids, topk_logprobs, topk_log_pi, \
      kl_terms, kl_grad

#define PEAR_DECLARE_OPS                                                                           \
  /* One pass over this rank's columns. logits [T, V] f32/bf16/f16; target [T] int64, global ids;  \
     mask [T] bool or none; the rank holds ids [vocab_start, vocab_start + V), of which those      \
     below vocab_size are tokens; topk_ids [T, k] int32 or none, global ids, each once, -1 = no    \
     entry. -> [T, W] f32, W = 3 (row max, sum exp(x - max), target logit), + 1 if entropy is      \
     wanted, + k: a token's TokenStatistics. A logit that another rank, or none, holds is -inf.    \
     Rows off the mask are not read and give -inf, then 0. Raises IndexError on a target outside   \
     [0, vocab_size) where the mask is true. */                                                    \
  Tensor statistics_forward(const Tensor& logits, const Tensor& target,                            \
                            const OptionalTensor& mask, int64_t vocab_start, int64_t vocab_size,   \
                            const OptionalTensor& topk_ids, bool entropy);                         \
  /* stats [n, T, W], of all ranks -> logprob [T], normalizer [T, 2] (the row's max, and the log   \
     of its sum of exp(x - max)), entropy, KL [T], all f32 and 0 off the mask, the top-k's         \
     log-probs [T, k] and kl_terms [T, kKlTerms]; what is not wanted has no elements.              \
     topk_logprobs [T, k] f32 are the behaviour policy's. On the mask an id outside [0,            \
     vocab_size) raises IndexError; an id twice, no entry with any mass, and a log-prob that is    \
     NaN or above 1e-5 raise ValueError. */                                                        \
  std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> statistics_combine(                   \
      const Tensor& stats, const OptionalTensor& mask, int64_t vocab_size,                         \
      const OptionalTensor& topk_ids, const OptionalTensor& topk_logprobs, bool entropy,           \
      bool bucket);                                                                                \
  /* The gradient of the logits, grad[t] * (onehot - softmax), plus kl_grad[t] * d KL_t / d logits \
     (docs/method.md, Base loss) where there is a top-k: then all of its five tensors are wanted,  \
     topk_log_pi and kl_terms as statistics_combine gave them. grad, kl_grad [T] f32. Rows off the \
     mask and padded columns become 0, whatever they held. A new contiguous tensor of the logits'  \
     shape and dtype; with the underscore, over the logits. */                                     \
  Tensor statistics_backward(const Tensor& logits, PEAR_BACKWARD_PARAMETERS);                      \
  void statistics_backward_(Tensor& logits, PEAR_BACKWARD_PARAMETERS);                             \
  /* x [T] f32, cu_seqlens [S + 1] int32 -> [T]: per segment, the sum of x after t (from t on if   \
     not exclusive), plus carry [S] f32 where given. */                                            \
  Tensor segmented_suffix_sum(const Tensor& x, const Tensor& cu_seqlens,                           \
                              const OptionalTensor& carry, bool exclusive);                        \
  /* x [T] f32, cu_seqlens [S + 1] int32 -> [S] f32: the sum of each segment. */                   \
  Tensor segment_sum(const Tensor& x, const Tensor& cu_seqlens);                                   \
  /* Importance weights and their statistics in one pass (docs/method.md, Weights). logprobs,      \
     behavior_logprobs [T] f32; mask [T] bool; cu_seqlens [S + 1] int32 -> weights [T] f32, 0 off  \
     the mask; stats [kWeightStatistics, 2] f32. Behaviour log-probs that are NaN, infinite or     \
     above 1e-5 on a decision are errors; NaN in logprobs comes out as NaN. With tau the sequence  \
     variant's log weight is tau times the mean of the log ratios, not their sum. factor [T] f32,  \
     anything off the mask, multiplies the weights after they are normalised. */                   \
  std::tuple<Tensor, Tensor> pear_weights(                                                         \
      const Tensor& logprobs, const Tensor& behavior_logprobs, const Tensor& mask,                 \
      const Tensor& cu_seqlens, int64_t variant, double gamma, int64_t block_size,                 \
      double ratio_low, double ratio_high, double weight_low, double weight_high,                  \
      bool subtract_mean, bool normalize, std::optional<double> tau,                               \
      const OptionalTensor& factor);

namespace cpu {
PEAR_DECLARE_OPS
}
#ifdef PEAR_MEGATRON_CUDA
namespace cuda {
PEAR_DECLARE_OPS
}
#endif

}  // namespace pear
