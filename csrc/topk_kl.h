// The divergence from the stored top-k of the behaviour policy, entry by entry (docs/method.md,
// Base loss).
#pragma once

#include <cmath>

#include "host_device.h"

namespace pear {

// What the target policy has left outside the top-k is taken as at least so much: log-probs of
// float32 do not tell less from nothing.
constexpr float kSmallestRest = 1.0f / (1 << 23);

struct TopkTail {
  float kl, outside_factor;  // of the rest as one more token; no rest, no term
};

// in_q, in_pi: the mass of the top-k under the behaviour and the target policy.
PEAR_HOST_DEVICE TopkTail bucket_tail(double in_q, double in_pi) {
  const float q = static_cast<float>(1.0 - in_q);
  if (!(q > 0.0f)) return {0.0f, 1.0f};
  const float pi = fmaxf(static_cast<float>(1.0 - in_pi), kSmallestRest);
  return {q * (logf(q) - logf(pi)), 1.0f - q / pi};
}

// d (grad * logprob + kl_grad * KL) / d logit of an entry.
PEAR_HOST_DEVICE float entry_gradient(float log_pi, float q, float grad, float kl_grad,
                                      bool is_target) {
  const float pi = expf(log_pi);
  return kl_grad * (pi - q) - grad * (is_target ? expm1f(log_pi) : pi);
}

}  // namespace pear
