// Sixteen lanes in one register of AVX-512; see ../vectors.h.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace wicore {

constexpr bool kTiles = true;  // AMX kernels are compiled in; whether they run is asked at run time

using Floats = __m512;
using Integers = __m512i;
using Lanes = __mmask16;

// The lanes that hold the next `left` elements.
inline Lanes lanes(int64_t left) {
  return left >= 16 ? 0xffff : left <= 0 ? 0 : static_cast<__mmask16>((1u << left) - 1);
}

inline Floats zeros() { return _mm512_setzero_ps(); }
inline Floats splat(float x) { return _mm512_set1_ps(x); }
inline Floats load(const float* from) { return _mm512_loadu_ps(from); }
// Zero in the other lanes, of which nothing is read.
inline Floats load(const float* from, Lanes which) { return _mm512_maskz_loadu_ps(which, from); }
inline void store(float* to, Floats x) { _mm512_storeu_ps(to, x); }
inline void store(float* to, Floats x, Lanes which) { _mm512_mask_storeu_ps(to, which, x); }
inline Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
inline Floats sub(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
inline Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
inline Floats fmadd(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline Floats fmsub(Floats a, Floats b, Floats c) { return _mm512_fmsub_ps(a, b, c); }
// b where either is NaN.
inline Floats larger(Floats a, Floats b) { return _mm512_max_ps(a, b); }
inline Floats smaller(Floats a, Floats b) { return _mm512_min_ps(a, b); }
inline Floats absolute(Floats x) { return _mm512_abs_ps(x); }
inline float sum_of(Floats x) { return _mm512_reduce_add_ps(x); }
inline float largest_of(Floats x) { return _mm512_reduce_max_ps(x); }
inline Floats nearest(Floats x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT); }
// x * 2^whole for whole numbers in [-126, 126].
inline Floats scale_by_power(Floats x, Floats whole) { return _mm512_scalef_ps(x, whole); }
// NaN or infinity in any lane.
inline bool any_not_finite(Floats x) { return _mm512_fpclass_ps_mask(x, 0x99) != 0; }

// 1 / x to about 1e-7 of its value: 14 bits of the instruction and a step of Newton's method. x is at least 2^-126 and at
// most 2^126.
inline Floats reciprocal(Floats x) {
  const Floats guess = _mm512_rcp14_ps(x);
  return _mm512_mul_ps(guess, _mm512_fnmadd_ps(x, guess, _mm512_set1_ps(2.0f)));
}

// As float16, rounded to nearest.
inline void store_half(uint16_t* to, Floats x, Lanes which) {
  _mm256_mask_storeu_epi16(to, which, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

inline Integers no_integers() { return _mm512_setzero_si512(); }
inline Integers to_integers(Floats x) { return _mm512_cvtps_epi32(x); }  // rounded to nearest
inline Integers add(Integers a, Integers b) { return _mm512_add_epi32(a, b); }
inline int32_t sum_of(Integers x) { return _mm512_reduce_add_epi32(x); }
// As int8, saturated; 16-byte aligned.
inline void store_int8(int8_t* to, Integers x) {
  _mm_store_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtsepi32_epi8(x));
}

}  // namespace wicore
