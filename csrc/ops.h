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

// The statistics of a token that logprob_forward gives and logprob_combine takes.
// statistics_forward adds, where they are wanted, sum (x - max) exp(x - max), and then the logits
// of the token's top-k.
enum LogprobStatistic {
  kRowMax = 0,
  kRowSumExp = 1,
  kTargetLogit = 2,
  kLogprobStatistics = 3,
  kRowEntropySum = 3,
};

// Columns of kl_terms, which statistics_combine gives and topk_kl_backward takes.
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

#define PEAR_DECLARE_OPS                                                                           \
  /* One pass over this rank's columns. logits [T, V] f32/bf16/f16; target [T] int64, global ids;  \
     mask [T] bool or none; the rank holds ids [vocab_start, vocab_start + V), of which those      \
     below vocab_size are tokens. -> [3, T] f32: row max, sum exp(x - max), target logit (-inf     \
     where another rank holds the target). Rows off the mask are not read and give (-inf, 0, 0).   \
     Raises IndexError on a target outside [0, vocab_size) where the mask is true. */              \
  Tensor logprob_forward(const Tensor& logits, const Tensor& target, const OptionalTensor& mask,   \
                         int64_t vocab_start, int64_t vocab_size);                                 \
  /* stats [n, 3, T], of all ranks -> logprob [T] and normalizer [T, 2] (the row's max, and the    \
     log of its sum of exp(x - max)), f32; 0 off the mask. */                                      \
  std::tuple<Tensor, Tensor> logprob_combine(const Tensor& stats, const OptionalTensor& mask);     \
  /* grad_logits = grad[t] * (onehot - softmax), written over the logits. Rows off the mask and    \
     padded columns become 0, whatever they held. grad [T] f32. */                                 \
  void logprob_backward_(Tensor& logits, const Tensor& target, const OptionalTensor& mask,         \
                         const Tensor& normalizer, const Tensor& grad, int64_t vocab_start,        \
                         int64_t vocab_size);                                                      \
  /* The same into a new contiguous tensor of the logits' shape and dtype. */                      \
  Tensor logprob_backward(const Tensor& logits, const Tensor& target, const OptionalTensor& mask,  \
                          const Tensor& normalizer, const Tensor& grad, int64_t vocab_start,       \
                          int64_t vocab_size);                                                     \
  /* logprob_forward and more of each row in the same pass, token by token: [T, W] f32, W = 3, + 1 \
     if entropy is wanted, + k if topk_ids [T, k] int32 are given (-inf where another rank, or     \
     none, holds an id; 0 off the mask). */                                                        \
  Tensor statistics_forward(const Tensor& logits, const Tensor& target,                            \
                            const OptionalTensor& mask, const OptionalTensor& topk_ids,            \
                            int64_t vocab_start, int64_t vocab_size, bool entropy);                \
  /* stats [n, T, W], of all ranks -> logprob [T], normalizer [T, 2], entropy, KL [T], all f32 and \
     0 off the mask, the top-k's log-probs [T, k] and kl_terms [T, kKlTerms]; what is not wanted   \
     has no elements. topk_logprobs [T, k] f32 are the behaviour policy's; an id of -1 is no       \
     entry. On the mask an id outside [0, vocab_size) raises IndexError; an id twice, no entry     \
     with any mass, and a log-prob that is NaN or above 1e-5 raise ValueError. */                  \
  std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> statistics_combine(                   \
      const Tensor& stats, const OptionalTensor& mask, const OptionalTensor& topk_ids,             \
      const OptionalTensor& topk_logprobs, int64_t vocab_size, bool entropy, bool bucket);         \
  /* logprob_backward_ plus kl_grad[t] * d KL_t / d logits (docs/method.md, Base loss), in one     \
     pass; the top-k's columns come from topk_log_pi, as statistics_combine gave it. kl_grad [T]   \
     f32. */                                                                                       \
  void topk_kl_backward_(Tensor& logits, const Tensor& target, const OptionalTensor& mask,         \
                         const Tensor& normalizer, const Tensor& grad, const Tensor& topk_ids,     \
                         const Tensor& topk_logprobs, const Tensor& topk_log_pi,                   \
                         const Tensor& kl_terms, const Tensor& kl_grad, int64_t vocab_start,       \
                         int64_t vocab_size);                                                      \
  /* The same into a new contiguous tensor of the logits' shape and dtype. */                      \
  Tensor topk_kl_backward(const Tensor& logits, const Tensor& target, const OptionalTensor& mask,  \
                          const Tensor& normalizer, const Tensor& grad, const Tensor& topk_ids,    \
                          const Tensor& topk_logprobs, const Tensor& topk_log_pi,                  \
                          const Tensor& kl_terms, const Tensor& kl_grad, int64_t vocab_start,      \
                          int64_t vocab_size);                                                     \
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
