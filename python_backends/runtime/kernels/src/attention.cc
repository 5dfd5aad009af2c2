#include "attention.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "eights.h"
#include "scratch.h"
#include "vectors.h"

namespace wicore {
namespace {

// Queries at once, of one head of the caches: four share what is read of a key, and their sums fit into registers.
constexpr int64_t kQueries = 4;
constexpr int64_t kTaskPositions = 8;    // of a prompt
constexpr int64_t kTaskScores = 1 << 13; // scores below which waking another thread costs more than it gains

// Keys and values of consecutive tokens of one head.
struct Tokens {
  const uint16_t* key;
  const uint16_t* value;
  int64_t stride;
  int64_t count;
};

// One sequence's share of a call.
struct Row {
  const Attention& all;
  int64_t index;
  int64_t count;   // valid tokens of the chunk
  int64_t past;    // tokens before it
  int64_t evicted; // of them, no longer in a local cache

  Row(const Attention& attention, int64_t row)
      : all(attention),
        index(row),
        count(attention.query_len[row]),
        past(attention.last[row] + 1 - count),
        evicted(attention.evicted(past)) {}

  // Position of the first token that the chunk's token `at` sees.
  int64_t first_seen(int64_t at) const { return all.window ? std::max<int64_t>(0, past + at + 1 - all.window) : 0; }
  int64_t cache_offset(int64_t kv_head) const { return (index * all.kv_heads + kv_head) * all.capacity * all.dim; }

