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

// Where the statistics of one token stand: those of rank r from first + r * rank on.
struct TokenStatistics {
  const float* first;
  int64_t rank, ranks;

  PEAR_HOST_DEVICE float operator()(int64_t r, int64_t which) const {
    return first[r * rank + which];
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

// In rank order, so every rank computes the same bits. weighted is 0 where no entropy is wanted.
PEAR_HOST_DEVICE EntropyPart part_of_ranks(const TokenStatistics& stats, bool entropy) {
  EntropyPart row = {kNegativeInfinity, 0.0f, 0.0f};
  for (int64_t r = 0; r < stats.ranks; ++r) row.max = fmaxf(row.max, stats(r, kRowMax));
  for (int64_t r = 0; r < stats.ranks; ++r) {
    const float max = stats(r, kRowMax), sum = stats(r, kRowSumExp), less = max - row.max;
    if (max == kNegativeInfinity) {
      row.sum += sum;  // 0 or NaN
      continue;
    }
    row.sum += sum * expf(less);
    if (entropy) row.weighted += (stats(r, kRowEntropySum) + less * sum) * expf(less);
  }
  return row;
}

// What makes log-probs of a row's logits. In two parts: their sum would round as coarsely as max.
struct Normalizer {
  float max, log_sum;

  PEAR_HOST_DEVICE float logprob(float logit) const { return (logit - max) - log_sum; }
};

PEAR_HOST_DEVICE Normalizer normalizer_of(EntropyPart row) { return {row.max, logf(row.sum)}; }

PEAR_HOST_DEVICE float entropy_of(EntropyPart row) {
  return logf(row.sum) - row.weighted / row.sum;
}

}  // namespace pear
