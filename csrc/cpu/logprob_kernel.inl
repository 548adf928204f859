// One row of logits at a time, 16 columns a step, for the instruction set that is in force here.
// Included by logprob.cpp once per instruction set, each time inside another namespace.

using f32x16 = float __attribute__((vector_size(64)));
using i32x16 = int32_t __attribute__((vector_size(64)));
using u32x16 = uint32_t __attribute__((vector_size(64)));
using u16x16 = uint16_t __attribute__((vector_size(32)));

constexpr int64_t kLanes = 16;
constexpr int64_t kBlock = 2048;  // columns whose maximum is taken before their exponentials
constexpr float kInfinity = std::numeric_limits<float>::infinity();

static inline f32x16 splat(float x) { return f32x16{} + x; }

static inline f32x16 load16(const float* p) {
  f32x16 v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

static inline f32x16 load16(const c10::BFloat16* p) {
  u16x16 half;
  std::memcpy(&half, p, sizeof half);
  return (f32x16)(__builtin_convertvector(half, u32x16) << 16);
}

static inline f32x16 load16(const c10::Half* p) {
  f32x16 v;
  for (int i = 0; i < kLanes; ++i) v[i] = static_cast<float>(p[i]);
  return v;
}

static inline void store16(float* p, f32x16 v) { std::memcpy(p, &v, sizeof v); }

// Round to nearest even, as torch does; NaN stays NaN.
static inline void store16(c10::BFloat16* p, f32x16 v) {
  const u32x16 bits = (u32x16)v;
  const u32x16 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const u32x16 is_nan = (u32x16)(v != v);
  const u32x16 kept = (rounded & ~is_nan) | (is_nan & 0x7fc0u);
  const u16x16 half = __builtin_convertvector(kept, u16x16);
  std::memcpy(p, &half, sizeof half);
}

static inline void store16(c10::Half* p, f32x16 v) {
  for (int i = 0; i < kLanes; ++i) p[i] = static_cast<c10::Half>(v[i]);
}

// exp to within 2 ulp; 0 below the smallest normal, NaN for NaN. Range reduction by ln 2 in two
// parts, then a degree-5 polynomial (Cephes coefficients).
static inline f32x16 exp16(f32x16 x) {
  const f32x16 low = splat(-87.3365f), high = splat(88.3762f);
  const i32x16 underflow = x < low;
  x = underflow ? low : x;
  x = x > high ? high : x;
  const f32x16 shift = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const f32x16 shifted = x * 1.44269504088896341f + shift;
  const f32x16 k = shifted - shift;
  f32x16 r = x - k * 0.693359375f;
  r = r + k * 2.12194440e-4f;
  f32x16 p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const f32x16 y = p * (r * r) + r + 1.0f;
  const i32x16 exponent = ((i32x16)shifted - 0x4B400000 + 127) << 23;
  const f32x16 result = y * (f32x16)exponent;
  return underflow ? f32x16{} : result;
}

static inline float exp1(float x) { return exp16(splat(x))[0]; }

static inline float horizontal_max(f32x16 v) {
  float m = v[0];
  for (int i = 1; i < kLanes; ++i) m = v[i] > m ? v[i] : m;
  return m;
}

static inline float horizontal_sum(f32x16 v) {
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) v[i] += v[i + width];
  }
  return v[0];
}

// The last n % 16 columns, padded with -inf (which adds nothing to a maximum or a sum of exp).
template <typename T>
static inline f32x16 load_tail(const T* p, int64_t n) {
  f32x16 v = splat(-kInfinity);
  for (int64_t i = 0; i < n; ++i) v[i] = static_cast<float>(p[i]);
  return v;
}

template <typename T>
static float block_max(const T* x, int64_t n) {
  f32x16 m0 = splat(-kInfinity), m1 = m0;
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    const f32x16 a = load16(x + i), b = load16(x + i + kLanes);
    m0 = a > m0 ? a : m0;
    m1 = b > m1 ? b : m1;
  }
  for (; i < n; i += kLanes) {
    const f32x16 a = n - i >= kLanes ? load16(x + i) : load_tail(x + i, n - i);
    m0 = a > m0 ? a : m0;
  }
  return horizontal_max(m0 > m1 ? m0 : m1);
}

template <typename T>
static float block_sum_exp(const T* x, int64_t n, float max) {
  f32x16 s0 = {}, s1 = {};
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    s0 += exp16(load16(x + i) - max);
    s1 += exp16(load16(x + i + kLanes) - max);
  }
  for (; i < n; i += kLanes) {
    s0 += exp16((n - i >= kLanes ? load16(x + i) : load_tail(x + i, n - i)) - max);
  }
  return horizontal_sum(s0 + s1);
}

// Online over blocks: the running sum is rescaled when a block raises the maximum. One read from
// memory.
template <typename T>
static void row_max_and_sum_exp(const T* x, int64_t n, float* row_max, float* row_sum_exp) {
  float max = -kInfinity, sum = 0.0f;
  for (int64_t start = 0; start < n; start += kBlock) {
    const int64_t columns = std::min(kBlock, n - start);
    const float block = block_max(x + start, columns);
    if (block > max) {
      sum *= exp1(max - block);
      max = block;
    }
    // A block of nothing but -inf adds nothing; -inf - -inf would be NaN. NaN columns must be seen.
    if (max == -kInfinity) {
      for (int64_t i = start; i < start + columns; ++i) {
        if (const float v = static_cast<float>(x[i]); v != v) sum = v;
      }
      continue;
    }
    sum += block_sum_exp(x + start, columns, max);
  }
  *row_max = max;
  *row_sum_exp = sum;
}

// out = scale * exp(x - lse); out may be x.
template <typename T>
static void scaled_softmax_row(const T* x, T* out, int64_t n, float lse, float scale) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store16(out + i, exp16(load16(x + i) - lse) * scale);
  if (i < n) {
    const f32x16 tail = exp16(load_tail(x + i, n - i) - lse) * scale;
    for (int64_t j = 0; i + j < n; ++j) out[i + j] = static_cast<T>(tail[j]);
  }
}
