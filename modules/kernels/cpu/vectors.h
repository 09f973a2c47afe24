// Vectors of sixteen lanes: registers of AVX-512, or two halves in AVX2. vf: float32, vi: int32.

#pragma once

#include <algorithm>
#include <memory>
#include <vector>

#include "numbers.h"

namespace {

// Memory that starts with a line of the cache and is not filled with zeros before it is written.
template <class T>
struct Unfilled : std::allocator<T> {
  template <class U>
  struct rebind {
    typedef Unfilled<U> other;
  };
  T* allocate(size_t n) { return (T*)::operator new(n * sizeof(T), std::align_val_t(64)); }
  void deallocate(T* p, size_t) { ::operator delete(p, std::align_val_t(64)); }
  template <class U>
  void construct(U* p) {
    ::new ((void*)p) U;
  }
};

typedef std::vector<float, Unfilled<float>> Floats;
typedef std::vector<int32_t, Unfilled<int32_t>> Integers;
typedef std::vector<uint8_t, Unfilled<uint8_t>> Bytes;

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VNNI__) && defined(__AVX512DQ__)
#define ALRD_AVX512 1
typedef __m512 vf;
typedef __m512i vi;
inline vf load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, vf x) { _mm512_storeu_ps(p, x); }
inline vf set1(float x) { return _mm512_set1_ps(x); }
inline vf add(vf a, vf b) { return _mm512_add_ps(a, b); }
inline vf sub(vf a, vf b) { return _mm512_sub_ps(a, b); }
inline vf mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
inline vf fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
inline vf fnma(vf a, vf b, vf c) { return _mm512_fnmadd_ps(a, b, c); }
inline vf max(vf a, vf b) { return _mm512_max_ps(a, b); }
inline vf abs(vf a) { return _mm512_abs_ps(a); }
inline vi loadi(const void* p) { return _mm512_loadu_si512(p); }
inline vi loadi(const void* p, int n) { return n >= 16 ? loadi(p) : _mm512_maskz_loadu_epi32((1u << n) - 1, p); }
inline void storei(void* p, vi x) { _mm512_storeu_si512(p, x); }
inline vi seti(int x) { return _mm512_set1_epi32(x); }
inline vf to_float(vi x) { return _mm512_cvtepi32_ps(x); }
inline vi to_int(vf x) { return _mm512_cvtps_epi32(x); }
inline vi addi(vi a, vi b) { return _mm512_add_epi32(a, b); }
inline vi subi(vi a, vi b) { return _mm512_sub_epi32(a, b); }
inline vi andi(vi a, vi b) { return _mm512_and_si512(a, b); }
inline vi ori(vi a, vi b) { return _mm512_or_si512(a, b); }
inline vi xori(vi a, vi b) { return _mm512_xor_si512(a, b); }
// The lanes that have bits above their lowest byte, one bit each.
inline uint16_t above_a_byte(vi x) { return _mm512_test_epi32_mask(x, seti(~255)); }
inline vi shl(vi a, int n) { return _mm512_slli_epi32(a, n); }
inline vi shr(vi a, int n) { return _mm512_srli_epi32(a, n); }
inline vi sar(vi a, int n) { return _mm512_srai_epi32(a, n); }
inline vi muli(vi a, vi b) { return _mm512_mullo_epi32(a, b); }
inline vi mul16(vi a, vi b) { return _mm512_mullo_epi16(a, b); }
inline vi shr16(vi a, int n) { return _mm512_srli_epi16(a, n); }
// Bytes of a lane: four codes (unsigned) times four weights (signed), added to the lane. With the intrinsic GCC 12
// keeps the sums in memory.
inline vi dot4(vi sum, vi codes, vi weights) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(codes), "v"(weights));
  return sum;
}
inline vf power_of_two(vi n) { return _mm512_castsi512_ps(shl(addi(n, seti(127)), 23)); }
// The 4 x 4 bytes of each four lanes transposed.
inline vi transpose_bytes(vi x) {
  const vi order = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  return _mm512_shuffle_epi8(x, order);
}
// Lane 4 i + c: the sum of lanes c, 4 + c, 8 + c and 12 + c of x[i].
inline vi sum_fours(const vi (&x)[4]) {
  const vi first = addi(_mm512_shuffle_i32x4(x[0], x[1], 0x44), _mm512_shuffle_i32x4(x[0], x[1], 0xEE));
  const vi second = addi(_mm512_shuffle_i32x4(x[2], x[3], 0x44), _mm512_shuffle_i32x4(x[2], x[3], 0xEE));
  return addi(_mm512_shuffle_i32x4(first, second, 0x88), _mm512_shuffle_i32x4(first, second, 0xDD));
}
// Words [16][16], whose rows are `stride` apart there and `to_stride` here, transposed.
inline void transpose_words(const void* from_, int64_t stride, void* to_, int64_t to_stride) {
  const int32_t* from = (const int32_t*)from_;
  int32_t* to = (int32_t*)to_;
  vi x[16], y[16];
  each<16>([&](auto i) INLINE { x[i] = loadi(from + i * stride); });
  each<16>([&](auto i) INLINE {
    constexpr int first = i / 2 * 2;
    y[i] = i % 2 ? _mm512_unpackhi_epi32(x[first], x[first + 1]) : _mm512_unpacklo_epi32(x[first], x[first + 1]);
  });
  each<16>([&](auto i) INLINE {
    constexpr int first = i / 4 * 4 + i % 4 / 2;
    x[i] = i % 2 ? _mm512_unpackhi_epi64(y[first], y[first + 2]) : _mm512_unpacklo_epi64(y[first], y[first + 2]);
  });
  // x[4 k + i]: in each fourth of the vector column 4 * fourth + i of rows 4 k to 4 k + 3.
  each<4>([&](auto i) INLINE {
    const vi low = _mm512_shuffle_i32x4(x[i], x[4 + i], 0x88), low_odd = _mm512_shuffle_i32x4(x[i], x[4 + i], 0xDD);
    const vi high = _mm512_shuffle_i32x4(x[8 + i], x[12 + i], 0x88),
             high_odd = _mm512_shuffle_i32x4(x[8 + i], x[12 + i], 0xDD);
    storei(to + i * to_stride, _mm512_shuffle_i32x4(low, high, 0x88));
    storei(to + (8 + i) * to_stride, _mm512_shuffle_i32x4(low, high, 0xDD));
    storei(to + (4 + i) * to_stride, _mm512_shuffle_i32x4(low_odd, high_odd, 0x88));
    storei(to + (12 + i) * to_stride, _mm512_shuffle_i32x4(low_odd, high_odd, 0xDD));
  });
}
// 128 bytes, and those that bytes below 128 number.
struct ByteTable {
#if defined(__AVX512VBMI__)
  vi low, high;
  explicit ByteTable(const uint8_t* bytes) : low(loadi(bytes)), high(loadi(bytes + 64)) {}
  vi of(vi index) const { return _mm512_permutex2var_epi8(low, index, high); }
#else
  vi piece[8];
  explicit ByteTable(const uint8_t* bytes) {
    for (int i = 0; i < 8; i++) piece[i] = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)bytes + i));
  }
  vi of(vi index) const {
    // 16 bytes at a time: an index that is not of them gets its upper bit, which a shuffle turns into 0.
    vi found = seti(0);
    for (int i = 0; i < 8; i++) {
      const vi other = _mm512_xor_si512(index, seti(0x10101010 * i));
      found = ori(found, _mm512_shuffle_epi8(piece[i], _mm512_adds_epu8(other, seti(0x70707070))));
    }
    return found;
  }
