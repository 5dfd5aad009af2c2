#include "heads.h"

#include <algorithm>

#include "lanes.h"
#include "norm.h"
#include "operand.h"

namespace wicore {
namespace {

constexpr int64_t kTaskRows = 16;  // of a prompt

void store_half(uint16_t* to, __mmask16 mask, __m512 value) {
  _mm256_mask_storeu_epi16(to, mask, _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

void norm_and_rotate(const Heads& heads, const float* x, const float* gamma, const float* cosine, const float* sine,
                     uint16_t* out) {
  const int64_t half = heads.dim / 2;
  const __m512 factor = _mm512_set1_ps(inverse_rms(x, heads.dim, heads.epsilon));
  for (int64_t i = 0; i < half; i += 16) {
    const __mmask16 mask = lanes(half - i);
    const auto normed = [&](int64_t at) {
      return _mm512_mul_ps(_mm512_mul_ps(_mm512_maskz_loadu_ps(mask, x + at), factor),
                           _mm512_maskz_loadu_ps(mask, gamma + at));
    };
    const __m512 a = normed(i), b = normed(half + i);
    const __m512 c = _mm512_maskz_loadu_ps(mask, cosine + i), s = _mm512_maskz_loadu_ps(mask, sine + i);
    store_half(out + i, mask, _mm512_fmsub_ps(a, c, _mm512_mul_ps(b, s)));
    store_half(out + half + i, mask, _mm512_fmadd_ps(b, c, _mm512_mul_ps(a, s)));
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
  for (int64_t i = 0; i < width; i += 16) {
    const __mmask16 mask = lanes(width - i);
    store_half(heads.value + row * width + i, mask, _mm512_maskz_loadu_ps(mask, x + i));
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
