// Rows of logits as 16-byte vectors: a misaligned head, an aligned body, a tail.
#pragma once

#include "cuda/device.h"

namespace pear::cuda {

template <typename T>
constexpr int kPerVector = 16 / sizeof(T);

__device__ __forceinline__ void unpack(uint4 raw, float (&x)[4], float) {
  x[0] = __uint_as_float(raw.x);
  x[1] = __uint_as_float(raw.y);
  x[2] = __uint_as_float(raw.z);
  x[3] = __uint_as_float(raw.w);
}

__device__ __forceinline__ uint4 pack(const float (&x)[4], float) {
  return {__float_as_uint(x[0]), __float_as_uint(x[1]), __float_as_uint(x[2]),
          __float_as_uint(x[3])};
}

template <typename T>
__device__ __forceinline__ void unpack(uint4 raw, float (&x)[8], T type) {
  const uint32_t words[] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = unpack_pair(words[i], type);
    x[2 * i] = pair.x;
    x[2 * i + 1] = pair.y;
  }
}

template <typename T>
__device__ __forceinline__ uint4 pack(const float (&x)[8], T type) {
  return {pack_pair({x[0], x[1]}, type), pack_pair({x[2], x[3]}, type),
          pack_pair({x[4], x[5]}, type), pack_pair({x[6], x[7]}, type)};
}

// -inf in every place: adds nothing to a maximum.
__device__ __forceinline__ uint4 nothing(float) {
  return {0xff800000u, 0xff800000u, 0xff800000u, 0xff800000u};
}
__device__ __forceinline__ uint4 nothing(c10::BFloat16) {
  return {0xff80ff80u, 0xff80ff80u, 0xff80ff80u, 0xff80ff80u};
}
__device__ __forceinline__ uint4 nothing(c10::Half) {
  return {0xfc00fc00u, 0xfc00fc00u, 0xfc00fc00u, 0xfc00fc00u};
}

// The vector with -inf in one place.
__device__ __forceinline__ uint4 without(uint4 raw, int place, float) {
  uint32_t words[] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int w = 0; w < 4; ++w) words[w] = w == place ? 0xff800000u : words[w];
  return {words[0], words[1], words[2], words[3]};
}

template <typename T>
__device__ __forceinline__ uint4 without(uint4 raw, int place, T type) {
  uint32_t words[] = {raw.x, raw.y, raw.z, raw.w};
  const uint32_t other = place % 2 ? 0x0000ffffu : 0xffff0000u;
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    const uint32_t one_less = (words[w] & other) | (nothing(type).x & ~other);
    words[w] = w == place / 2 ? one_less : words[w];
  }
  return {words[0], words[1], words[2], words[3]};
}

// Columns [0, head) and [columns - tail, columns) one by one, between them whole aligned vectors.
struct RowSplit {
  int head, vectors, tail;
};

template <typename T>
__device__ __forceinline__ int misaligned_by(const T* p) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(p) / sizeof(T)) & (kPerVector<T> - 1);
}

template <typename T>
__device__ __forceinline__ RowSplit split_row(const T* row, int columns) {
  const int head = min(columns, (kPerVector<T> - misaligned_by(row)) & (kPerVector<T> - 1));
  const int vectors = (columns - head) / kPerVector<T>;
  return {head, vectors, columns - head - vectors * kPerVector<T>};
}

// The column of the i-th of the head + tail single ones.
__device__ __forceinline__ int single_column(const RowSplit& row, int columns, int i) {
  return i < row.head ? i : columns - row.tail + (i - row.head);
}

// Which of `threads` threads has a column, if they take vectors and then single columns in turns.
template <typename T>
__device__ __forceinline__ int column_thread(const RowSplit& row, int columns, int column,
                                             int threads) {
  const int first_of_tail = columns - row.tail, in_body = column - row.head;
  if (in_body < 0) return column % threads;
  if (column < first_of_tail) return in_body / kPerVector<T> % threads;
  return (row.head + column - first_of_tail) % threads;
}

// row[begin, end) = 0 by `threads` threads, of which this is the i-th.
template <typename T>
__device__ __forceinline__ void zero_columns(T* row, int begin, int end, int i, int threads) {
  T* first = row + begin;
  const int columns = end - begin;
  const RowSplit split = split_row(first, columns);
  uint4* body = reinterpret_cast<uint4*>(first + split.head);
  for (int v = i; v < split.vectors; v += threads) store_streaming(body + v, uint4{0, 0, 0, 0});
  for (int k = i; k < split.head + split.tail; k += threads) {
    first[single_column(split, columns, k)] = T(0.0f);
  }
}

}  // namespace pear::cuda