#endif
};
// The lowest byte of each lane.
inline void store_bytes(void* p, vi x) { _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(x)); }
inline float sum(vf x) { return _mm512_reduce_add_ps(x); }
inline float maximum(vf x) { return _mm512_reduce_max_ps(x); }
inline vf from_half(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
inline vf from_bfloat(const uint16_t* p) {
  return _mm512_castsi512_ps(shl(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define ALRD_AVX512 0
struct vf {
  __m256 a, b;
};
struct vi {
  __m256i a, b;
};
inline vf load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float* p, vf x) { _mm256_storeu_ps(p, x.a), _mm256_storeu_ps(p + 8, x.b); }
inline vf set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline vf add(vf x, vf y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
inline vf sub(vf x, vf y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
inline vf mul(vf x, vf y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
inline vf fma(vf x, vf y, vf z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
inline vf fnma(vf x, vf y, vf z) { return {_mm256_fnmadd_ps(x.a, y.a, z.a), _mm256_fnmadd_ps(x.b, y.b, z.b)}; }
inline vf max(vf x, vf y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
inline vf abs(vf x) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, x.a), _mm256_andnot_ps(sign, x.b)};
}
inline vi loadi(const void* p) {
  return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)p + 1)};
}
inline void storei(void* p, vi x) { _mm256_storeu_si256((__m256i*)p, x.a), _mm256_storeu_si256((__m256i*)p + 1, x.b); }
inline vi loadi(const void* p, int n) {
  if (n >= 16) return loadi(p);
  int32_t lanes[16] = {0};
  memcpy(lanes, p, 4 * n);
  return loadi(lanes);
}
inline vi seti(int x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
inline vf to_float(vi x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
inline vi to_int(vf x) { return {_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}; }
inline vi addi(vi x, vi y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
inline vi subi(vi x, vi y) { return {_mm256_sub_epi32(x.a, y.a), _mm256_sub_epi32(x.b, y.b)}; }
inline vi andi(vi x, vi y) { return {_mm256_and_si256(x.a, y.a), _mm256_and_si256(x.b, y.b)}; }
inline vi ori(vi x, vi y) { return {_mm256_or_si256(x.a, y.a), _mm256_or_si256(x.b, y.b)}; }
inline vi xori(vi x, vi y) { return {_mm256_xor_si256(x.a, y.a), _mm256_xor_si256(x.b, y.b)}; }
inline uint16_t above_a_byte(vi x) {
  const __m256i low = _mm256_set1_epi32(255), a = _mm256_max_epu32(x.a, low), b = _mm256_max_epu32(x.b, low);
  const int in_byte = _mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpeq_epi32(a, low))) |
                      _mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpeq_epi32(b, low))) << 8;
  return ~in_byte;
}
inline vi shl(vi x, int n) { return {_mm256_slli_epi32(x.a, n), _mm256_slli_epi32(x.b, n)}; }
inline vi shr(vi x, int n) { return {_mm256_srli_epi32(x.a, n), _mm256_srli_epi32(x.b, n)}; }
inline vi sar(vi x, int n) { return {_mm256_srai_epi32(x.a, n), _mm256_srai_epi32(x.b, n)}; }
inline vi muli(vi x, vi y) { return {_mm256_mullo_epi32(x.a, y.a), _mm256_mullo_epi32(x.b, y.b)}; }
inline vi mul16(vi x, vi y) { return {_mm256_mullo_epi16(x.a, y.a), _mm256_mullo_epi16(x.b, y.b)}; }
inline vi shr16(vi x, int n) { return {_mm256_srli_epi16(x.a, n), _mm256_srli_epi16(x.b, n)}; }
// As above, for codes of at most 7 bits: two products are summed up in 16 bits on the way.
inline vi dot4(vi s, vi codes, vi weights) {
  const __m256i one = _mm256_set1_epi16(1);
  return {_mm256_add_epi32(s.a, _mm256_madd_epi16(_mm256_maddubs_epi16(codes.a, weights.a), one)),
          _mm256_add_epi32(s.b, _mm256_madd_epi16(_mm256_maddubs_epi16(codes.b, weights.b), one))};
}
inline vf power_of_two(vi n) {
  n = shl(addi(n, seti(127)), 23);
  return {_mm256_castsi256_ps(n.a), _mm256_castsi256_ps(n.b)};
}
inline vi transpose_bytes(vi x) {
  const __m256i order =
      _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  return {_mm256_shuffle_epi8(x.a, order), _mm256_shuffle_epi8(x.b, order)};
}
inline vi sum_fours(const vi (&x)[4]) {
  __m256i pair[4];
  for (int i = 0; i < 4; i++) pair[i] = _mm256_add_epi32(x[i].a, x[i].b);
  const auto both = [&](int i) {
    return _mm256_add_epi32(_mm256_permute2x128_si256(pair[i], pair[i + 1], 0x20),
                            _mm256_permute2x128_si256(pair[i], pair[i + 1], 0x31));
  };
  return {both(0), both(2)};
}
struct ByteTable {
  __m256i piece[8];
  explicit ByteTable(const uint8_t* bytes) {
    for (int i = 0; i < 8; i++) piece[i] = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)bytes + i));
  }
  // As above, 16 bytes at a time: an index that is not of them gets its upper bit, which a shuffle turns into 0.
  __m256i half(__m256i index) const {
    __m256i found = _mm256_setzero_si256();
    for (int i = 0; i < 8; i++) {
      const __m256i other = _mm256_xor_si256(index, _mm256_set1_epi8(16 * i));
      const __m256i marked = _mm256_adds_epu8(other, _mm256_set1_epi8(0x70));
      found = _mm256_or_si256(found, _mm256_shuffle_epi8(piece[i], marked));
    }
    return found;
  }
  vi of(vi index) const { return {half(index.a), half(index.b)}; }
};
inline void store_bytes(void* p, vi x) {
  const __m256i byte = _mm256_set1_epi32(255);
  // Sixteen 16-bit numbers: lanes 0 to 3 and 8 to 11 of x, then the others.
  const __m256i halves = _mm256_packus_epi32(_mm256_and_si256(x.a, byte), _mm256_and_si256(x.b, byte));
  const __m256i ordered = _mm256_permute4x64_epi64(halves, 0xD8);
  _mm_storeu_si128((__m128i*)p,
                   _mm_packus_epi16(_mm256_castsi256_si128(ordered), _mm256_extracti128_si256(ordered, 1)));
}
inline void transpose_words(const void* from_, int64_t stride, void* to_, int64_t to_stride) {
  // Fourths of 8 x 8.
  for (int row = 0; row < 16; row += 8)
    for (int column = 0; column < 16; column += 8) {
      const int32_t* from = (const int32_t*)from_ + row * stride + column;
      int32_t* to = (int32_t*)to_ + column * to_stride + row;
      __m256i x[8], y[8];
      for (int i = 0; i < 8; i++) x[i] = _mm256_loadu_si256((const __m256i*)(from + i * stride));
      for (int i = 0; i < 8; i += 2) {
        y[i] = _mm256_unpacklo_epi32(x[i], x[i + 1]);
        y[i + 1] = _mm256_unpackhi_epi32(x[i], x[i + 1]);
      }
      // x[4 k + i]: columns i and 4 + i of rows 4 k to 4 k + 3.
      for (int k = 0; k < 8; k += 4)
        for (int i = 0; i < 2; i++) {
          x[k + 2 * i] = _mm256_unpacklo_epi64(y[k + i], y[k + 2 + i]);
          x[k + 2 * i + 1] = _mm256_unpackhi_epi64(y[k + i], y[k + 2 + i]);
        }
      for (int i = 0; i < 4; i++) {
        _mm256_storeu_si256((__m256i*)(to + i * to_stride), _mm256_permute2x128_si256(x[i], x[4 + i], 0x20));
        _mm256_storeu_si256((__m256i*)(to + (4 + i) * to_stride), _mm256_permute2x128_si256(x[i], x[4 + i], 0x31));
      }
    }
}
inline float sum(vf x) {
  float lanes[8], total = 0;
  _mm256_storeu_ps(lanes, _mm256_add_ps(x.a, x.b));
  for (float lane : lanes) total += lane;
  return total;
}
inline float maximum(vf x) {
  float lanes[8];
  _mm256_storeu_ps(lanes, _mm256_max_ps(x.a, x.b));
  return *std::max_element(lanes, lanes + 8);
}
inline vf from_half(const uint16_t* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)), _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p + 1))};
}
inline vf from_bfloat(const uint16_t* p) {
  vi bits = {_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)),
             _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p + 1))};
  bits = shl(bits, 16);
  return {_mm256_castsi256_ps(bits.a), _mm256_castsi256_ps(bits.b)};
}
#else
#error "needs AVX2, FMA and F16C, or AVX-512 with VNNI"
#endif

