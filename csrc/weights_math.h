// One decision at a time, what the CPU and CUDA kernels share (docs/method.md, Weights).
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <optional>

#include "host_device.h"
#include "ops.h"

namespace pear {

struct WeightParams {
  Variant variant;
  double log_gamma;
  int64_t block_size;  // 1 but for the block variant
  double ratio_low, ratio_high;
  double weight_low, weight_high;
  bool subtract_mean, normalize;
  double tau;  // 0 = the sequence variant takes the sum
};

inline WeightParams weight_params(int64_t variant, double gamma, int64_t block_size,
                                  double ratio_low, double ratio_high, double weight_low,
                                  double weight_high, bool subtract_mean, bool normalize,
                                  std::optional<double> tau) {
  TORCH_CHECK_VALUE(0 <= variant && variant <= 4, "variant must be 0..4, got ", variant);
  TORCH_CHECK_VALUE(gamma > 0.0 && gamma <= 1.0, "gamma must be in (0, 1], got ", gamma);
  TORCH_CHECK_VALUE(block_size >= 1, "block_size must be >= 1, got ", block_size);
  TORCH_CHECK_VALUE(!tau || *tau > 0.0, "tau must be > 0, got ", tau.value_or(0.0));
  const auto which = static_cast<Variant>(variant);
  return {which,
          std::log(gamma),
          which == Variant::kBlock ? block_size : 1,
          ratio_low,
          ratio_high,
          weight_low,
          weight_high,
          subtract_mean,
          normalize,
          tau.value_or(0.0)};
}

// What rounding leaves of log 1 above 0.
constexpr float kPositiveTolerance = 1e-5f;

// Below it no token was ever sampled: engines write -9999 where they have no log-probability.
constexpr float kLeastLogprob = -1000.0f;

// Whether x can be the log-probability of a token that was sampled: not NaN, +-inf, positive or a
// sentinel.
PEAR_HOST_DEVICE bool is_logprob(float x) { return kLeastLogprob <= x && x <= kPositiveTolerance; }

// Comparisons with NaN are false, so NaN passes through and stays visible.
PEAR_HOST_DEVICE double clip(double x, double low, double high) {
  return x < low ? low : (x > high ? high : x);
}

PEAR_HOST_DEVICE double clipped_log_ratio(double log_ratio, const WeightParams& p) {
  return clip(log_ratio, p.ratio_low, p.ratio_high);
}

// What decision j adds to the log weight of every decision before it.
PEAR_HOST_DEVICE double discounted_log_ratio(double log_ratio, const WeightParams& p) {
  const double clipped = clipped_log_ratio(log_ratio, p);
  return p.variant == Variant::kSequence ? clipped : clipped + p.log_gamma;
}

// The log weight of a whole trajectory of `decisions`, from the sum of its clipped log ratios.
PEAR_HOST_DEVICE double sequence_log_weight(double sum, int64_t decisions, const WeightParams& p) {
  return p.tau == 0.0 ? sum : p.tau * sum / double(decisions);
}

// Plain SFT weighs 1 whatever the clips are.
PEAR_HOST_DEVICE double weight_of(double log_weight, const WeightParams& p) {
  if (p.variant == Variant::kNone) return 1.0;
  return exp(clip(log_weight, p.weight_low, p.weight_high));
}

// Whether decision k of n closes a block: log weights are taken there and shared by its block.
PEAR_HOST_DEVICE bool ends_block(int64_t k, int64_t n, int64_t block_size) {
  return k == n - 1 || (k + 1) % block_size == 0;
}

}  // namespace pear
