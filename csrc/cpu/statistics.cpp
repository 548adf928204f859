// What the statistics of a token's logits say: log-prob, entropy and the KL of its top-k, on CPU.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <atomic>
#include <cmath>

#include "checks.h"
#include "online_softmax.h"
#include "ops.h"
#include "topk_kl.h"
#include "weights_math.h"

namespace pear::cpu {
namespace {

// The top-k of one token as the data store it.
struct Entries {
  const int32_t* ids;
  const float* logprobs;
  int64_t k;

  bool has(int64_t j) const { return ids[j] != -1; }

  bool valid(int64_t vocab_size) const {
    bool any = false;
    for (int64_t j = 0; j < k; ++j) {
      if (!has(j)) continue;
      any = any || logprobs[j] > kNegativeInfinity;
      if (ids[j] < 0 || ids[j] >= vocab_size || !(logprobs[j] <= kPositiveTolerance)) return false;
      if (std::find(ids, ids + j, ids[j]) != ids + j) return false;
    }
    return any;
  }

  // Says what is wrong with entries that are not valid.
  void refuse(int64_t t, int64_t vocab_size) const {
    for (int64_t j = 0; j < k; ++j) {
      if (!has(j)) continue;
      TORCH_CHECK_INDEX(0 <= ids[j] && ids[j] < vocab_size, "top-k id ", ids[j], " at token ", t,
                        " is outside the vocabulary of ", vocab_size,
                        "; give -1 where there is no entry, and score with the model's tokenizer");
      TORCH_CHECK_VALUE(logprobs[j] <= kPositiveTolerance, "the top-k log-prob of id ", ids[j],
                        " at token ", t, " is ", logprobs[j],
                        ", which is none; give natural logarithms of probabilities");
      TORCH_CHECK_VALUE(std::find(ids, ids + j, ids[j]) == ids + j, "top-k id ", ids[j],
                        " at token ", t, " is there twice; keep one of the entries and give -1 ",
                        "for the other");
    }
    TORCH_CHECK_VALUE(false, "token ", t, " is a decision without a top-k entry of any mass; ",
                      "mask it out, or score it with its top-k");
  }
};

struct TokenKl {
  float kl, outside_factor, log_mass;
};

// log_rest: the log of what is outside the entries under the target policy.
TokenKl kl_of_entries(const Entries& entries, const float* log_pi, float log_rest, bool bucket) {
  float largest = kNegativeInfinity;
  double in_q = 0.0, kl = 0.0;
  for (int64_t j = 0; j < entries.k; ++j) {
    if (entries.has(j)) largest = std::max(largest, entries.logprobs[j]);
  }
  for (int64_t j = 0; j < entries.k; ++j) {
    if (entries.has(j)) in_q += std::exp(static_cast<double>(entries.logprobs[j]) - largest);
  }
  const double log_sum = largest + std::log(in_q), log_mass = bucket ? 0.0 : log_sum;
  for (int64_t j = 0; j < entries.k; ++j) {
    if (!entries.has(j) || entries.logprobs[j] == kNegativeInfinity) continue;
    const double log_q = entries.logprobs[j] - log_mass;
    kl += std::exp(log_q) * (log_q - log_pi[j]);
  }
  const TopkTail tail = bucket ? bucket_tail(std::exp(log_sum), log_rest) : TopkTail{0.0f, 1.0f};
  return {static_cast<float>(kl + tail.kl), tail.outside_factor, static_cast<float>(log_mass)};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> statistics_combine(
    const Tensor& stats, const OptionalTensor& mask, int64_t vocab_size,
    const OptionalTensor& topk_ids, const OptionalTensor& topk_logprobs, bool entropy,
    bool bucket) {
  const int64_t k = check_statistics(stats, topk_ids, topk_logprobs, entropy);
  const int64_t ranks = stats.size(0), T = stats.size(1), width = stats.size(2);
  check_mask(mask, T, stats);
  const int64_t with_kl = k ? T : 0, first_entry = kTokenStatistics + entropy;
  const auto empty = [&](at::IntArrayRef shape) { return at::empty(shape, stats.options()); };
  Tensor logprob = empty({T}), normalizer = empty({T, 2}), entropies = empty({entropy ? T : 0});
  Tensor kl = empty({with_kl}), log_pi = empty({with_kl, k}), terms = empty({with_kl, kKlTerms});
  const float* in = stats.const_data_ptr<float>();
  const bool* wanted = mask ? mask->const_data_ptr<bool>() : nullptr;
  const int32_t* ids = k ? topk_ids->const_data_ptr<int32_t>() : nullptr;
  const float* logprobs = k ? topk_logprobs->const_data_ptr<float>() : nullptr;
  float* out_lp = logprob.mutable_data_ptr<float>();
  Normalizer* normalizers = mutable_normalizers(normalizer);
  float *out_h = entropies.mutable_data_ptr<float>(), *out_kl = kl.mutable_data_ptr<float>();
  float *out_pi = log_pi.mutable_data_ptr<float>(), *out_terms = terms.mutable_data_ptr<float>();
  std::atomic<int64_t> bad_token{T};
  at::parallel_for(0, T, std::max<int64_t>(1, 4096 / (k + 1)), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const TokenStatistics token = {in + t * width, T * width, ranks};
      const Entries entries = {ids + t * k, logprobs + t * k, k};
      if (wanted && !wanted[t]) {
        out_lp[t] = 0.0f;
        normalizers[t] = {0.0f, 0.0f};
        if (entropy) out_h[t] = 0.0f;
        if (k) {
          out_kl[t] = 0.0f;
          std::fill_n(out_pi + t * k, k, 0.0f);
          std::fill_n(out_terms + t * kKlTerms, int64_t(kKlTerms), 0.0f);
        }
        continue;
      }
      const EntropyPart rest = part_of_ranks(token, entropy);
      EntropyPart row = rest;
      float* pi = out_pi + t * k;
      for (int64_t j = 0; j < k; ++j) {
        pi[j] = logit_of_ranks(token, first_entry + j);
        row = merge(row, with_entropy(one_column(pi[j])));
      }
      const Normalizer normalizer = normalizer_of(row);
      normalizers[t] = normalizer;
      out_lp[t] = normalizer.logprob(logit_of_ranks(token, kTargetLogit));
      if (entropy) out_h[t] = entropy_of(row);
      if (k == 0) continue;
      if (!entries.valid(vocab_size)) {
        for (int64_t seen = bad_token; t < seen && !bad_token.compare_exchange_weak(seen, t);) {
        }
        continue;
      }
      for (int64_t j = 0; j < k; ++j) pi[j] = normalizer.logprob(pi[j]);
      const float log_rest = normalizer.logprob(rest.max) + std::log(rest.sum);
      const TokenKl found = kl_of_entries(entries, pi, log_rest, bucket);
      out_kl[t] = found.kl;
      out_terms[t * kKlTerms + kOutsideFactor] = found.outside_factor;
      out_terms[t * kKlTerms + kLogMass] = found.log_mass;
    }
  });
  if (bad_token < T) {
    Entries{ids + bad_token * k, logprobs + bad_token * k, k}.refuse(bad_token, vocab_size);
  }
  return {logprob, normalizer, entropies, kl, log_pi, terms};
}

}  // namespace pear::cpu
