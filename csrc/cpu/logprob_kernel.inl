// One row of logits at a time, kLanes columns a step, for the instruction set that is in force
// here. Included by logprob.cpp once per instruction set, each time inside another namespace, with
// PEAR_LANES floats to a register: the compiler takes wider vectors apart into single floats
// wherever they are compared or converted, which costs ten times the work.

constexpr int64_t kLanes = PEAR_LANES;
using f32s = float __attribute__((vector_size(4 * PEAR_LANES)));
using i32s = int32_t __attribute__((vector_size(4 * PEAR_LANES)));
using u32s = uint32_t __attribute__((vector_size(4 * PEAR_LANES)));
using u16s = uint16_t __attribute__((vector_size(2 * PEAR_LANES)));

constexpr int64_t kUnroll = 4;    // independent vectors, to hide the latency of each one's chain
constexpr int64_t kBlock = 2048;  // columns whose maximum is taken before their exponentials
constexpr float kInfinity = std::numeric_limits<float>::infinity();

static inline f32s splat(float x) { return f32s{} + x; }

static inline f32s load(const float* p) {
  f32s v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

static inline f32s load(const c10::BFloat16* p) {
  u16s half;
  std::memcpy(&half, p, sizeof half);
  return (f32s)(__builtin_convertvector(half, u32s) << 16);
}

static inline f32s load(const c10::Half* p) {
#if PEAR_LANES == 16
  return (f32s)_mm512_maskz_cvtph_ps(0xffff,
                                     _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif PEAR_LANES == 8
  return (f32s)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  f32s v;
  for (int i = 0; i < kLanes; ++i) v[i] = static_cast<float>(p[i]);
  return v;
#endif
}

static inline void store(float* p, f32s v) { std::memcpy(p, &v, sizeof v); }

// Round to nearest even, as torch does; NaN stays NaN.
static inline void store(c10::BFloat16* p, f32s v) {
  const u32s bits = (u32s)v;
  const u32s rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const u32s is_nan = (u32s)(v != v);
  const u32s kept = (rounded & ~is_nan) | (is_nan & 0x7fc0u);
  const u16s half = __builtin_convertvector(kept, u16s);
  std::memcpy(p, &half, sizeof half);
}

static inline void store(c10::Half* p, f32s v) {
#if PEAR_LANES == 16
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_maskz_cvtps_ph(0xffff, (__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif PEAR_LANES == 8
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kLanes; ++i) p[i] = static_cast<c10::Half>(v[i]);
#endif
}

// exp to within 2 ulp; 0 below the smallest normal, NaN for NaN. Range reduction by ln 2 in two
// parts, then a degree-5 polynomial (Cephes coefficients).
static inline f32s exp_all(f32s x) {
  const f32s low = splat(-87.3365f), high = splat(88.3762f);
  const i32s underflow = x < low;
  x = underflow ? low : x;
  x = x > high ? high : x;
  const f32s shift = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const f32s shifted = x * 1.44269504088896341f + shift;
  const f32s k = shifted - shift;
  f32s r = x - k * 0.693359375f;
  r = r + k * 2.12194440e-4f;
  f32s p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const f32s y = p * (r * r) + r + 1.0f;
  const i32s exponent = ((i32s)shifted - 0x4B400000 + 127) << 23;
  const f32s result = y * (f32s)exponent;
  return underflow ? f32s{} : result;
}

static inline float exp1(float x) { return exp_all(splat(x))[0]; }

static inline float horizontal_max(f32s v) {
  float m = v[0];
  for (int i = 1; i < kLanes; ++i) m = v[i] > m ? v[i] : m;
  return m;
}

static inline float horizontal_sum(f32s v) {
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) v[i] += v[i + width];
  }
  return v[0];
}

// The last n % kLanes columns, padded with -inf (which adds nothing to a maximum or a sum of exp).
template <typename T>
static inline f32s load_tail(const T* p, int64_t n) {
  f32s v = splat(-kInfinity);
  for (int64_t i = 0; i < n; ++i) v[i] = static_cast<float>(p[i]);
  return v;
}

template <typename T>
static float block_max(const T* x, int64_t n) {
  f32s max[kUnroll];
  for (auto& m : max) m = splat(-kInfinity);
  int64_t i = 0;
  for (; i + kUnroll * kLanes <= n; i += kUnroll * kLanes) {
    for (int u = 0; u < kUnroll; ++u) {
      const f32s v = load(x + i + u * kLanes);
      max[u] = v > max[u] ? v : max[u];
    }
  }
  for (; i < n; i += kLanes) {
    const f32s v = n - i >= kLanes ? load(x + i) : load_tail(x + i, n - i);
    max[0] = v > max[0] ? v : max[0];
  }
  for (int u = 1; u < kUnroll; ++u) max[0] = max[u] > max[0] ? max[u] : max[0];
  return horizontal_max(max[0]);
}

// The sum of exp(x - max) and, for the entropy, that of (x - max) exp(x - max).
template <bool kEntropy>
struct BlockSums {
  f32s sum = {}, weighted = {};

  void add(f32s exponent) {
    const f32s e = exp_all(exponent);
    sum += e;
    if constexpr (kEntropy) {
      const f32s low = splat(-1000.0f);  // -inf times exp(-inf) adds nothing
      weighted += e * (exponent < low ? low : exponent);
    }
  }
};

template <bool kEntropy, typename T>
static void add_block(const T* x, int64_t n, float max, float* sum, float* weighted) {
  BlockSums<kEntropy> sums[kUnroll];
  int64_t i = 0;
  for (; i + kUnroll * kLanes <= n; i += kUnroll * kLanes) {
    for (int u = 0; u < kUnroll; ++u) sums[u].add(load(x + i + u * kLanes) - max);
  }
  for (; i < n; i += kLanes) {
    sums[0].add((n - i >= kLanes ? load(x + i) : load_tail(x + i, n - i)) - max);
  }
  *sum += horizontal_sum((sums[0].sum + sums[1].sum) + (sums[2].sum + sums[3].sum));
  if constexpr (kEntropy) {
    *weighted += horizontal_sum((sums[0].weighted + sums[1].weighted) +
                                (sums[2].weighted + sums[3].weighted));
  }
}

// Online over blocks: the running sums are rescaled when a block raises the maximum. One read from
// memory. row_weighted is written where the entropy is wanted.
template <bool kEntropy, typename T>
static void row_sums(const T* x, int64_t n, float* row_max, float* row_sum_exp,
                     float* row_weighted) {
  float max = -kInfinity, sum = 0.0f, weighted = 0.0f;
  for (int64_t start = 0; start < n; start += kBlock) {
    const int64_t columns = std::min(kBlock, n - start);
    const float block = block_max(x + start, columns);
    if (block > max) {
      const float scale = exp1(max - block);
      if constexpr (kEntropy) weighted = (weighted + finite_exponent(max - block) * sum) * scale;
      sum *= scale;
      max = block;
    }
    // A block of nothing but -inf adds nothing; -inf - -inf would be NaN. NaN columns must be seen.
    if (max == -kInfinity) {
      for (int64_t i = start; i < start + columns; ++i) {
        if (const float v = static_cast<float>(x[i]); v != v) sum = v;
      }
      continue;
    }
    add_block<kEntropy>(x + start, columns, max, &sum, &weighted);
  }
  *row_max = max;
  *row_sum_exp = sum;
  if constexpr (kEntropy) *row_weighted = weighted;
}

// out = scale * exp(x - lse); out may be x.
template <typename T>
static void scaled_softmax_row(const T* x, T* out, int64_t n, float lse, float scale) {
  int64_t i = 0;
  for (; i + kUnroll * kLanes <= n; i += kUnroll * kLanes) {
    f32s v[kUnroll];
    for (int u = 0; u < kUnroll; ++u) v[u] = exp_all(load(x + i + u * kLanes) - lse) * scale;
    for (int u = 0; u < kUnroll; ++u) store(out + i + u * kLanes, v[u]);
  }
  for (; i + kLanes <= n; i += kLanes) store(out + i, exp_all(load(x + i) - lse) * scale);
  if (i < n) {
    const f32s tail = exp_all(load_tail(x + i, n - i) - lse) * scale;
    for (int64_t j = 0; i + j < n; ++j) out[i + j] = static_cast<T>(tail[j]);
  }
}
