#include "heads.h"

#include <algorithm>

#include "norm.h"
#include "operand.h"
#include "vectors.h"

namespace wicore {
namespace {

constexpr int64_t kTaskRows = 16;  // of a prompt

void norm_and_rotate(const Heads& heads, const float* x, const float* gamma, const float* cosine, const float* sine,
                     uint16_t* out) {
  const int64_t half = heads.dim / 2;
  const Floats factor = splat(inverse_rms(x, heads.dim, heads.epsilon));
  for (int64_t i = 0; i < half; i += kLanes) {
    const Lanes which = lanes(half - i);
    const auto normed = [&](int64_t at) { return mul(mul(load(x + at, which), factor), load(gamma + at, which)); };
    const Floats a = normed(i), b = normed(half + i);
    const Floats c = load(cosine + i, which), s = load(sine + i, which);
    store_half(out + i, fmsub(a, c, mul(b, s)), which);
    store_half(out + half + i, fmadd(b, c, mul(a, s)), which);
  }
}

void split_row(const Heads& heads, int64_t row) {
  const int64_t dim = heads.dim, half = dim / 2;
  const float* x = heads.packed + row * (heads.heads + 2 * heads.kv_heads) * dim;
  const float* cosine = heads.cosine + row * half;
  const float* sine = heads.sine + row * half;
  for (int64_t head = 0; head < heads.heads; ++head, x += dim) {
    norm_and_rotate(heads, x, heads.query_gamma, cosine, sine, heads.query + (row * heads.heads + head) * dim);
  }
  for (int64_t head = 0; head < heads.kv_heads; ++head, x += dim) {
    norm_and_rotate(heads, x, heads.key_gamma, cosine, sine, heads.key + (row * heads.kv_heads + head) * dim);
  }
  const int64_t width = heads.kv_heads * dim;
  for (int64_t i = 0; i < width; i += kLanes) {
    const Lanes which = lanes(width - i);
    store_half(heads.value + row * width + i, load(x + i, which), which);
  }
}

}  // namespace

void add_heads(Region& region, const Heads& heads, int64_t rows) {
  const int64_t per_task = rows > kIntegerRows ? kTaskRows : 1;
  region.add((rows + per_task - 1) / per_task, [=](int64_t task) {
    for (int64_t row = task * per_task; row < std::min(rows, (task + 1) * per_task); ++row) split_row(heads, row);
  });
}

}  // namespace wicore
