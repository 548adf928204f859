// Importance weights and their statistics on CPU: threads over trajectories, sums in float64.
#include <ATen/Parallel.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <array>
#include <numeric>
#include <vector>

#include "cpu/segments.h"
#include "ops.h"
#include "weights_math.h"

namespace pear::cpu {
namespace {

// (sum, count) of every WeightStatistic.
using Statistics = std::array<std::array<double, 2>, kWeightStatistics>;

struct Trajectory {
  const float *logprobs, *behavior;
  const bool* mask;
  const float* factor;  // null = 1
  float* weights;
  int64_t tokens;

  // On a decision.
  bool is_bad(int64_t t) const { return mask[t] && !is_logprob(behavior[t]); }

  double log_ratio(int64_t t) const { return double(logprobs[t]) - double(behavior[t]); }
};

// Adds one trajectory's statistics once its weights are final.
void count_weights(const Trajectory& x, int64_t decisions, Statistics& stats) {
  double sum = 0.0, squares = 0.0;
  for (int64_t t = 0; t < x.tokens; ++t) {
    sum += x.weights[t];
    squares += double(x.weights[t]) * x.weights[t];
  }
  stats[kWeight][0] += sum;
  // All weights 0 in float32: no sample counts.
  stats[kEffectiveSample][0] += squares == 0.0 ? 0.0 : sum * sum / (decisions * squares);
  stats[kEffectiveSample][1] += 1;
  for (int which = 0; which <= kWeight; ++which) stats[which][1] += decisions;
}

// Returns the number of decisions whose behaviour log-prob is none.
int64_t weigh(const Trajectory& x, const WeightParams& p, Statistics& stats) {
  int64_t decisions = 0, bad = 0;
  double ratio_sum = 0.0;
  for (int64_t t = 0; t < x.tokens; ++t) {
    if (!x.mask[t]) continue;
    decisions += 1;
    bad += x.is_bad(t);
    ratio_sum += x.log_ratio(t);
  }
  if (bad > 0) return bad;
  if (decisions == 0) {
    std::fill(x.weights, x.weights + x.tokens, 0.0f);
    return 0;
  }
  const double mean = p.subtract_mean ? ratio_sum / decisions : 0.0;
  stats[kLogRatio][0] += ratio_sum;

  double total = 0.0;
  for (int64_t t = 0; t < x.tokens; ++t) {
    if (!x.mask[t]) continue;
    const double ratio = x.log_ratio(t) - mean;
    stats[kRatioLow][0] += ratio < p.ratio_low;
    stats[kRatioHigh][0] += ratio > p.ratio_high;
    if (p.variant == Variant::kSequence) total += discounted_log_ratio(ratio, p);
  }

  double suffix = 0.0, weight_sum = 0.0;
  double log_weight = sequence_log_weight(total, decisions, p);
  int64_t k = decisions;
  for (int64_t t = x.tokens - 1; t >= 0; --t) {
    if (!x.mask[t]) {
      x.weights[t] = 0.0f;
      continue;
    }
    k -= 1;
    if (p.variant == Variant::kNone) {
      log_weight = 0.0;
    } else if (p.variant == Variant::kOwn) {
      log_weight = clipped_log_ratio(x.log_ratio(t) - mean, p);
    } else if (p.variant != Variant::kSequence) {
      if (ends_block(k, decisions, p.block_size)) log_weight = suffix;
      suffix += discounted_log_ratio(x.log_ratio(t) - mean, p);
    }
    stats[kWeightFloor][0] += log_weight <= p.weight_low;
    stats[kWeightCeiling][0] += log_weight >= p.weight_high;
    const double weight = weight_of(log_weight, p);
    weight_sum += weight;
    x.weights[t] = static_cast<float>(weight);
    if (x.factor != nullptr) x.weights[t] *= x.factor[t];  // the scale that normalises commutes
  }
  if (p.normalize) {
    const double scale = decisions / weight_sum;
    for (int64_t t = 0; t < x.tokens; ++t) {
      if (x.mask[t]) x.weights[t] = static_cast<float>(x.weights[t] * scale);
    }
  }
  count_weights(x, decisions, stats);
  return 0;
}

const char* why_bad(float behavior_logprob) {
  if (std::isnan(behavior_logprob)) return "as if it had never been filled in";
  if (behavior_logprob > 0) return "so it is no log-probability (store log p, not p, not -log p)";
  if (std::isfinite(behavior_logprob))
    return "which engines write where they have no log-probability";
  return "so the behaviour policy cannot have sampled that token";
}

}  // namespace

std::tuple<Tensor, Tensor> pear_weights(const Tensor& logprobs, const Tensor& behavior_logprobs,
                                        const Tensor& mask, const Tensor& cu_seqlens,
                                        int64_t variant, double gamma, int64_t block_size,
                                        double ratio_low, double ratio_high, double weight_low,
                                        double weight_high, bool subtract_mean, bool normalize,
                                        std::optional<double> tau, const OptionalTensor& factor) {
  const int64_t T = logprobs.numel();
  check_vector(logprobs, "logprobs", T, at::kFloat);
  check_vector(behavior_logprobs, "behavior_logprobs", T, at::kFloat);
  check_vector(mask, "mask", T, at::kBool);
  if (factor) check_vector(*factor, "factor", T, at::kFloat);
  const WeightParams params = weight_params(variant, gamma, block_size, ratio_low, ratio_high,
                                            weight_low, weight_high, subtract_mean, normalize, tau);
  const int32_t* bounds = segment_bounds(cu_seqlens, logprobs);
  const int64_t segments = cu_seqlens.size(0) - 1;

  Tensor weights = at::empty_like(logprobs);
  std::vector<Statistics> per_segment(segments, Statistics{});
  std::vector<int64_t> bad(segments, 0);
  const float* lp = logprobs.const_data_ptr<float>();
  const float* lb = behavior_logprobs.const_data_ptr<float>();
  const bool* decision = mask.const_data_ptr<bool>();
  const float* factors = factor ? factor->const_data_ptr<float>() : nullptr;
  float* out = weights.mutable_data_ptr<float>();
  at::parallel_for(0, segments, 1, [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) {
      const int64_t start = bounds[s];
      const float* own = factors == nullptr ? nullptr : factors + start;
      bad[s] =
          weigh({lp + start, lb + start, decision + start, own, out + start, bounds[s + 1] - start},
                params, per_segment[s]);
    }
  });
  if (const auto first = std::find_if(bad.begin(), bad.end(), [](int64_t n) { return n > 0; });
      first != bad.end()) {
    const Trajectory pack = {lp, lb, decision, factors, out, T};
    const int64_t s = first - bad.begin();
    int64_t t = bounds[s];
    while (!pack.is_bad(t)) ++t;
    TORCH_CHECK_VALUE(false, "behavior_logprobs are no log-probabilities on ",
                      std::accumulate(bad.begin(), bad.end(), int64_t(0)), " of ",
                      std::count(decision, decision + T, true), " decisions, first at token ", t,
                      " of the pack (token ", t - bounds[s], " of trajectory ", s, "): ", lb[t],
                      ", ", why_bad(lb[t]),
                      "; score the trajectory again, take such tokens off the mask, or train plain "
                      "SFT (variant='none', behavior_logprobs=None)");
  }

  // Summed in segment order, so that the number of threads changes nothing.
  Tensor stats = at::zeros({kWeightStatistics, 2}, logprobs.options().dtype(at::kDouble));
  double* sums = stats.mutable_data_ptr<double>();
  for (const auto& segment : per_segment) {
    for (int which = 0; which < kWeightStatistics; ++which) {
      sums[2 * which] += segment[which][0];
      sums[2 * which + 1] += segment[which][1];
    }
  }
  return {weights, stats.to(at::kFloat)};
}

}  // namespace pear::cpu
