// How the segments of a pack are cut into chunks, one per warp, without reading cu_seqlens on the
// host.
//
// A chunk is at most `tokens` tokens of one segment. Segment s owns the chunk ids from
// bounds[s] / tokens + s up to the next segment's first: since a segment of n tokens adds at least
// ceil(n / tokens) - 1 to the quotient, that is room enough for its chunks (some ids stay empty),
// and the number of ids, T / tokens + S, follows from shapes alone.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace pear {

struct ChunkLayout {
  const int32_t* bounds;  // cu_seqlens [segments + 1]
  int64_t T, segments;
  int log2_tokens;  // of a chunk

  PEAR_HOST_DEVICE int64_t tokens() const { return int64_t(1) << log2_tokens; }
  PEAR_HOST_DEVICE int64_t chunks() const { return (T >> log2_tokens) + segments; }
  PEAR_HOST_DEVICE int64_t first_chunk(int64_t segment) const {
    return (bounds[segment] >> log2_tokens) + segment;
  }
};

// Tokens [begin, end) of one segment, whose chunks are ids [first, last).
struct Chunk {
  int64_t id, segment, begin, end, first, last;

  PEAR_HOST_DEVICE int64_t length() const { return end - begin; }
};

PEAR_HOST_DEVICE Chunk chunk_of_segment(const ChunkLayout& layout, int64_t segment, int64_t id) {
  const int64_t start = layout.bounds[segment], stop = layout.bounds[segment + 1];
  const int64_t first = layout.first_chunk(segment);
  const int64_t used = (stop - start + layout.tokens() - 1) >> layout.log2_tokens;
  const int64_t wanted = start + ((id - first) << layout.log2_tokens);
  const int64_t begin = wanted < stop ? wanted : stop;
  const int64_t end = begin + layout.tokens() < stop ? begin + layout.tokens() : stop;
  return {id, segment, begin, end, first, first + used};
}

// What cu_seqlens must be for this segment; of all segments together, the whole contract.
PEAR_HOST_DEVICE bool valid_segment(const ChunkLayout& layout, int64_t segment) {
  const int64_t start = layout.bounds[segment], stop = layout.bounds[segment + 1];
  return 0 <= start && start <= stop && stop <= layout.T && (segment > 0 || start == 0) &&
         (segment + 1 < layout.segments || stop == layout.T);
}

// Chunks of about sqrt(T) tokens: as many tokens to go through in a chunk as totals of other chunks
// to add up. Never so few that a warp's start costs more than its work.
inline int log2_chunk_tokens(int64_t T) {
  int log2 = 8;
  while (int64_t(1) << (2 * log2) < T) ++log2;
  return log2;
}

}  // namespace pear
