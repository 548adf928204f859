// The divergence from the stored top-k of the behaviour policy, entry by entry (docs/method.md,
// Base loss).
#pragma once

#include <cmath>

#include "host_device.h"

namespace pear {

// The mass outside the top-k is taken as at least e^-80: in float32 its tokens' softmax is nothing
// below, and the factor that they are multiplied by is finite.
constexpr float kSmallestLogRest = -80.0f;

struct TopkTail {
  float kl, outside_factor;  // of the rest as one more token; no rest, no term
};

// in_q: the mass of the top-k under the behaviour policy; log_rest: the log of what is outside
// under the target policy.
PEAR_HOST_DEVICE TopkTail bucket_tail(double in_q, float log_rest) {
  const float q = static_cast<float>(1.0 - in_q);
  if (!(q > 0.0f)) return {0.0f, 1.0f};
  log_rest = fmaxf(log_rest, kSmallestLogRest);
  return {q * (logf(q) - log_rest), 1.0f - q * expf(-log_rest)};
}

// d (grad * logprob + kl_grad * KL) / d logit of an entry.
PEAR_HOST_DEVICE float entry_gradient(float log_pi, float q, float grad, float kl_grad,
                                      bool is_target) {
  const float pi = expf(log_pi);
  return kl_grad * (pi - q) - grad * (is_target ? expm1f(log_pi) : pi);
}

}  // namespace pear
