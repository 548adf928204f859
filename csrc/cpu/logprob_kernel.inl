// One row of logits at a time, two vectors of kLanes columns a step, for the instruction set that
// is in force here. Included by logprob.cpp once per instruction set, each time inside another
// namespace, with PEAR_LANES floats to a register: the compiler takes wider vectors apart into
// single floats wherever they are compared or converted, which costs ten times the work.

constexpr int64_t kLanes = PEAR_LANES;
using f32s = float __attribute__((vector_size(4 * PEAR_LANES)));
using i32s = int32_t __attribute__((vector_size(4 * PEAR_LANES)));
using u32s = uint32_t __attribute__((vector_size(4 * PEAR_LANES)));

constexpr int64_t kStep = 2 * kLanes;
constexpr int64_t kUnroll = 2;    // independent steps, to hide the latency of each one's chain
constexpr int64_t kBlock = 2048;  // columns whose maximum is taken before their exponentials
constexpr int64_t kAhead = 2048;  // bytes that backward asks for ahead of its loads
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLog2e = 1.44269504088896341f, kLn2 = 0.693147180559945309f;

static inline f32s splat(float x) { return f32s{} + x; }

// The second operand where one of them is NaN.
static inline f32s larger(f32s a, f32s b) {
#if PEAR_LANES == 16
  return (f32s)_mm512_maskz_max_ps(0xffff, (__m512)a, (__m512)b);
#elif PEAR_LANES == 8
  return (f32s)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}

static inline f32s smaller(f32s a, f32s b) {
#if PEAR_LANES == 16
  return (f32s)_mm512_maskz_min_ps(0xffff, (__m512)a, (__m512)b);
#elif PEAR_LANES == 8
  return (f32s)_mm256_min_ps((__m256)a, (__m256)b);
#else
  return a < b ? a : b;
#endif
}

// kStep columns. Which of them is in which place is up to load and store of the dtype.
struct Columns {
  f32s a, b;
};

static inline f32s load_vector(const float* p) {
  f32s x;
  std::memcpy(&x, p, sizeof x);
  return x;
}

static inline Columns load(const float* p) { return {load_vector(p), load_vector(p + kLanes)}; }

static inline void store(float* p, Columns x) {
  std::memcpy(p, &x.a, sizeof x.a);
  std::memcpy(p + kLanes, &x.b, sizeof x.b);
}

// The even columns and the odd ones: halves of a word need no shuffle.
static inline Columns load(const c10::BFloat16* p) {
  u32s pairs;
  std::memcpy(&pairs, p, sizeof pairs);
  return {(f32s)(pairs << 16), (f32s)(pairs & 0xffff0000u)};
}

// What rounds to nearest even, as torch does, once the lower half is cut off. Every NaN that a
// bfloat16 or arithmetic gives stays one; all ones would not.
static inline u32s rounded(f32s v) {
  const u32s bits = (u32s)v;
  return bits + ((bits >> 16) & 1u) + 0x7fffu;
}

static inline void store(c10::BFloat16* p, Columns x) {
  const u32s pairs = (rounded(x.a) >> 16) | (rounded(x.b) & 0xffff0000u);
  std::memcpy(p, &pairs, sizeof pairs);
}

static inline Columns load(const c10::Half* p) {
#if PEAR_LANES == 16
  const auto at = reinterpret_cast<const __m256i*>(p);
  return {(f32s)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(at)),
          (f32s)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(at + 1))};
#elif PEAR_LANES == 8
  const auto at = reinterpret_cast<const __m128i*>(p);
  return {(f32s)_mm256_cvtph_ps(_mm_loadu_si128(at)),
          (f32s)_mm256_cvtph_ps(_mm_loadu_si128(at + 1))};
#else
  Columns x;
  for (int i = 0; i < kLanes; ++i) {
    x.a[i] = static_cast<float>(p[i]);
    x.b[i] = static_cast<float>(p[kLanes + i]);
  }
  return x;
#endif
}

