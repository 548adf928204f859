// Importance weights and their statistics on CUDA: one cooperative launch, sums in float64. Floor:
// 13 bytes per token (two log-probs and a mask read, a weight written), 17 with factors; later
// phases read from cache.
//
// A trajectory's mean, its number of decisions, its suffix sums and its normaliser each need the
// one before from the whole trajectory, so the phases are set apart by waits of the whole grid.
#include <ATen/ops/empty_like.h>

#include "cuda/chunk_warps.h"
#include "ops.h"
#include "suffix_scan.h"
#include "weights_math.h"

namespace pear::cuda {
namespace {

struct ChunkTotals {
  double ratio_sum;  // from count_decisions
  int64_t decisions;
  SuffixRun run;                                    // from total_runs
  double weight_sum, rounded_sum, rounded_squares;  // from weigh_decisions; rounded: in float32
};

// What a thread, then a block, adds to the statistics. Counts are exact in a double.
enum BlockStatistic {
  kDecisions = kWeightStatistics,  // the sums come first, in the order of WeightStatistic
  kTrajectories,
  kBlockStatistics,
};

struct Pack {
  const float *logprobs, *behavior;
  const bool* mask;
  const float* factor;  // null = 1
  float* weights;
  ChunkLayout layout;
  WeightParams params;
  ChunkTotals* chunks;
  double* by_block;       // [blocks, kBlockStatistics]
  unsigned* blocks_done;  // zeroed by count_decisions
  float* stats;           // [kWeightStatistics, 2]
};

struct Token {
  double log_ratio = 0.0;
  bool decision = false;
  bool has_behavior = true;  // a behaviour log-prob that can be one
  float factor = 1.0f;
};

template <bool kFactor = false, typename Body>
__device__ __forceinline__ void for_decisions_from_right(const Pack& pack, const Chunk& chunk,
                                                         Body&& body) {
  // What is off the mask is read too, so that the loads need not wait for the mask, and ignored.
  const auto load = [&](int64_t t) {
    const float behavior = pack.behavior[t];
    return Token{double(pack.logprobs[t]) - double(behavior), pack.mask[t], is_logprob(behavior),
                 kFactor ? pack.factor[t] : 1.0f};
  };
  for_tokens_from_right(chunk, load, body);
}

template <typename Get>
__device__ __forceinline__ auto sum_trajectory(const Pack& pack, const Chunk& chunk, Get&& get) {
  return sum_chunks(chunk.first, chunk.last, [&](int64_t id) { return get(pack.chunks[id]); });
}

__device__ __forceinline__ int64_t decisions_of(const Pack& pack, const Chunk& chunk) {
  return sum_trajectory(pack, chunk, [](const ChunkTotals& c) { return c.decisions; });
}

// What the trajectory's log ratios are centred on.
__device__ __forceinline__ double baseline_of(const Pack& pack, const Chunk& chunk) {
  if (!pack.params.subtract_mean) return 0.0;
  const double sum = sum_trajectory(pack, chunk, [](const ChunkTotals& c) { return c.ratio_sum; });
  return sum / double(decisions_of(pack, chunk));
}

// Which decision of its trajectory a token is, from right to left. Only blocks care.
struct DecisionCounter {
  int64_t decisions;  // of the trajectory
  int64_t next;       // decisions to the left of what has been visited

  __device__ __forceinline__ DecisionCounter(const Pack& pack, const Chunk& chunk)
      : decisions(0), next(0) {
    if (pack.params.block_size == 1) return;
    decisions = decisions_of(pack, chunk);
    next = sum_chunks(chunk.first, chunk.id + 1,
                      [&](int64_t id) { return pack.chunks[id].decisions; });
  }