// n numbers from index i on, as float32; what is written goes up to the next multiple of 16.
inline void numbers(const void* p, int64_t i, int n, int32_t type, float* out) {
  int k = 0;
  for (; k + 16 <= n; k += 16) {
    if (type == FLOAT32) store(out + k, load((const float*)p + i + k));
    if (type == FLOAT16) store(out + k, from_half((const uint16_t*)p + i + k));
    if (type == BFLOAT16) store(out + k, from_bfloat((const uint16_t*)p + i + k));
  }
  for (; k < n; k++) out[k] = number(p, i + k, type);
  for (; k % 16; k++) out[k] = 0;
}

inline vi load(const int32_t* p) { return loadi(p); }

// f over the lanes of each of sixteen vectors.
template <class T, class F>
inline auto fold(const T* x, F f) {
  alignas(64) T y[256];
  transpose_words(x, 16, y, 16);
  auto total = load(y);
  for (int i = 1; i < 16; i++) total = f(total, load(y + 16 * i));
  return total;
}

// n numbers `stride` apart, as float32.
inline void strided_numbers(const void* p, int64_t i, int64_t stride, int n, int32_t type, float* out) {
  const uint16_t* half = (const uint16_t*)p + i;
  if (type == FLOAT32)
    for (int k = 0; k < n; k++) out[k] = ((const float*)p)[i + k * stride];
  if (type == FLOAT16)
    for (int k = 0; k < n; k++) out[k] = _cvtsh_ss(half[k * stride]);
  if (type == BFLOAT16)
    for (int k = 0; k < n; k++) ((uint32_t*)out)[k] = (uint32_t)half[k * stride] << 16;
}

}  // namespace