static inline void store(c10::Half* p, Columns x) {
#if PEAR_LANES == 16
  const auto at = reinterpret_cast<__m256i*>(p);
  _mm256_storeu_si256(at, _mm512_maskz_cvtps_ph(0xffff, (__m512)x.a, _MM_FROUND_TO_NEAREST_INT));
  _mm256_storeu_si256(at + 1,
                      _mm512_maskz_cvtps_ph(0xffff, (__m512)x.b, _MM_FROUND_TO_NEAREST_INT));
#elif PEAR_LANES == 8
  const auto at = reinterpret_cast<__m128i*>(p);
  _mm_storeu_si128(at, _mm256_cvtps_ph((__m256)x.a, _MM_FROUND_TO_NEAREST_INT));
  _mm_storeu_si128(at + 1, _mm256_cvtps_ph((__m256)x.b, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kLanes; ++i) {
    p[i] = static_cast<c10::Half>(x.a[i]);
    p[kLanes + i] = static_cast<c10::Half>(x.b[i]);
  }
#endif
}

// The first n columns of kStep; the rest is -inf, which adds nothing to a maximum or a sum of exp.
template <typename T>
static inline Columns load_tail(const T* p, int64_t n) {
  T padded[kStep];
  std::fill(padded, padded + kStep, T(-kInfinity));
  std::copy(p, p + n, padded);
  return load(padded);
}

// 2^x = significand * power.
struct Exp2 {
  f32s significand, power;
};

// For x <= 127; the power is 0 below the smallest normal, and a NaN stays one. The nearest integer
// is split off, and a polynomial takes the rest: of those with 2^0 = 1 exactly, the one of degree 5
// whose largest relative error on [-1/2, 1/2] is least, 9.2e-8.
static inline Exp2 exp2_parts(f32s x) {
  x = larger(splat(-127.0f), x);
  // Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits, here plus the bias of
  // exponents.
  const f32s shift = splat(12582912.0f + 127.0f);
  const f32s shifted = x + shift;
  const f32s r = x - (shifted - shift);
  f32s p = splat(1.32647273e-3f);
  p = p * r + 9.67151299e-3f;
  p = p * r + 5.55073358e-2f;
  p = p * r + 2.40222424e-1f;
  p = p * r + 6.93147004e-1f;
  p = p * r + 1.0f;
  return {p, (f32s)((i32s)shifted << 23)};
}

static inline float exp1(float x) {
  const Exp2 e = exp2_parts(splat(x * kLog2e));
  return e.significand[0] * e.power[0];
}

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

// Calls visit(u, columns) for every step of n columns, u < kUnroll telling chains apart.
template <typename T, typename Visit>
static inline void for_steps(const T* x, int64_t n, Visit&& visit) {
  int64_t i = 0;
  for (; i + kUnroll * kStep <= n; i += kUnroll * kStep) {
    for (int u = 0; u < kUnroll; ++u) visit(u, load(x + i + u * kStep));
  }
  for (; i + kStep <= n; i += kStep) visit(0, load(x + i));
  if (i < n) visit(0, load_tail(x + i, n - i));
}

template <typename T>
static float block_max(const T* x, int64_t n) {
  f32s max[2 * kUnroll];
  for (auto& m : max) m = splat(-kInfinity);
  for_steps(x, n, [&](int u, Columns v) {
    f32s &a = max[2 * u], &b = max[2 * u + 1];
    a = larger(v.a, a);
    b = larger(v.b, b);
  });
  for (int i = 1; i < 2 * kUnroll; ++i) max[0] = larger(max[i], max[0]);
  return horizontal_max(max[0]);
}

// The sum of 2^x and, for the entropy, that of x 2^x.
template <bool kEntropy>
struct BlockSums {
  f32s sum = {}, weighted = {};

  void add(f32s x) {
    const auto [significand, power] = exp2_parts(x);
    sum += significand * power;
    if constexpr (kEntropy) {
      const f32s low = splat(-1000.0f);  // -inf times 2^-inf adds nothing
      weighted += significand * power * larger(low, x);
    }
  }
};

template <bool kEntropy, typename T>
static void add_block(const T* x, int64_t n, float max, float* sum, float* weighted) {
  BlockSums<kEntropy> sums[2 * kUnroll];
  const T* next = x + kBlock;  // comes from memory while the exponentials keep the core busy
  for_steps(x, n, [&](int u, Columns v) {
    __builtin_prefetch(next += kStep);
    sums[2 * u].add((v.a - max) * kLog2e);
    sums[2 * u + 1].add((v.b - max) * kLog2e);
  });
  f32s total = {}, weights = {};
  for (const auto& part : sums) {
    total += part.sum;
    weights += part.weighted;
  }
  *sum += horizontal_sum(total);
  if constexpr (kEntropy) *weighted += kLn2 * horizontal_sum(weights);
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

// out = scale * softmax(x); out may be x.
template <typename T>
static void scaled_softmax_row(const T* x, T* out, int64_t n, Normalizer row, float scale) {
  constexpr float nan = std::numeric_limits<float>::quiet_NaN();
  if (row.max != row.max || row.log_sum != row.log_sum || scale != scale) {
    // NaNs that `rounded` may take.
    row.max = scale = nan;
  }
  const float log2_sum = row.log_sum * kLog2e;
  const auto gradient = [&](f32s v) {
    const auto [significand, power] =
        exp2_parts(smaller(splat(127.0f), (v - row.max) * kLog2e - log2_sum));
    return significand * power * scale;
  };
  int64_t i = 0;
  for (; i + kStep <= n; i += kStep) {
    // Where this is missing, and x is out, every line waits for its turn to be written: up to three
    // times as long, measured on virtual Xeons.
    __builtin_prefetch(out + i + kAhead / sizeof(T), 1);
    const Columns v = load(x + i);
    store(out + i, {gradient(v.a), gradient(v.b)});
  }
  if (i < n) {
    const Columns v = load_tail(x + i, n - i);
    T tail[kStep];
    store(tail, {gradient(v.a), gradient(v.b)});
    std::copy(tail, tail + (n - i), out + i);
  }
}
