// Sixteen lanes in two registers of AVX2; see ../vectors.h and ../avx512/vectors.h for what the functions promise.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "eights.h"

namespace wicore {

constexpr bool kTiles = false;

struct Floats {
  __m256 low, high;
};
struct Integers {
  __m256i low, high;
};
// The first `count` lanes, 0 to 16.
struct Lanes {
  int count;
};

inline Lanes lanes(int64_t left) { return {left >= 16 ? 16 : left <= 0 ? 0 : static_cast<int>(left)}; }

// The first `count` of eight lanes, for the instructions that take a mask.
inline __m256i mask_of(int count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

inline Floats zeros() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline Floats splat(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline Floats load(const float* from) { return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)}; }
inline Floats load(const float* from, Lanes which) {
  if (which.count == 16) return load(from);
  return {_mm256_maskload_ps(from, mask_of(which.count)), _mm256_maskload_ps(from + 8, mask_of(which.count - 8))};
}
inline void store(float* to, Floats x) {
  _mm256_storeu_ps(to, x.low);
  _mm256_storeu_ps(to + 8, x.high);
}
inline void store(float* to, Floats x, Lanes which) {
  if (which.count == 16) return store(to, x);
  _mm256_maskstore_ps(to, mask_of(which.count), x.low);
  _mm256_maskstore_ps(to + 8, mask_of(which.count - 8), x.high);
}
inline Floats add(Floats a, Floats b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
inline Floats sub(Floats a, Floats b) { return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)}; }
inline Floats mul(Floats a, Floats b) { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
inline Floats fmadd(Floats a, Floats b, Floats c) {
  return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
inline Floats fmsub(Floats a, Floats b, Floats c) {
  return {_mm256_fmsub_ps(a.low, b.low, c.low), _mm256_fmsub_ps(a.high, b.high, c.high)};
}
inline Floats larger(Floats a, Floats b) { return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)}; }
inline Floats smaller(Floats a, Floats b) { return {_mm256_min_ps(a.low, b.low), _mm256_min_ps(a.high, b.high)}; }
inline Floats absolute(Floats x) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, x.low), _mm256_andnot_ps(sign, x.high)};
}

inline float sum_of(Floats x) { return sum_of_eight(_mm256_add_ps(x.low, x.high)); }
inline float largest_of(Floats x) {
  const __m256 eight = _mm256_max_ps(x.low, x.high);
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

inline Floats nearest(Floats x) {
  constexpr int kRounding = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(x.low, kRounding), _mm256_round_ps(x.high, kRounding)};
}
inline __m256 scale_by_power(__m256 x, __m256 whole) {
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(whole), _mm256_set1_epi32(127));
  return _mm256_mul_ps(x, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
}
inline Floats scale_by_power(Floats x, Floats whole) {
  return {scale_by_power(x.low, whole.low), scale_by_power(x.high, whole.high)};
}
inline bool any_not_finite(Floats x) {
  const __m256i exponent = _mm256_set1_epi32(0x7f800000);
  const __m256i low = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_castps_si256(x.low), exponent), exponent);
  const __m256i high = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_castps_si256(x.high), exponent), exponent);
  return _mm256_movemask_epi8(_mm256_or_si256(low, high)) != 0;
}
inline Floats reciprocal(Floats x) {
  const __m256 one = _mm256_set1_ps(1.0f);
  return {_mm256_div_ps(one, x.low), _mm256_div_ps(one, x.high)};
}

inline void store_half(uint16_t* to, Floats x, Lanes which) {
  constexpr int kRounding = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  const __m128i low = _mm256_cvtps_ph(x.low, kRounding), high = _mm256_cvtps_ph(x.high, kRounding);
  alignas(16) uint16_t halves[16];
  uint16_t* place = which.count == 16 ? to : halves;
  _mm_storeu_si128(reinterpret_cast<__m128i*>(place), low);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(place + 8), high);
  if (which.count < 16) std::memcpy(to, halves, which.count * sizeof(uint16_t));
}

inline Integers no_integers() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
inline Integers to_integers(Floats x) { return {_mm256_cvtps_epi32(x.low), _mm256_cvtps_epi32(x.high)}; }
inline Integers add(Integers a, Integers b) {
  return {_mm256_add_epi32(a.low, b.low), _mm256_add_epi32(a.high, b.high)};
}
inline int32_t sum_of(Integers x) {
  const __m256i eight = _mm256_add_epi32(x.low, x.high);
  const __m128i four = _mm_add_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
  const __m128i two = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32(two, 0xb1)));
}
inline void store_int8(int8_t* to, Integers x) {
  // Packing goes by halves of a register: lanes 0-3, 8-11, 4-7, 12-15 of the sixteen.
  const __m256i words = _mm256_packs_epi32(x.low, x.high);
  const __m256i ordered = _mm256_permute4x64_epi64(words, 0xd8);
  const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(ordered), _mm256_extracti128_si256(ordered, 1));
  _mm_store_si128(reinterpret_cast<__m128i*>(to), bytes);
}

}  // namespace wicore
