// Attention over float16 caches: scores, softmax and weighted sums in float32 (arXiv 1706.03762, section 3.2.1).
//
// A query's result depends on its own keys alone, bit for bit: scores are summed in one order, and probabilities and
// values are added from its first visible key to its last, however many tokens, rows or threads share the call.
#pragma once

#include <cstdint>

#include "region.h"

namespace wicore {

struct Attention {
  int64_t heads, kv_heads, dim;  // dim is a multiple of 16
  int64_t window;                // tokens that a query sees, its own included; 0: all of them
  float scale;
  int64_t rows, length;          // B sequences, S tokens of a right-padded chunk
  int64_t capacity;              // C tokens of a cache
  const uint16_t* query;         // [B, S, heads * dim]
  const uint16_t* key;           // [B, S, kv_heads * dim]
  const uint16_t* value;         // [B, S, kv_heads * dim]
  uint16_t* key_cache;           // [B, kv_heads, C, dim], appended to
  uint16_t* value_cache;
  const int32_t* last;           // [B] tokens in the cache when the chunk is in it, less one
  const int32_t* query_len;      // [B] valid tokens of a row's chunk; with 0 its cache stays as it is
  float* out;                    // [B, S, heads * dim], zero behind a row's valid tokens

  // Tokens that a cache with a window no longer holds after `length` of them. It evicts in strides: a full cache keeps
  // window - 1 tokens in order from its first row on (GroupQueryAttention's sliding_window_cache).
  int64_t evicted(int64_t length) const;
};

// Two phases: every query attends, to the caches as they are and to the chunk; then the chunk goes into the caches.
void add_attention(Region& region, const Attention& attention);

}  // namespace wicore
