// log-sum-exp in parts: what threads, warps and ranks each saw of a row, and how parts are joined.
#pragma once

#include <cmath>
#include <cstdint>

#include "host_device.h"
#include "ops.h"

namespace pear {

// sum = sum of exp(x - max) over the columns seen. Nothing but -inf seen: (-inf, 0). NaN seen: the
// sum is NaN, and max is that of the other columns.
struct SoftmaxPart {
  float max, sum;
};

constexpr float kNegativeInfinity = -INFINITY;

PEAR_HOST_DEVICE SoftmaxPart no_columns() { return {kNegativeInfinity, 0.0f}; }

PEAR_HOST_DEVICE SoftmaxPart one_column(float x) {
  if (x == kNegativeInfinity) return no_columns();
  return x == x ? SoftmaxPart{x, x - x + 1.0f} : SoftmaxPart{kNegativeInfinity, x};  // inf: NaN
}

// What exponents are taken against: -inf - -inf would be NaN where the answer is "adds nothing".
PEAR_HOST_DEVICE float exponent_base(float max) { return max == kNegativeInfinity ? 0.0f : max; }

PEAR_HOST_DEVICE SoftmaxPart merge(SoftmaxPart a, SoftmaxPart b) {
  const float max = fmaxf(a.max, b.max), base = exponent_base(max);
  return {max, a.sum * expf(a.max - base) + b.sum * expf(b.max - base)};
}

// A part from which the entropy can be told: weighted = sum of (x - max) exp(x - max).
struct EntropyPart {
  float max, sum, weighted;
};

// The exponent of what adds nothing, -inf, as a number: times exp(-inf) it is 0 and not NaN. A NaN
// that it hides is in the other factor.
PEAR_HOST_DEVICE float finite_exponent(float x) { return fmaxf(x, -1000.0f); }

PEAR_HOST_DEVICE EntropyPart with_entropy(SoftmaxPart one_or_no_column) {
  const float sum = one_or_no_column.sum;
  return {one_or_no_column.max, sum, sum == sum ? 0.0f : sum};
}

PEAR_HOST_DEVICE EntropyPart merge(EntropyPart a, EntropyPart b) {
  const float max = fmaxf(a.max, b.max), base = exponent_base(max);
  const float a_less = a.max - base, b_less = b.max - base;
  const float a_scale = expf(a_less), b_scale = expf(b_less);
  return {max, a.sum * a_scale + b.sum * b_scale,
          (a.weighted + finite_exponent(a_less) * a.sum) * a_scale +
              (b.weighted + finite_exponent(b_less) * b.sum) * b_scale};
}

// Where the statistics of one token stand: those of rank r from first + r * rank on, each
// `statistic` after the one before.
struct TokenStatistics {
  const float* first;
  int64_t statistic, rank, ranks;

  PEAR_HOST_DEVICE float operator()(int64_t r, int64_t which) const {
    return first[r * rank + which * statistic];
  }
};

// The largest over ranks of a logit that one of them holds and the others give as -inf. A NaN must
// win: comparisons with it are false.
PEAR_HOST_DEVICE float logit_of_ranks(const TokenStatistics& stats, int64_t which) {
  float logit = kNegativeInfinity;
  for (int64_t r = 0; r < stats.ranks; ++r) {
    if (!(stats(r, which) <= logit)) logit = stats(r, which);
  }
  return logit;
}

// What makes log-probs of a row's logits. In two parts: their sum would round as coarsely as max.
struct Normalizer {
  float max, log_sum;

  PEAR_HOST_DEVICE float logprob(float logit) const { return (logit - max) - log_sum; }
};

// A row's softmax over all ranks: max, log of the sum of exp(x - max), and that sum.
struct RankSoftmax : Normalizer {
  float sum;
};

// In rank order, so every rank computes the same bits.
PEAR_HOST_DEVICE RankSoftmax softmax_of_ranks(const TokenStatistics& stats) {
  float max = kNegativeInfinity;
  for (int64_t r = 0; r < stats.ranks; ++r) {
    const float row_max = stats(r, kRowMax);
    max = row_max > max ? row_max : max;
  }
  float sum = 0.0f;
  for (int64_t r = 0; r < stats.ranks; ++r) {
    const float part = stats(r, kRowSumExp), row_max = stats(r, kRowMax);
    sum += row_max == kNegativeInfinity ? part : part * expf(row_max - max);
  }
  return {{max, logf(sum)}, sum};
}

PEAR_HOST_DEVICE float entropy_of_ranks(const TokenStatistics& stats, const RankSoftmax& row) {
  float weighted = 0.0f;
  for (int64_t r = 0; r < stats.ranks; ++r) {
    const float less = stats(r, kRowMax) - row.max;
    if (stats(r, kRowMax) == kNegativeInfinity) continue;
    weighted += (stats(r, kRowEntropySum) + less * stats(r, kRowSumExp)) * expf(less);
  }
  return row.log_sum - weighted / row.sum;
}

struct Logprob {
  float logprob;
  Normalizer normalizer;
};

// Of token t, from stats [ranks, 3, T].
PEAR_HOST_DEVICE Logprob combine_ranks(const float* stats, int64_t ranks, int64_t T, int64_t t) {
  const TokenStatistics token = {stats + t, T, kLogprobStatistics * T, ranks};
  const RankSoftmax row = softmax_of_ranks(token);
  return {row.logprob(logit_of_ranks(token, kTargetLogit)), row};
}

}  // namespace pear
