// What a run of tokens does to a scan that goes through a trajectory from right to left.
#pragma once

#include "host_device.h"

namespace pear {

// The scan's state is (suffix, log_weight): the sum of what is to the right, and the log weight of
// the block that is open. A decision that ends a block takes log_weight = suffix; then every
// decision adds its own term to suffix. A run of decisions adds `total` to suffix, and if a block
// ends in it, leaves log_weight = suffix before the run + `at_block_end` (of its leftmost block
// end).
struct SuffixRun {
  double total, at_block_end;
  bool ends_block;
};

PEAR_HOST_DEVICE SuffixRun empty_run() { return {0.0, 0.0, false}; }

PEAR_HOST_DEVICE SuffixRun one_decision(double term, bool ends_block) {
  return {term, 0.0, ends_block};
}

// The run `left` of a trajectory followed, towards its end, by `right`. Associative.
PEAR_HOST_DEVICE SuffixRun join(const SuffixRun& left, const SuffixRun& right) {
  return {right.total + left.total,
          left.ends_block ? right.total + left.at_block_end : right.at_block_end,
          left.ends_block || right.ends_block};
}

struct SuffixState {
  double suffix, log_weight;
};

// The state to the left of a run, from that to its right.
PEAR_HOST_DEVICE SuffixState apply(const SuffixRun& run, const SuffixState& state) {
  return {state.suffix + run.total,
          run.ends_block ? state.suffix + run.at_block_end : state.log_weight};
}

}  // namespace pear
