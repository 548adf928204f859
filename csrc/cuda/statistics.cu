// What the statistics of a token's logits say: log-prob, entropy and the KL of its top-k. A thread
// per token, with a top-k a warp, lanes over the entries; it reads 4 (n W + 2 k) bytes a token and
// writes 4 k.
#include <ATen/ops/empty.h>

#include "checks.h"
#include "cuda/chunk_warps.h"
#include "cuda/device.h"
#include "cuda/merge_warp.h"
#include "online_softmax.h"
#include "ops.h"
#include "topk_kl.h"
#include "weights_math.h"

namespace pear::cuda {
namespace {

constexpr int kCombineThreads = 256;

struct CombineOut {
  float* logprob;
  Normalizer* normalizer;
  float *entropy, *kl, *log_pi, *terms;
};

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
    x = fmaxf(x, __shfl_xor_sync(kFullWarp, x, lanes));
  }
  return x;
}

// The top-k of one token as the data store it.
struct Entries {
  const int32_t* ids;
  const float* logprobs;
  int k;

  __device__ __forceinline__ bool has(int j) const { return ids[j] != -1; }
  // Of no mass where there is no entry.
  __device__ __forceinline__ float log_q(int j) const {
    return has(j) ? logprobs[j] : kNegativeInfinity;
  }
  __device__ __forceinline__ void check(int j, int64_t vocab_size) const {
    if (!has(j)) return;
    CUDA_KERNEL_ASSERT(0 <= ids[j] && ids[j] < vocab_size &&
                       "an id of the top-k is outside the vocabulary");
    CUDA_KERNEL_ASSERT(logprobs[j] <= kPositiveTolerance &&
                       "a log-prob of the top-k is NaN or positive");
    for (int other = 0; other < j; ++other) {
      CUDA_KERNEL_ASSERT(ids[other] != ids[j] && "an id is twice in a token's top-k");
    }
  }
};

// kLanes threads per token.
template <int kLanes>
__global__ void __launch_bounds__(kCombineThreads)
    combine_statistics(const float* stats, int64_t ranks, int64_t T, int64_t width,
                       const bool* mask, const int32_t* ids, const float* logprobs, int k,
                       int64_t vocab_size, bool bucket, CombineOut out) {
  const int64_t t = (int64_t(blockIdx.x) * kCombineThreads + threadIdx.x) / kLanes;
  if (t >= T) return;
  const int lane = threadIdx.x % kLanes;
  float* log_pi = out.log_pi + t * k;
  if (mask && !mask[t]) {
    for (int j = lane; j < k; j += kWarp) log_pi[j] = 0.0f;
    if (lane == 0) {
      out.logprob[t] = 0.0f;
      out.normalizer[t] = {0.0f, 0.0f};
      if (out.entropy) out.entropy[t] = 0.0f;
      if (k) out.kl[t] = 0.0f;
    }
    if (k && lane < kKlTerms) out.terms[t * kKlTerms + lane] = 0.0f;
    return;
  }

  const TokenStatistics token = {stats + t * width, T * width, ranks};
  const bool entropy = out.entropy != nullptr;
  const EntropyPart rest = part_of_ranks(token, entropy);
  EntropyPart row = rest;
  if constexpr (kLanes == kWarp) {
    EntropyPart topk = with_entropy(no_columns());
    for (int j = lane; j < k; j += kWarp) {
      log_pi[j] = logit_of_ranks(token, kTokenStatistics + entropy + j);
      topk = merge(topk, with_entropy(one_column(log_pi[j])));
    }
    row = merge(rest, merge_warp(topk));
  }
  const Normalizer normalizer = normalizer_of(row);
  if (lane == 0) {
    out.logprob[t] = normalizer.logprob(logit_of_ranks(token, kTargetLogit));
    out.normalizer[t] = normalizer;
    if (entropy) out.entropy[t] = entropy_of(row);
  }
  if constexpr (kLanes < kWarp) return;

  const Entries entries = {ids + t * k, logprobs + t * k, k};
  float largest = kNegativeInfinity;
  for (int j = lane; j < k; j += kWarp) {
    entries.check(j, vocab_size);
    largest = fmaxf(largest, entries.log_q(j));
  }
  largest = warp_max(largest);
  CUDA_KERNEL_ASSERT(largest > kNegativeInfinity &&
                     "a decision has no entry of any mass in its top-k");
  double in_q = 0.0;
  for (int j = lane; j < k; j += kWarp) {
    log_pi[j] = normalizer.logprob(log_pi[j]);
    in_q += expf(entries.log_q(j) - largest);
  }
  in_q = warp_sum(in_q);
  const float log_mass = bucket ? 0.0f : largest + logf(static_cast<float>(in_q));
  double kl = 0.0;
  for (int j = lane; j < k; j += kWarp) {
    const float log_q = entries.log_q(j) - log_mass;
    if (log_q > kNegativeInfinity) kl += expf(log_q) * (log_q - log_pi[j]);
  }
  kl = warp_sum(kl);
  if (lane != 0) return;
  const float log_rest = normalizer.logprob(rest.max) + logf(rest.sum);
  const TopkTail tail = bucket ? bucket_tail(in_q * expf(largest), log_rest) : TopkTail{0.0f, 1.0f};
  out.kl[t] = static_cast<float>(kl) + tail.kl;
  out.terms[t * kKlTerms + kOutsideFactor] = tail.outside_factor;
  out.terms[t * kKlTerms + kLogMass] = log_mass;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> statistics_combine(
    const Tensor& stats, const OptionalTensor& mask, int64_t vocab_size,
    const OptionalTensor& topk_ids, const OptionalTensor& topk_logprobs, bool entropy,
    bool bucket) {
  const int64_t k = check_statistics(stats, topk_ids, topk_logprobs, entropy);
  const int64_t ranks = stats.size(0), T = stats.size(1);
  check_mask(mask, T, stats);
  const DeviceGuard guard(stats.device());
  const int64_t with_kl = k ? T : 0;
  const auto empty = [&](at::IntArrayRef shape) { return at::empty(shape, stats.options()); };
  Tensor logprob = empty({T}), normalizer = empty({T, 2}), entropies = empty({entropy ? T : 0});
  Tensor kl = empty({with_kl}), log_pi = empty({with_kl, k}), terms = empty({with_kl, kKlTerms});
  if (T > 0) {
    const CombineOut out = {logprob.mutable_data_ptr<float>(),
                            mutable_normalizers(normalizer),
                            entropy ? entropies.mutable_data_ptr<float>() : nullptr,
                            kl.mutable_data_ptr<float>(),
                            log_pi.mutable_data_ptr<float>(),
                            terms.mutable_data_ptr<float>()};
    const auto kernel = k ? combine_statistics<kWarp> : combine_statistics<1>;
    const int64_t threads = T * (k ? kWarp : 1);
    launch(kernel, (threads + kCombineThreads - 1) / kCombineThreads, kCombineThreads,
           stats.const_data_ptr<float>(), ranks, T, stats.size(2),
           mask ? mask->const_data_ptr<bool>() : nullptr,
           k ? topk_ids->const_data_ptr<int32_t>() : nullptr,
           k ? topk_logprobs->const_data_ptr<float>() : nullptr, static_cast<int>(k), vocab_size,
           bucket, out);
  }
  return {logprob, normalizer, entropies, kl, log_pi, terms};
}

}  // namespace pear::cuda