  Tokens cached(int64_t kv_head, int64_t first) const {
    if (first >= past) return {nullptr, nullptr, 0, 0};
    const int64_t offset = cache_offset(kv_head) + (first - evicted) * all.dim;
    return {all.key_cache + offset, all.value_cache + offset, all.dim, past - first};
  }
  Tokens fresh(int64_t kv_head, int64_t first, int64_t last) const {
    const int64_t begin = std::max<int64_t>(0, first - past), stride = all.kv_heads * all.dim;
    const int64_t offset = (index * all.length + begin) * stride + kv_head * all.dim;
    return {all.key + offset, all.value + offset, stride, last - begin};
  }
};

// scores [Queries, stride]: the dot products of queries [Queries, dim] with the keys.
template <int Queries, int Keys>
void score(const float* queries, const uint16_t* key, int64_t key_stride, int64_t dim, float* scores, int64_t stride) {
  __m256 sums[Queries][Keys];
  for (int q = 0; q < Queries; ++q) {
    for (int k = 0; k < Keys; ++k) sums[q][k] = _mm256_setzero_ps();
  }
  for (int64_t i = 0; i < dim; i += 8) {
    __m256 keys[Keys];
    for (int k = 0; k < Keys; ++k) keys[k] = load_halves(key + k * key_stride + i);
    for (int q = 0; q < Queries; ++q) {
      const __m256 query = _mm256_loadu_ps(queries + q * dim + i);
      for (int k = 0; k < Keys; ++k) sums[q][k] = _mm256_fmadd_ps(query, keys[k], sums[q][k]);
    }
  }
  for (int q = 0; q < Queries; ++q) {
    for (int k = 0; k < Keys; ++k) scores[q * stride + k] = sum_of_eight(sums[q][k]);
  }
}

template <int Queries>
void score_tokens(const float* queries, const Tokens& tokens, int64_t dim, float* scores, int64_t stride) {
  int64_t token = 0;
  for (; token + 2 <= tokens.count; token += 2) {
    score<Queries, 2>(queries, tokens.key + token * tokens.stride, tokens.stride, dim, scores + token, stride);
  }
  if (token < tokens.count) score<Queries, 1>(queries, tokens.key + token * tokens.stride, 0, dim, scores + token, stride);
}

// scores [count] → e^(score - largest); returns their sum.
float exponentiate(float* scores, int64_t count) {
  constexpr float kLog2E = 1.44269504f;
  Floats tops = splat(-std::numeric_limits<float>::infinity());
  int64_t whole = 0;
  for (; whole + kLanes <= count; whole += kLanes) tops = larger(tops, load(scores + whole));
  float top = largest_of(tops);
  for (int64_t i = whole; i < count; ++i) top = std::max(top, scores[i]);
  const Floats offset = splat(-kLog2E * top);
  Floats sum = zeros();
  for (int64_t i = 0; i < count; i += kLanes) {
    const Lanes which = lanes(count - i);
    const Floats exponent = larger(splat(-126.0f), fmadd(load(scores + i, which), splat(kLog2E), offset));
    store(scores + i, power_of_two(exponent), which);
    sum = add(sum, load(scores + i, which));
  }
  return sum_of(sum);
}

// sums [Queries][2] += the values of all tokens, 16 of their columns, times the queries' probabilities.
template <int Queries>
inline __attribute__((always_inline)) void add_values(const Tokens& tokens, int64_t column, const float* shares,
                                                      int64_t stride, __m256 (*sums)[2]) {
  const uint16_t* value = tokens.value + column;
  for (int64_t token = 0; token < tokens.count; ++token, value += tokens.stride) {
    const __m256 low = load_halves(value), high = load_halves(value + 8);
    for (int q = 0; q < Queries; ++q) {
      const __m256 share = _mm256_broadcast_ss(shares + q * stride + token);
      sums[q][0] = _mm256_fmadd_ps(share, low, sums[q][0]);
      sums[q][1] = _mm256_fmadd_ps(share, high, sums[q][1]);
    }
  }
}

// `Queries` queries from number `first` on; queries of a row and a cache's head are counted token by token.
template <int Queries>
void attend(const Row& row, int64_t kv_head, int64_t first) {
  const Attention& all = row.all;
  const int64_t dim = all.dim, group = all.heads / all.kv_heads;
  const int64_t from = row.first_seen(first / group), end = (first + Queries - 1) / group + 1;
  const Tokens cached = row.cached(kv_head, from), fresh = row.fresh(kv_head, from, end);
  const int64_t keys = cached.count + fresh.count, stride = (keys + 2 * kLanes - 1) / kLanes * kLanes;
  auto* queries = reinterpret_cast<float*>(
      task_scratch().at_least((Queries * (dim + stride)) * static_cast<int64_t>(sizeof(float))));
  float* scores = queries + Queries * dim;

  const auto place = [&](int q) {
    const int64_t token = (first + q) / group, head = kv_head * group + (first + q) % group;
    return ((row.index * all.length + token) * all.heads + head) * dim;
  };
  for (int q = 0; q < Queries; ++q) {
    for (int64_t i = 0; i < dim; i += 8) {
      const __m256 scaled = _mm256_mul_ps(load_halves(all.query + place(q) + i), _mm256_set1_ps(all.scale));
      _mm256_storeu_ps(queries + q * dim + i, scaled);
    }
  }
  score_tokens<Queries>(queries, cached, dim, scores, stride);
  score_tokens<Queries>(queries, fresh, dim, scores + cached.count, stride);

  float factors[Queries];
  for (int q = 0; q < Queries; ++q) {
    // Queries of neighbouring tokens see one key more at the end, and with a window one less at the beginning.
    const int64_t token = (first + q) / group, begin = row.first_seen(token) - from, own = row.past + token + 1 - from;
    float* mine = scores + q * stride;
    factors[q] = 1.0f / exponentiate(mine + begin, own - begin);
    std::fill(mine, mine + begin, 0.0f);
    std::fill(mine + own, mine + keys, 0.0f);
  }
  for (int64_t column = 0; column < dim; column += 16) {
    __m256 sums[Queries][2];
    for (int q = 0; q < Queries; ++q) sums[q][0] = sums[q][1] = _mm256_setzero_ps();
    add_values<Queries>(cached, column, scores, stride, sums);
    add_values<Queries>(fresh, column, scores + cached.count, stride, sums);
    for (int q = 0; q < Queries; ++q) {
      float* to = all.out + place(q) + column;
      _mm256_storeu_ps(to, _mm256_mul_ps(sums[q][0], _mm256_set1_ps(factors[q])));
      _mm256_storeu_ps(to + 8, _mm256_mul_ps(sums[q][1], _mm256_set1_ps(factors[q])));
    }
  }
}

using AttendFunction = void (*)(const Row&, int64_t, int64_t);
constexpr AttendFunction kByQueries[kQueries] = {attend<1>, attend<2>, attend<3>, attend<4>};

// The queries [first, last) of a row and a cache's head.
void attend_range(const Row& row, int64_t kv_head, int64_t first, int64_t last) {
  for (int64_t query = first; query < last; query += kQueries) {
    kByQueries[std::min(kQueries, last - query) - 1](row, kv_head, query);
  }
}

// Scores of the whole call, about.
int64_t scores_of(const Attention& all) {
  int64_t scores = 0;
  for (int64_t i = 0; i < all.rows; ++i) {
    const int64_t keys = all.last[i] + 1;
    scores += all.query_len[i] * (all.window ? std::min(keys, all.window) : keys);
  }
  return scores * all.heads;
}

void append(uint16_t* cache, const uint16_t* fresh, const Row& row, int64_t kv_head) {
  const Attention& all = row.all;
  const int64_t dim = all.dim, held = row.past - row.evicted;
  const int64_t evict = all.evicted(row.past + row.count) - row.evicted;
  const int64_t kept = std::max<int64_t>(0, held - evict), skipped = std::max<int64_t>(0, evict - held);
  uint16_t* to = cache + row.cache_offset(kv_head);
  if (evict && kept) std::memmove(to, to + evict * dim, kept * dim * sizeof(uint16_t));
  for (int64_t token = skipped; token < row.count; ++token) {
    const uint16_t* from = fresh + ((row.index * all.length + token) * all.kv_heads + kv_head) * dim;
    std::memcpy(to + (kept + token - skipped) * dim, from, dim * sizeof(uint16_t));
  }
}

}  // namespace

int64_t Attention::evicted(int64_t length) const {
  if (!window || length <= capacity) return 0;
  const int64_t stride = capacity - window + 1;
  return (length - capacity + stride - 1) / stride * stride;
}

void add_attention(Region& region, const Attention& attention) {
  const int64_t group = attention.heads / attention.kv_heads;
  // A task: some queries of one row and head. Few of them are split so that every thread has some, where they are worth it.
  int64_t per_task = attention.length > 1 ? kTaskPositions * group : group;
  const bool worth = scores_of(attention) >= kTaskScores;
  if (worth && attention.rows * attention.kv_heads * ((attention.length * group + per_task - 1) / per_task) == 1) {
    per_task = std::max<int64_t>(1, group / region.threads());
  }
  const int64_t per_head = (attention.length * group + per_task - 1) / per_task;
  const int64_t tasks = attention.rows * attention.kv_heads * per_head;
  const int64_t at_once = worth ? 1 : tasks;
  region.add((tasks + at_once - 1) / at_once, [=, &attention](int64_t batch) {
    for (int64_t task = batch * at_once; task < std::min(tasks, (batch + 1) * at_once); ++task) {
      const int64_t pair = task / per_head, first = task % per_head * per_task;
      const Row row(attention, pair / attention.kv_heads);
      const int64_t kv_head = pair % attention.kv_heads, valid = row.count * group;
      attend_range(row, kv_head, first, std::min(first + per_task, valid));
      for (int64_t query = std::max(first, valid); query < std::min(first + per_task, attention.length * group); ++query) {
        const int64_t head = kv_head * group + query % group;
        float* to = attention.out + ((row.index * attention.length + query / group) * attention.heads + head) * attention.dim;
        std::fill(to, to + attention.dim, 0.0f);
      }
    }
  });
  const int64_t pairs = attention.rows * attention.kv_heads, pairs_at_once = worth ? 1 : pairs;
  region.add((pairs + pairs_at_once - 1) / pairs_at_once, [=, &attention](int64_t batch) {
    for (int64_t pair = batch * pairs_at_once; pair < std::min(pairs, (batch + 1) * pairs_at_once); ++pair) {
      const Row row(attention, pair / attention.kv_heads);
      if (!row.count) continue;
      append(attention.key_cache, attention.key, row, pair % attention.kv_heads);
      append(attention.value_cache, attention.value, row, pair % attention.kv_heads);
    }
  });
}

}  // namespace wicore
