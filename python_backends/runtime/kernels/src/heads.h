// From a layer's packed projection to what its attention takes.
#pragma once

#include <cstdint>

#include "region.h"

namespace wicore {

// packed [T, (heads + 2 kv_heads) * dim] float32 holds query, key and value of every token. Query and key are normed head
// by head (root mean square, epsilon) and rotated: of a head's halves a and b, a' = a cos - b sin and b' = b cos + a sin
// (arXiv 2104.09864). All three leave as float16, what the caches hold.
struct Heads {
  int64_t heads, kv_heads, dim;
  float epsilon;
  const float* packed;
  const float* query_gamma;  // [dim]
  const float* key_gamma;    // [dim]
  const float* cosine;       // [T, dim / 2]
  const float* sine;         // [T, dim / 2]
  uint16_t* query;           // [T, heads * dim]
  uint16_t* key;             // [T, kv_heads * dim]
  uint16_t* value;           // [T, kv_heads * dim]
};

void add_heads(Region& region, const Heads& heads, int64_t rows);

}  // namespace wicore