  // Whether this lane's token ends a block; every lane of the warp calls it, once per 32 tokens.
  __device__ __forceinline__ bool ends_block(bool decision, int64_t block_size) {
    if (block_size == 1) return decision;
    const unsigned lanes = __ballot_sync(kFullWarp, decision);
    next -= __popc(lanes);
    const int64_t k = next + __popc(lanes & ((1u << lane_id()) - 1));
    return decision && pear::ends_block(k, decisions, block_size);
  }
};

// Lane i's run from lane i up.
__device__ __forceinline__ SuffixRun warp_suffix_run(SuffixRun run) {
#pragma unroll
  for (int lanes = 1; lanes < kWarp; lanes *= 2) {
    const SuffixRun right = {__shfl_down_sync(kFullWarp, run.total, lanes),
                             __shfl_down_sync(kFullWarp, run.at_block_end, lanes),
                             __shfl_down_sync(kFullWarp, int(run.ends_block), lanes) != 0};
    if (lane_id() + lanes < kWarp) run = join(run, right);
  }
  return run;
}

__device__ __forceinline__ SuffixRun first_lane(const SuffixRun& run) {
  return {__shfl_sync(kFullWarp, run.total, 0), __shfl_sync(kFullWarp, run.at_block_end, 0),
          __shfl_sync(kFullWarp, int(run.ends_block), 0) != 0};
}

__device__ __forceinline__ void count_decisions(const Pack& pack,
                                                double (&stats)[kBlockStatistics]) {
  if (blockIdx.x == 0 && threadIdx.x == 0) *pack.blocks_done = 0;
  for_chunks(pack.layout, [&](const Chunk& chunk) {
    double ratio_sum = 0.0;
    int64_t decisions = 0;
    for_decisions_from_right(pack, chunk, [&](int64_t, bool, const Token& token) {
      if (!token.decision) return;
      CUDA_KERNEL_ASSERT(token.has_behavior &&
                         "behavior_logprobs are NaN, infinite or positive on a decision");
      ratio_sum += token.log_ratio;
      decisions += 1;
    });
    stats[kLogRatio] += ratio_sum;
    stats[kDecisions] += double(decisions);
    ratio_sum = warp_sum(ratio_sum);
    decisions = warp_sum(decisions);
    if (lane_id() == 0) {
      pack.chunks[chunk.id].ratio_sum = ratio_sum;
      pack.chunks[chunk.id].decisions = decisions;
    }
  });
}

__device__ __forceinline__ void total_runs(const Pack& pack) {
  const WeightParams& p = pack.params;
  for_chunks(pack.layout, [&](const Chunk& chunk) {
    const double mean = baseline_of(pack, chunk);
    DecisionCounter counter(pack, chunk);
    SuffixRun run = empty_run();
    for_decisions_from_right(pack, chunk, [&](int64_t, bool, const Token& token) {
      const bool ends = counter.ends_block(token.decision, p.block_size);
      const SuffixRun here =
          token.decision ? one_decision(discounted_log_ratio(token.log_ratio - mean, p), ends)
                         : empty_run();
      run = join(first_lane(warp_suffix_run(here)), run);
    });
    if (lane_id() == 0) pack.chunks[chunk.id].run = run;
  });
}

__device__ __forceinline__ double suffix_after(const Pack& pack, const Chunk& chunk, int64_t id) {
  return sum_chunks(id + 1, chunk.last, [&](int64_t at) { return pack.chunks[at].run.total; });
}

// The scan's state at the right end of a chunk.
__device__ __forceinline__ SuffixState state_after(const Pack& pack, const Chunk& chunk) {
  SuffixState state = {suffix_after(pack, chunk, chunk.id), 0.0};
  if (pack.params.block_size == 1) return state;
  // The open block's end is in the nearest chunk to the right that has any.
  for (int64_t base = chunk.id + 1; base < chunk.last; base += kWarp) {
    const int64_t id = base + lane_id();
    const unsigned ends =
        __ballot_sync(kFullWarp, id < chunk.last && pack.chunks[id].run.ends_block);
    if (ends == 0) continue;
    const int64_t nearest = base + __ffs(ends) - 1;
    state.log_weight = suffix_after(pack, chunk, nearest) + pack.chunks[nearest].run.at_block_end;
    break;
  }
  return state;
}

template <bool kFactor>
__device__ __forceinline__ void weigh_decisions(const Pack& pack,
                                                double (&stats)[kBlockStatistics]) {
  const WeightParams& p = pack.params;
  for_chunks(pack.layout, [&](const Chunk& chunk) {
    const double mean = baseline_of(pack, chunk);
    DecisionCounter counter(pack, chunk);
    SuffixState state = {0.0, 0.0};
    if (p.variant == Variant::kSequence) {
      const double sum =
          sum_trajectory(pack, chunk, [](const ChunkTotals& c) { return c.run.total; });
      const int64_t decisions = p.tau == 0.0 ? 0 : decisions_of(pack, chunk);
      state.log_weight = sequence_log_weight(sum, decisions, p);
    } else if (p.variant == Variant::kToken || p.variant == Variant::kBlock) {
      state = state_after(pack, chunk);
    }
    double weight_sum = 0.0, rounded_sum = 0.0, rounded_squares = 0.0;
    for_decisions_from_right<kFactor>(pack, chunk, [&](int64_t t, bool inside, const Token& token) {
      const double ratio = token.log_ratio - mean;
      double log_weight = state.log_weight;
      if (p.variant == Variant::kToken || p.variant == Variant::kBlock) {
        const bool ends = counter.ends_block(token.decision, p.block_size);
        const SuffixRun from_here = warp_suffix_run(
            token.decision ? one_decision(discounted_log_ratio(ratio, p), ends) : empty_run());
        log_weight = apply(from_here, state).log_weight;
        state = apply(first_lane(from_here), state);
      } else if (p.variant == Variant::kOwn) {
        log_weight = clipped_log_ratio(ratio, p);
      }
      if (token.decision) {
        stats[kRatioLow] += ratio < p.ratio_low;
        stats[kRatioHigh] += ratio > p.ratio_high;
        stats[kWeightFloor] += log_weight <= p.weight_low;
        stats[kWeightCeiling] += log_weight >= p.weight_high;
        const double weight = weight_of(log_weight, p);
        float rounded = static_cast<float>(weight);
        if constexpr (kFactor) rounded *= token.factor;  // the scale that normalises commutes
        weight_sum += weight;
        rounded_sum += rounded;
        rounded_squares += double(rounded) * rounded;
        pack.weights[t] = rounded;
      } else if (inside) {
        pack.weights[t] = 0.0f;
      }
    });
    if (!p.normalize) stats[kWeight] += rounded_sum;
    weight_sum = warp_sum(weight_sum);
    rounded_sum = warp_sum(rounded_sum);
    rounded_squares = warp_sum(rounded_squares);
    if (lane_id() == 0) {
      ChunkTotals& totals = pack.chunks[chunk.id];
      totals.weight_sum = weight_sum;
      totals.rounded_sum = rounded_sum;
      totals.rounded_squares = rounded_squares;
    }
  });
}

__device__ __forceinline__ void normalize_weights(const Pack& pack, const Chunk& chunk,
                                                  int64_t decisions,
                                                  double (&stats)[kBlockStatistics]) {
  const double sum = sum_trajectory(pack, chunk, [](const ChunkTotals& c) { return c.weight_sum; });
  const double scale = double(decisions) / sum;
  for (int64_t t = chunk.begin + lane_id(); t < chunk.end; t += kWarp) {
    if (!pack.mask[t]) continue;
    const float weight = static_cast<float>(pack.weights[t] * scale);
    pack.weights[t] = weight;
    stats[kWeight] += weight;
  }
}

__device__ __forceinline__ void finish_trajectories(const Pack& pack,
                                                    double (&stats)[kBlockStatistics]) {
  for_chunks(pack.layout, [&](const Chunk& chunk) {
    const bool reports = chunk.id == chunk.first;  // one chunk speaks for its trajectory
    if (!reports && !pack.params.normalize) return;
    const int64_t decisions = decisions_of(pack, chunk);
    if (decisions == 0) return;
    if (pack.params.normalize) normalize_weights(pack, chunk, decisions, stats);
    if (!reports) return;
    const double sum =
        sum_trajectory(pack, chunk, [](const ChunkTotals& c) { return c.rounded_sum; });
    const double squares =
        sum_trajectory(pack, chunk, [](const ChunkTotals& c) { return c.rounded_squares; });
    if (lane_id() != 0) return;
    // All weights 0 in float32: no sample counts. A common scale changes nothing.
    stats[kEffectiveSample] += squares == 0.0 ? 0.0 : sum * sum / (double(decisions) * squares);
    stats[kTrajectories] += 1.0;
  });
}

// Adds up the threads of the block, then, in the last block to come here, the blocks: each time in
// one order, so atomics decide who adds but not what.
__device__ __forceinline__ void reduce_statistics(const Pack& pack,
                                                  const double (&stats)[kBlockStatistics]) {
  __shared__ double by_warp[kChunkWarps][kBlockStatistics];
  __shared__ double sums[kBlockStatistics];
  __shared__ bool is_last;
  const int warp = threadIdx.x / kWarp;
#pragma unroll
  for (int which = 0; which < kBlockStatistics; ++which) {
    const double sum = warp_sum(stats[which]);
    if (lane_id() == 0) by_warp[warp][which] = sum;
  }
  __syncthreads();
  if (threadIdx.x < kBlockStatistics) {
    double sum = 0.0;
    for (int w = 0; w < kChunkWarps; ++w) sum += by_warp[w][threadIdx.x];
    pack.by_block[int64_t(blockIdx.x) * kBlockStatistics + threadIdx.x] = sum;
    __threadfence();
  }
  __syncthreads();
  if (threadIdx.x == 0) is_last = atomicAdd(pack.blocks_done, 1u) == gridDim.x - 1;
  __syncthreads();
  if (!is_last) return;
  __threadfence();
  for (int which = warp; which < kBlockStatistics; which += kChunkWarps) {
    const double sum = sum_chunks(0, gridDim.x, [&](int64_t block) {
      return pack.by_block[block * kBlockStatistics + which];
    });
    if (lane_id() == 0) sums[which] = sum;
  }
  __syncthreads();
  if (threadIdx.x < kWeightStatistics) {
    const int which = threadIdx.x;
    const int count = which == kEffectiveSample ? kTrajectories : kDecisions;
    pack.stats[2 * which] = static_cast<float>(sums[which]);
    pack.stats[2 * which + 1] = static_cast<float>(sums[count]);
  }
}

template <bool kFactor>
PEAR_CHUNK_KERNEL weigh_pack(Pack pack) {
  const WeightParams& p = pack.params;
  double stats[kBlockStatistics] = {};
  count_decisions(pack, stats);
  if (p.variant != Variant::kNone && p.variant != Variant::kOwn) {
    if (p.subtract_mean || p.block_size > 1) sync_grid();
    total_runs(pack);
  }
  sync_grid();
  weigh_decisions<kFactor>(pack, stats);
  sync_grid();
  finish_trajectories(pack, stats);
  reduce_statistics(pack, stats);
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
  check_same_device(behavior_logprobs, "behavior_logprobs", logprobs);
  check_mask(mask, T, logprobs);
  if (factor) {
    check_vector(*factor, "factor", T, at::kFloat);
    check_same_device(*factor, "factor", logprobs);
  }
  const WeightParams params = weight_params(variant, gamma, block_size, ratio_low, ratio_high,
                                            weight_low, weight_high, subtract_mean, normalize, tau);
  const ChunkLayout layout = chunk_layout(cu_seqlens, logprobs);
  const DeviceGuard guard(logprobs.device());
  const int64_t blocks = chunk_blocks(layout);

  Tensor weights = at::empty_like(logprobs);
  Tensor stats = at::empty({kWeightStatistics, 2}, logprobs.options());
  const Scratch<ChunkTotals> chunks(layout.chunks(), logprobs);
  const Scratch<double> by_block(blocks * kBlockStatistics, logprobs);
  const Scratch<unsigned> blocks_done(1, logprobs);
  launch<true>(factor ? weigh_pack<true> : weigh_pack<false>, blocks, kChunkThreads,
               Pack{logprobs.const_data_ptr<float>(), behavior_logprobs.const_data_ptr<float>(),
                    mask.const_data_ptr<bool>(), factor ? factor->const_data_ptr<float>() : nullptr,
                    weights.mutable_data_ptr<float>(), layout, params, chunks.data, by_block.data,
                    blocks_done.data, stats.mutable_data_ptr<float>()});
  return {weights, stats};
}

}  // namespace pear::cuda
