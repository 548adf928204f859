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

struct Logprob {
  float logprob, lse;
};

// Token t's log-probability and log-sum-exp from stats [ranks, 3, T]. In rank order, so every rank
// computes the same bits.
PEAR_HOST_DEVICE Logprob combine_ranks(const float* stats, int64_t ranks, int64_t T, int64_t t) {
  const float *maxima = stats + kRowMax * T + t, *sums = stats + kRowSumExp * T + t;
  const float* targets = stats + kTargetLogit * T + t;
  const int64_t stride = kLogprobStatistics * T;
  float max = kNegativeInfinity, target = kNegativeInfinity;
  for (int64_t r = 0; r < ranks; ++r) {
    max = maxima[r * stride] > max ? maxima[r * stride] : max;
    // A NaN target logit must win: comparisons with it are false.
    if (!(targets[r * stride] <= target)) target = targets[r * stride];
  }
  float sum = 0.0f;
  for (int64_t r = 0; r < ranks; ++r) {
    const float part = sums[r * stride], row_max = maxima[r * stride];
    sum += row_max == kNegativeInfinity ? part : part * expf(row_max - max);
  }
  const float log_sum = logf(sum);
  return {(target - max) - log_sum,  // not target - lse, which rounds as coarsely as max
          max + log_sum};
}

}  // namespace pear
