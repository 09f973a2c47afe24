// Attention of a few new tokens over packed latents; `modules/kernels/attention.py` is the reference.
//
// Work is divided into items: a row of the batch, a key/value head, a share of the row's blocks. An item goes over its
// tokens in batches of at most SPAN, and for each
//   1. unpacks the key codes to bytes, four channels of a token side by side;
//   2. multiplies them with the rows that the queries ask for, and gets scores;
//   3. updates the running softmax, and sums up the value codes weighted by the probabilities.
//
// The rows. With RoPE relative to the batch's first token (offset o), the score of a latent c is
//     sum_f  a_f.c (q1_f cos(t_f o) + q2_f sin(t_f o)) + b_f.c (q2_f cos(t_f o) - q1_f sin(t_f o))
// over the pairs f of frequency t_f, where a_f, b_f are the two rows of the key expansion and (q1, q2) the query rotated
// to its distance from the first token. Fast pairs are rebuilt: a_f and b_f are rows, rotation and query come after.
// Slow pairs turn so little within a batch that the sum over them, a vector of the latent space for each query and
// offset, is a polynomial of o: it is computed at K Chebyshev nodes only, these vectors are the rows, and the scores
// are interpolated between them. The slower a pair, the longer its interval: four levels, each four times as long as
// the one below, hand their sums down by interpolation. The bound of the error is `tolerance` per pair.
//
// The arithmetic. Rows are scaled by the block's scales and rounded to 8 bits (16 where `planes` is 2: two products);
// codes are exact, minus their middle level; products are summed up exactly. Probabilities are rounded to 15 bits.
// What is not codes (16 bits, sinks, window, float32 models) is multiplied in float32.

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <list>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

namespace {

constexpr int SPAN = 128;  // tokens of a batch
constexpr int HALF = 64;   // tokens for which cosines and sines are tabulated
constexpr int LEVELS = 4;
constexpr int MAX_NODES = 8;

inline int round_up(int x, int to) { return (x + to - 1) / to * to; }

// ---- sixteen lanes

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
inline vi loadi(const void* p, int n) {
  return n >= 16 ? loadi(p) : _mm512_maskz_loadu_epi32((1u << n) - 1, p);
}
inline void storei(void* p, vi x) { _mm512_storeu_si512(p, x); }
inline vi seti(int x) { return _mm512_set1_epi32(x); }
inline vf to_float(vi x) { return _mm512_cvtepi32_ps(x); }
inline vi to_int(vf x) { return _mm512_cvtps_epi32(x); }
inline vi addi(vi a, vi b) { return _mm512_add_epi32(a, b); }
inline vi subi(vi a, vi b) { return _mm512_sub_epi32(a, b); }
inline vi andi(vi a, vi b) { return _mm512_and_si512(a, b); }
inline vi ori(vi a, vi b) { return _mm512_or_si512(a, b); }
inline vi shl(vi a, int n) { return _mm512_slli_epi32(a, n); }
inline vi shr(vi a, int n) { return _mm512_srli_epi32(a, n); }
inline vi sar(vi a, int n) { return _mm512_srai_epi32(a, n); }
inline vi mul16(vi a, vi b) { return _mm512_mullo_epi16(a, b); }
inline vi shr16(vi a, int n) { return _mm512_srli_epi16(a, n); }
// Bytes of a lane: four codes (unsigned) times four weights (signed), added to the lane. The intrinsic makes GCC 12 keep
// sums in memory.
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
inline float sum(vf x) { return _mm512_reduce_add_ps(x); }
inline float maximum(vf x) { return _mm512_reduce_max_ps(x); }
inline vf from_half(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
inline vf from_bfloat(const uint16_t* p) {
  return _mm512_castsi512_ps(shl(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define ALRD_AVX512 0
struct vf { __m256 a, b; };
struct vi { __m256i a, b; };
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
inline void storei(void* p, vi x) {
  _mm256_storeu_si256((__m256i*)p, x.a), _mm256_storeu_si256((__m256i*)p + 1, x.b);
}
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
inline vi shl(vi x, int n) { return {_mm256_slli_epi32(x.a, n), _mm256_slli_epi32(x.b, n)}; }
inline vi shr(vi x, int n) { return {_mm256_srli_epi32(x.a, n), _mm256_srli_epi32(x.b, n)}; }
inline vi sar(vi x, int n) { return {_mm256_srai_epi32(x.a, n), _mm256_srai_epi32(x.b, n)}; }
inline vi mul16(vi x, vi y) { return {_mm256_mullo_epi16(x.a, y.a), _mm256_mullo_epi16(x.b, y.b)}; }
inline vi shr16(vi x, int n) { return {_mm256_srli_epi16(x.a, n), _mm256_srli_epi16(x.b, n)}; }
// As above, for codes of at most 4 bits: two products are summed up in 16 bits on the way.
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
  const __m256i order = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  return {_mm256_shuffle_epi8(x.a, order), _mm256_shuffle_epi8(x.b, order)};
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

// exp(x) for x <= 0, relative error below 3e-7; for x below -87, and -inf, what it is at -87.
inline vf exp_negative(vf x) {
  x = max(x, set1(-87.0f));
  const vi n = to_int(mul(x, set1(1.44269504f)));
  const vf k = to_float(n);
  const vf r = fnma(k, set1(1.42860677e-6f), fnma(k, set1(0.693145752f), x));
  vf y = set1(1.0f / 720);
  for (float c : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) y = fma(y, r, set1(c));
  return mul(y, power_of_two(n));
}

}  // namespace

// ---- arguments; `modules/kernels/cpu.py` has the same structures

extern "C" {

enum Type : int32_t { FLOAT32, FLOAT16, BFLOAT16 };
constexpr int32_t TERNARY = 158;

// Channels that are stored alike (`PackedPart`); strides in elements, 0 for calibrated scales.
struct Part {
  int32_t bits, run;
  int32_t rows;  // of words, or tokens, in a block
  const void* packed;
  int64_t slot_stride, token_stride;  // from slot to slot; from one row of words (16 bits: token) to the next
  const void *scale, *zero_point;     // zero_point may be null
  int64_t scale_slot_stride, scale_row_stride;
  int32_t scale_type, spacing, offset;  // step = spacing * scale; symmetric zero point = -offset * scale
  int32_t levels;
};

// Consecutive channels of a head group in a part, with one scale group if scales are per token (column >= 0).
struct Segment {
  int32_t part, channel, count, column;
  int32_t position;  // where they stand among the columns of the group
};

struct Side {
  const Part* parts;
  const Segment* segments;       // those multiplied as codes first
  const int32_t* first_segment;  // [groups + 1]
  const int32_t* integers;       // [groups] segments that are multiplied as codes
  const int32_t* columns;        // [groups] columns in use
  int32_t groups, width;         // columns of the widest group
  int32_t run;                   // tokens of a block that share scales per channel
  int32_t by_block;              // whether scales per channel belong to blocks
};

// A run of tokens in full precision for each row of the batch.
struct Exact {
  const void *keys, *values;
  int64_t key_row, key_token, value_row, value_token;
  const int32_t *start, *count;
};

struct Arguments {
  const float* query;        // [B, H_q, L, 2 half]
  const int64_t* positions;  // [B, L]
  const double* frequency;   // [half], falling; 0: no rotation
  const int32_t* order;      // [half], the pair of each frequency
  const void *weight, *bias;  // of the expansion, [H_kv * 2 half, weight_stride], [H_kv * 2 half]; may be null
  const int32_t* key_channel;  // [groups, keys.width] channel of the group in a column, -1: none
  const int32_t* table;      // [3, B, blocks]
  const Exact* exact;
  const int32_t *key_start, *key_count, *value_start, *value_count;  // channels of each head group
  const int32_t* value_channel;  // [groups, values.width] channel of the group in a column, -1: none
  float* output;                 // [B, H_q, L, output_width]
  Side keys, values;
  int32_t batch, query_heads, heads, length, half, blocks, block_length, exact_width, output_width, n_exact;
  int32_t state_type, weight_type, weight_stride, planes, threads;
  float scaling, tolerance;
};

}  // extern "C"

namespace {

// ---- unrolled loops

#define INLINE __attribute__((always_inline))

template <class F, int... I>
INLINE inline void each(F f, std::integer_sequence<int, I...>) {
  (f(std::integral_constant<int, I>{}), ...);
}

// f(0) … f(N - 1), unrolled before the compiler decides what to keep in registers.
template <int N, class F>
INLINE inline void each(F f) {
  each(f, std::make_integer_sequence<int, N>{});
}

// ---- numbers in memory

inline float number(const void* p, int64_t i, int32_t type) {
  if (type == FLOAT32) return ((const float*)p)[i];
  const uint16_t x = ((const uint16_t*)p)[i];
  if (type == FLOAT16) return _cvtsh_ss(x);
  const uint32_t bits = (uint32_t)x << 16;
  float y;
  memcpy(&y, &bits, 4);
  return y;
}

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

// ---- codes in words

// How the codes of a plane stand in a word: `fields` tokens in a byte, 4 bytes.
struct Layout {
  int bits, fields;
  int words(int tokens) const { return (tokens + 4 * fields - 1) / (4 * fields); }
};

inline Layout layout_of(int bits) { return {bits, bits == TERNARY ? 5 : 8 / bits}; }

// Bytes j of a lane: the code of token `fields * j + i` of its word.
inline vi field(vi word, Layout layout, int i) {
  if (layout.bits != TERNARY) return andi(shr(word, layout.bits * i), seti(0x01010101 * ((1 << layout.bits) - 1)));
  static const int powers[] = {1, 3, 9, 27, 81};
  const vi power = seti(powers[i] * 0x10001), three = seti(0x30003), low = seti(0x00FF00FF);
  const vi even = shr16(mul16(andi(mul16(andi(word, low), power), low), three), 8);
  const vi odd = shr16(mul16(andi(mul16(shr16(word, 8), power), low), three), 8);
  return ori(even, shl(odd, 8));
}

// The planes of a width: 3 bits are 2 low ones and a high one.
struct Plane {
  Layout layout;
  int first_word, shift;
};

inline int planes_of(int bits, int run, Plane* planes) {
  if (bits != 3) {
    planes[0] = {layout_of(bits), 0, 0};
    return 1;
  }
  planes[0] = {layout_of(2), 0, 0};
  planes[1] = {layout_of(1), planes[0].layout.words(run), 2};
  return 2;
}

// The words of `run_length` tokens of a block which start at token `run_start`: rows of a part's words before them.
inline int64_t run_words(const Part& part, int run_start) {
  Plane planes[2];
  const int n = planes_of(part.bits, part.run, planes);
  return (int64_t)(run_start / part.run) * (planes[n - 1].first_word + planes[n - 1].layout.words(part.run));
}

#if ALRD_AVX512
// As `unpack`, for 16 channels of a plane and a start that 16 divides: 16 tokens of four channels at a time.
template <int BITS>
inline void unpack_vectors(const int32_t* rows, int64_t row_stride, int count, int n_words, int start, int n,
                           int32_t* out, int stride, int shift) {
  constexpr int fields = 8 / BITS, tokens = 4 * fields, words = tokens < 16 ? 16 / tokens : 1;
  const int quads = (count + 3) / 4;
  alignas(64) static const auto lanes = [] {
    struct { int32_t pick[16], shift[16]; } y;
    for (int l = 0; l < 16; l++) y.pick[l] = l / fields % 4 + (l / tokens & 1) * 16, y.shift[l] = l % fields * BITS;
    return y;
  }();
  const vi by = loadi(lanes.shift), mask = seti(0x01010101 * ((1 << BITS) - 1));
  for (int t = 0; t < n; t += 16) {
    const int w = (start + t) / tokens;
    vi word[4];
    each<words>([&](auto i) INLINE {
      word[i] = w + i < n_words ? transpose_bytes(loadi(rows + (w + i) * row_stride, count)) : seti(0);
    });
    vi index = addi(loadi(lanes.pick), seti((start + t) % tokens / fields));
    for (int q = 0; q < quads; q++, index = addi(index, seti(4))) {
      vi code;
      if (words == 1) {
        code = _mm512_permutexvar_epi32(index, word[0]);
      } else {
        code = _mm512_permutex2var_epi32(word[0], index, word[1]);
        if (words == 4)
          code = _mm512_mask_blend_epi32(0xFF00, code, _mm512_permutex2var_epi32(word[2], index, word[3]));
      }
      code = andi(_mm512_srlv_epi32(code, by), mask);
      int32_t* to = out + q * stride + t;
      storei(to, shift ? ori(loadi(to), shl(code, shift)) : code);
    }
  }
}
#endif

// Codes of tokens [start, start + n) of a run, for `count` channels: codes[quad][token][4], `stride` tokens a quad.
// What is written goes on to the end of the last word.
void unpack(const Part& part, const int32_t* words, int run_length, int start, int n, int channel, int count,
            uint8_t* codes, int stride) {
  Plane planes[2];
  const int n_planes = planes_of(part.bits, run_length, planes);
  for (int c = 0; c < count; c += 16) {
    const int left = std::min(16, count - c), quads = (left + 3) / 4;
    int32_t* out = (int32_t*)codes + (int64_t)(c / 4) * stride;
    for (int p = 0; p < n_planes; p++) {
      const Layout layout = planes[p].layout;
      const int tokens = 4 * layout.fields;
#if ALRD_AVX512
      if (layout.bits != TERNARY && start % 16 == 0) {
        const int32_t* rows = words + (int64_t)planes[p].first_word * part.token_stride + channel + c;
        const auto unpack_plane = layout.bits == 1   ? unpack_vectors<1>
                                  : layout.bits == 2 ? unpack_vectors<2>
                                  : layout.bits == 4 ? unpack_vectors<4>
                                                     : unpack_vectors<8>;
        unpack_plane(rows, part.token_stride, left, layout.words(run_length), start, n, out, stride, planes[p].shift);
        continue;
      }
#endif
      for (int w = start / tokens; w * tokens < start + n; w++) {
        const int32_t* row = words + (int64_t)(planes[p].first_word + w) * part.token_stride + channel + c;
        const vi word = loadi(row, left);
        for (int i = 0; i < layout.fields; i++) {
          int32_t lanes[16];  // [quad][j]: token fields * j + i
          storei(lanes, shl(transpose_bytes(field(word, layout, i)), planes[p].shift));
          for (int j = 0; j < 4; j++) {
            const int token = w * tokens + layout.fields * j + i - start;
            if (token < 0 || token >= stride) continue;
            for (int q = 0; q < quads; q++) {
              int32_t* to = out + q * stride + token;
              *to = p ? *to | lanes[4 * q + j] : lanes[4 * q + j];
            }
          }
        }
      }
    }
  }
}

// ---- rows

// Rows as lanes: `lanes` of them (a multiple of 16) for each column, [columns + 1][lanes], the last column the bias.
// Rounded to integers for a span of tokens.
struct Rounded {
  int lanes = 0;
  std::vector<int32_t> weights;      // [plane][quad][lane], four columns each
  std::vector<float> step, constant;  // [lane]: row = step * product + constant
  std::vector<float> totals, sums;    // per token, [scale group][lane]: sum of the integers, and of the row

  void reserve(int n_lanes, int quads, int planes, int groups) {
    lanes = n_lanes;
    weights.resize((size_t)planes * quads * lanes);
    step.resize(lanes), constant.resize(lanes);
    totals.resize((size_t)groups * lanes), sums.resize((size_t)groups * lanes);
  }
};

// What a span's columns are multiplied with.
struct Columns {
  int quads = 0, floats = 0, first_float = 0, last = 0;  // `last`: the bias
  std::vector<float> scale, centre, middle;  // of each column: x = scale * (code - middle) + centre
  struct Group { int first, last; const float *scale, *centre; float middle; };  // per token: quads; [token]
  std::vector<Group> groups;
  int64_t code_sum = 0;  // the largest sum of codes
};

void round_rows(const float* rows, int lanes, const Columns& columns, int planes, Rounded& out) {
  const bool per_token = !columns.groups.empty();
  const int quads = columns.quads;
  out.reserve(lanes, quads, planes, columns.groups.size());
  const float limit =
      planes == 1 ? 127 : std::min<double>(32512, std::floor(2147000000.0 / std::max<int64_t>(1, columns.code_sum)));
  const float* scale = columns.scale.data();
  for (int l = 0; l < lanes; l += 16) {
    vf highs[4], constants[4];  // four, so that they do not wait for each other
    each<4>([&](auto i) INLINE { highs[i] = set1(1e-30f), constants[i] = set1(0); });
    for (int c = 0; c < 4 * quads; c += 4)
      each<4>([&](auto i) INLINE {
        const vf row = load(rows + (int64_t)(c + i) * lanes + l);
        highs[i] = max(highs[i], abs(per_token ? row : mul(row, set1(scale[c + i]))));
        if (!per_token) constants[i] = fma(row, set1(columns.centre[c + i]), constants[i]);
      });
    const vf highest = max(max(highs[0], highs[1]), max(highs[2], highs[3]));
    const vf constant = add(add(add(constants[0], constants[1]), add(constants[2], constants[3])),
                            load(rows + (int64_t)columns.last * lanes + l));
    const float* h = (const float*)&highest;
    alignas(64) float inverse[16];
    for (int i = 0; i < 16; i++) inverse[i] = limit / h[i];
    const vf inv = load(inverse), step = mul(highest, set1(1.0f / limit));
    const vi low = seti(255);
    vf shift = set1(0);
    size_t g = 0;
    vi total = seti(0);
    vf row_sum = set1(0);
    for (int q = 0; q < quads; q++) {
      vi b[4], part = seti(0);
      for (int i = 0; i < 4; i++) {
        const vf row = load(rows + (int64_t)(4 * q + i) * lanes + l);
        b[i] = to_int(mul(per_token ? row : mul(row, set1(scale[4 * q + i])), inv));
        part = addi(part, b[i]);
        if (per_token) row_sum = add(row_sum, row);
      }
      shift = fma(to_float(part), set1(columns.middle[4 * q]), shift);
      if (per_token) {
        total = addi(total, part);
        if (q + 1 == columns.groups[g].last) {
          store(&out.totals[g * lanes + l], to_float(total)), store(&out.sums[g * lanes + l], row_sum);
          total = seti(0), row_sum = set1(0), g++;
        }
      }
      vi lows[4];
      for (int i = 0; i < 4; i++) lows[i] = b[i];
      if (planes == 2) {
        vi high[4];
        for (int i = 0; i < 4; i++) {
          high[i] = sar(addi(b[i], seti(128)), 8);
          lows[i] = subi(b[i], shl(high[i], 8));
        }
        storei(&out.weights[(size_t)q * lanes + l],
               ori(ori(andi(high[0], low), shl(andi(high[1], low), 8)),
                   ori(shl(andi(high[2], low), 16), shl(high[3], 24))));
      }
      storei(&out.weights[((size_t)(planes - 1) * quads + q) * lanes + l],
             ori(ori(andi(lows[0], low), shl(andi(lows[1], low), 8)),
                 ori(shl(andi(lows[2], low), 16), shl(lows[3], 24))));
    }
    store(&out.step[l], step);
    store(&out.constant[l], per_token ? constant : fnma(step, shift, constant));
  }
}

// The span's codes and numbers.
struct Tokens {
  const uint8_t* codes;  // [quad][token][4]
  const float* numbers;  // [column][token]
  int stride;            // tokens
};

// Codes of quads [first, last) times M rows, for 16 V tokens.
template <int M, int V>
INLINE inline void multiply_codes(const int32_t* weights, int lanes, const uint8_t* codes, int stride, int first,
                                  int last, vi (&sum)[M][V]) {
  weights += (size_t)first * lanes, codes += (size_t)first * stride * 4;
  for (int q = first; q < last; q++, weights += lanes, codes += (size_t)stride * 4) {
    vi code[V];
    each<V>([&](auto v) INLINE { code[v] = loadi(codes + 64 * v); });
    each<M>([&](auto m) INLINE {
      const vi weight = seti(weights[m]);
      each<V>([&](auto v) INLINE { sum[m][v] = dot4(sum[m][v], code[v], weight); });
    });
  }
}

// The same for rows of one or two bytes.
template <int M, int V>
INLINE inline void multiply_rounded(const Rounded& rounded, const Columns& columns, const Tokens& tokens, int planes,
                                    int row, int token, int first, int last, vi (&sum)[M][V]) {
  const int32_t* weights = rounded.weights.data() + row;
  const uint8_t* codes = tokens.codes + (int64_t)token * 4;
  each<M>([&](auto m) INLINE { each<V>([&](auto v) INLINE { sum[m][v] = seti(0); }); });
  multiply_codes<M, V>(weights, rounded.lanes, codes, tokens.stride, first, last, sum);
  if (planes == 2) {
    each<M>([&](auto m) INLINE { each<V>([&](auto v) INLINE { sum[m][v] = shl(sum[m][v], 8); }); });
    weights += (size_t)columns.quads * rounded.lanes;
    multiply_codes<M, V>(weights, rounded.lanes, codes, tokens.stride, first, last, sum);
  }
}

// M rows times 16 V tokens from `token` on.
template <int M, int V>
INLINE inline void multiply(const Rounded& rounded, const float* rows, const Columns& columns, const Tokens& tokens,
                            int planes, int row, int token, vf (&out)[M][V]) {
  const int lanes = rounded.lanes;
  if (columns.groups.empty() && columns.quads) {
    vi sum[M][V];
    multiply_rounded<M, V>(rounded, columns, tokens, planes, row, token, 0, columns.quads, sum);
    each<M>([&](auto m) INLINE {
      const vf step = set1(rounded.step[row + m]), constant = set1(rounded.constant[row + m]);
      each<V>([&](auto v) INLINE { out[m][v] = fma(to_float(sum[m][v]), step, constant); });
    });
  } else {
    each<M>([&](auto m) INLINE {
      const vf constant = set1(rows[(int64_t)columns.last * lanes + row + m]);
      each<V>([&](auto v) INLINE { out[m][v] = constant; });
    });
    for (size_t g = 0; g < columns.groups.size(); g++) {
      const Columns::Group& group = columns.groups[g];
      vi sum[M][V];
      multiply_rounded<M, V>(rounded, columns, tokens, planes, row, token, group.first, group.last, sum);
      each<M>([&](auto m) INLINE {
        const vf step = set1(rounded.step[row + m]), row_sum = set1(rounded.sums[g * lanes + row + m]);
        const vf all = set1(-group.middle * rounded.totals[g * lanes + row + m]);
        each<V>([&](auto v) INLINE {
          const vf centred = mul(add(to_float(sum[m][v]), all), step);
          out[m][v] = fma(centred, load(group.scale + token + 16 * v), out[m][v]);
          out[m][v] = fma(row_sum, load(group.centre + token + 16 * v), out[m][v]);
        });
      });
    }
  }
  const float* row_of = rows + (int64_t)columns.first_float * lanes + row;
  const float* number = tokens.numbers + token;
  for (int c = 0; c < columns.floats; c++, row_of += lanes, number += tokens.stride) {
    vf x[V];
    each<V>([&](auto v) INLINE { x[v] = load(number + 16 * v); });
    each<M>([&](auto m) INLINE {
      const vf r = set1(row_of[m]);
      each<V>([&](auto v) INLINE { out[m][v] = fma(r, x[v], out[m][v]); });
    });
  }
}

// How the pairs are divided: the first `fast` are rebuilt, then those of level 0, 1, …; K nodes; cosines of offsets.
struct Division {
  int half, fast, nodes, levels;
  int first[LEVELS + 1];            // pairs of level l: [first[l], first[l + 1])
  double span[LEVELS], interval[LEVELS], node[LEVELS][MAX_NODES];
  std::vector<float> cosine, sine;  // [fast, padded][2 HALF] of offsets
  std::vector<float> half_cosine, half_sine;  // [fast], a turn back by HALF
  std::vector<float> lagrange;      // [nodes][2 SPAN]
  std::vector<float> node_cosine, node_sine;  // [half][MAX_NODES]
  double scale[LEVELS][MAX_NODES];            // of the Lagrange polynomials

  // Weights of the nodes of a level at x.
  void interpolate(int l, double x, double* weight) const {
    double before = 1, after = 1;
    for (int k = 0; k < nodes; k++) weight[k] = scale[l][k] * before, before *= x - node[l][k];
    for (int k = nodes - 1; k >= 0; k--) weight[k] *= after, after *= x - node[l][k];
  }
};

// `columns` products for each row and token, `queries` that share a key head.
Division divide(const double* frequency, int half, double tolerance, int columns, int queries) {
  Division best;
  double best_cost = std::numeric_limits<double>::infinity();
  const double quads = columns / 4.0;
  for (int nodes : {0, 1, 4, 6, 8}) {
    if (nodes == 1 && frequency[0] != 0) continue;
    // |error| of a pair of angle z at the ends of the interval: z^K / (2^(K-1) K!)
    double bound = nodes ? tolerance * std::ldexp(1.0, nodes - 1) : 0;
    for (int k = 2; k <= nodes; k++) bound *= k;
    const double z = nodes > 1 ? std::pow(bound, 1.0 / nodes) : 0;
    int fast = 0;
    while (fast < half && (nodes == 0 || frequency[fast] * SPAN / 2 > z)) fast++;
    fast = std::min(half, round_up(fast, 3));
    const int lanes = round_up(2 * fast, 16) + round_up(nodes * queries, 16);
    // Products and what follows them, per 16 tokens; rounding, and the sums at the nodes, per batch of SPAN.
    const double cost = fast * (2 * quads + 8 + 2 * queries) + nodes * queries * (quads + 2) +
                        columns * (lanes / 2.0 + round_up(nodes * queries, 16) * (nodes + 16) / 12.0) / (SPAN / 16);
    if (cost >= best_cost) continue;
    best_cost = cost;
    Division d;
    d.half = half, d.fast = fast, d.nodes = fast == half ? 0 : nodes;
    d.levels = nodes > 1 ? LEVELS : 1;
    d.first[0] = fast;
    for (int l = 0; l < LEVELS; l++) {
      d.span[l] = SPAN << (2 * l);
      d.interval[l] = l ? d.span[l] + d.interval[l - 1] : SPAN;
      int last = l + 1 == d.levels ? half : d.first[l];
      if (l + 1 < d.levels)
        while (last < half && frequency[last] * (d.interval[l] + 4 * d.span[l]) / 2 > z) last++;
      d.first[l + 1] = last;
    }
    best = d;
  }
  Division& d = best;
  const double pi = 3.14159265358979323846;
  for (int l = 0; l < LEVELS; l++)
    for (int k = 0; k < d.nodes; k++)
      d.node[l][k] = d.nodes == 1 ? 0 : d.interval[l] / 2 * (1 + std::cos((2 * k + 1) * pi / (2 * d.nodes)));
  const int fast = round_up(d.fast, 3);
  for (int l = 0; l < LEVELS; l++)
    for (int k = 0; k < d.nodes; k++) {
      d.scale[l][k] = 1;
      for (int m = 0; m < d.nodes; m++)
        if (m != k) d.scale[l][k] /= d.node[l][k] - d.node[l][m];
    }
  d.cosine.assign((size_t)fast * 2 * HALF, 0), d.sine = d.cosine;
  for (int f = 0; f < d.fast; f++)
    for (int o = 0; o < 2 * HALF; o++) {
      d.cosine[(size_t)f * 2 * HALF + o] = std::cos(frequency[f] * o);
      d.sine[(size_t)f * 2 * HALF + o] = std::sin(frequency[f] * o);
    }
  for (int f = 0; f < d.fast; f++)
    d.half_cosine.push_back(std::cos(frequency[f] * HALF)), d.half_sine.push_back(-std::sin(frequency[f] * HALF));
  d.lagrange.resize((size_t)d.nodes * 2 * SPAN);
  for (int o = 0; o < 2 * SPAN; o++) {
    double weight[MAX_NODES];
    d.interpolate(0, o, weight);
    for (int k = 0; k < d.nodes; k++) d.lagrange[(size_t)k * 2 * SPAN + o] = weight[k];
  }
  d.node_cosine.resize((size_t)half * MAX_NODES), d.node_sine.resize((size_t)half * MAX_NODES);
  for (int l = 0; l < d.levels; l++)
    for (int f = d.first[l]; f < d.first[l + 1]; f++)
      for (int k = 0; k < d.nodes; k++) {
        d.node_cosine[f * MAX_NODES + k] = std::cos(frequency[f] * d.node[l][k]);
        d.node_sine[f * MAX_NODES + k] = std::sin(frequency[f] * d.node[l][k]);
      }
  return best;
}

// The division for these arguments, made once.
const Division& division_of(const double* frequency, int half, double tolerance, int columns, int queries) {
  struct Kept {
    std::vector<double> frequency;
    double tolerance;
    int columns, queries;
    std::unique_ptr<Division> division;
  };
  static std::mutex mutex;
  static std::list<Kept> all;  // addresses stay as it grows
  const std::lock_guard<std::mutex> guard(mutex);
  for (const Kept& kept : all)
    if (kept.tolerance == tolerance && kept.columns == columns && kept.queries == queries &&
        kept.frequency.size() == (size_t)half && std::equal(frequency, frequency + half, kept.frequency.begin()))
      return *kept.division;
  all.push_back({{frequency, frequency + half}, tolerance, columns, queries,
                 std::make_unique<Division>(divide(frequency, half, tolerance, columns, queries))});
  return *all.back().division;
}

// The rows of one key head, for queries that move along the context.
struct Rows {
  const Division* division;
  const double* frequency;
  const float* expansion;  // [half][2][columns + 1]
  int columns, queries, fast_lanes, node_lanes;
  int64_t reference;               // position to which the queries below are rotated
  std::vector<float> query;        // [half][2][queries]
  std::vector<float> fast;         // [columns + 1][fast_lanes], rows a_0, b_0, a_1, b_1, …
  std::vector<float> pair_query;   // [queries][2][fast, padded]: of the fast pairs
  std::vector<float> fast_query;   // [2][queries][2][fast, padded]: rotated to the distance from the anchor, and + HALF
  int padded;                      // fast, padded
  std::vector<float> nodes;        // [columns + 1][node_lanes], row k * queries + j
  struct Level {
    bool valid = false, turned = false;
    int64_t anchor = 0, turned_to = 0, step = 0;
    std::vector<double> cosine, sine, step_cosine, step_sine;  // [pairs]: to the anchor; by the last step
    std::vector<float> sums;             // [columns + 1][node_lanes]
    std::vector<float> spread;           // [nodes][columns + 1][node_lanes]: sums of a node in the lanes of all nodes
  } level[LEVELS];
  std::vector<float> lane_values;   // [half][q1, q2, cosine and sine of the node's offset][node_lanes]
  std::vector<float> coefficients;  // [pairs][2][node_lanes]
  std::vector<float> transfer;      // [nodes above][node_lanes]
  std::vector<int32_t> lane_of;     // [nodes above][node_lanes]: lane of the same query there
  int64_t base = 0;

  void start(const Division& d, const double* frequencies, const float* expansion_, int columns_, int n_queries,
             int64_t reference_, std::vector<float> query_) {
    division = &d, frequency = frequencies, expansion = expansion_, columns = columns_, queries = n_queries;
    reference = reference_, query = std::move(query_);
    fast_lanes = round_up(2 * round_up(d.fast, 3), 16), node_lanes = round_up(d.nodes * queries, 16);
    fast.assign((size_t)(columns + 1) * fast_lanes, 0);
    for (int f = 0; f < d.fast; f++)
      for (int i = 0; i < 2; i++)
        for (int c = 0; c <= columns; c++)
          fast[(size_t)c * fast_lanes + 2 * f + i] = expansion[((int64_t)f * 2 + i) * (columns + 1) + c];
    padded = round_up(d.fast + 2, 16);
    pair_query.assign((size_t)queries * 2 * padded, 0), fast_query.assign((size_t)queries * 4 * padded, 0);
    for (int f = 0; f < d.fast; f++)
      for (int i = 0; i < 2; i++)
        for (int j = 0; j < queries; j++)
          pair_query[((size_t)j * 2 + i) * padded + f] = query[((size_t)f * 2 + i) * queries + j];
    lane_of.resize((size_t)d.nodes * node_lanes);
    for (int k = 0; k < d.nodes; k++)
      for (int lane = 0; lane < node_lanes; lane++) lane_of[(size_t)k * node_lanes + lane] = k * queries + lane % queries;
    lane_values.assign((size_t)d.half * 4 * node_lanes, 0);
    for (int f = d.fast; f < d.half; f++)
      for (int lane = 0; lane < d.nodes * queries; lane++) {
        const int k = lane / queries, j = lane % queries;
        float* to = &lane_values[(size_t)f * 4 * node_lanes + lane];
        to[0] = query[((size_t)f * 2) * queries + j], to[node_lanes] = query[((size_t)f * 2 + 1) * queries + j];
        to[2 * node_lanes] = d.node_cosine[f * MAX_NODES + k], to[3 * node_lanes] = d.node_sine[f * MAX_NODES + k];
      }
    for (int l = 0; l < LEVELS; l++) level[l].valid = level[l].turned = false;
  }

  // Pairs [first, last) rotated from the reference to the distance from `anchor`.
  void turn(Level& at, int first, int last, int64_t anchor) {
    const int n = last - first;
    const int64_t step = anchor - at.turned_to;
    at.cosine.resize(n), at.sine.resize(n), at.step_cosine.resize(n), at.step_sine.resize(n);
    double *cosine = at.cosine.data(), *sine = at.sine.data();
    const double *by_cosine = at.step_cosine.data(), *by_sine = at.step_sine.data();
    if (at.turned && step == at.step) {
#pragma GCC ivdep
      for (int f = 0; f < n; f++) {
        const double c = cosine[f], s = sine[f];
        cosine[f] = c * by_cosine[f] - s * by_sine[f], sine[f] = s * by_cosine[f] + c * by_sine[f];
      }
    } else {
      for (int f = 0; f < n; f++) {
        const double angle = frequency[first + f] * (double)(reference - anchor);
        cosine[f] = std::cos(angle), sine[f] = std::sin(angle);
        if (!at.turned) continue;
        at.step_cosine[f] = std::cos(frequency[first + f] * (double)step);
        at.step_sine[f] = -std::sin(frequency[first + f] * (double)step);
      }
      at.step = at.turned ? step : 0;
    }
    at.turned = true, at.turned_to = anchor;
  }

  // Make `nodes` and `fast_query` those of batches that start at `anchor`.
  void move(int64_t anchor) {
    const Division& d = *division;
    if (!level[0].valid && !level[0].turned) base = anchor;
    if (anchor < base) base = anchor, level[1].valid = level[2].valid = level[3].valid = false;
    if (level[0].valid && level[0].anchor == anchor) return;
    if (level[0].valid && frequency[0] == 0) return;  // nothing turns
    // Level 0 keeps the rotations of the fast pairs too.
    turn(level[0], 0, d.first[1], anchor);
    const double *cosine = level[0].cosine.data(), *sine = level[0].sine.data();
    for (int j = 0; j < queries; j++) {
      const float *q1 = &pair_query[(size_t)j * 2 * padded], *q2 = q1 + padded;
      float *a = &fast_query[(size_t)j * 2 * padded], *b = a + padded;
      float *c = a + (size_t)queries * 2 * padded, *d_ = c + padded;
#pragma GCC ivdep
      for (int f = 0; f < d.fast; f++) {
        const float x = cosine[f], y = sine[f];
        const float u = q1[f] * x - q2[f] * y, v = q2[f] * x + q1[f] * y;
        a[f] = u, b[f] = v;
        c[f] = u * d.half_cosine[f] - v * d.half_sine[f], d_[f] = v * d.half_cosine[f] + u * d.half_sine[f];
      }
    }
    level[0].valid = true, level[0].anchor = anchor;
    if (d.nodes) sum(0, anchor, cosine + d.fast, sine + d.fast, nodes);
  }

  void ensure(int l, int64_t position) {
    const Division& d = *division;
    const int64_t span = d.span[l], anchor = base + (position - base) / span * span;
    if (level[l].valid && level[l].anchor == anchor) return;
    turn(level[l], d.first[l], d.first[l + 1], anchor);
    sum(l, anchor, level[l].cosine.data(), level[l].sine.data(), level[l].sums);
    level[l].valid = true, level[l].anchor = anchor;
    Level& at = level[l];
    if (by_permutation()) return;
    at.spread.resize((size_t)d.nodes * (columns + 1) * node_lanes);
    for (int k = 0; k < d.nodes; k++)
      for (int c = 0; c <= columns; c++) {
        const float* from = &at.sums[(size_t)c * node_lanes + k * queries];
        float* to = &at.spread[((size_t)k * (columns + 1) + c) * node_lanes];
        for (int other = 0; other < d.nodes; other++)
          for (int j = 0; j < queries; j++) to[other * queries + j] = from[j];
      }
  }

  // Sums at the nodes of level `l` over its pairs, and over those of the levels above.
  void sum(int l, int64_t anchor, const double* cosines, const double* sines, std::vector<float>& out) {
    const Division& d = *division;
    const int first = d.first[l], n = d.first[l + 1] - first, lanes = node_lanes, width = columns + 1;
    if (l + 1 < d.levels) ensure(l + 1, anchor);
    out.resize((size_t)width * lanes), coefficients.resize((size_t)std::max(1, n) * 2 * lanes);
    for (int f = 0; f < n; f++) {
      const vf c = set1(cosines[f]), s = set1(sines[f]);
      const float *of_pair = &lane_values[(size_t)(first + f) * 4 * lanes];
      float* to = &coefficients[(size_t)f * 2 * lanes];
      for (int v = 0; v < lanes; v += 16) {
        const vf q1 = load(of_pair + v), q2 = load(of_pair + lanes + v);
        const vf x = load(of_pair + 2 * lanes + v), y = load(of_pair + 3 * lanes + v);
        const vf cosine = fma(c, x, mul(s, y)), sine = fnma(c, y, mul(s, x));  // rotated back by the node's offset
        store(to + v, fnma(q2, sine, mul(q1, cosine)));
        store(to + lanes + v, fma(q1, sine, mul(q2, cosine)));
      }
    }
    const Level* above = nullptr;
    if (l + 1 < d.levels) {
      above = &level[l + 1];
      transfer.resize((size_t)d.nodes * lanes);
      for (int to = 0; to < d.nodes; to++) {
        double weight[MAX_NODES];
        d.interpolate(l + 1, double(anchor - above->anchor) + d.node[l][to], weight);
        for (int k = 0; k < d.nodes; k++)
          std::fill_n(&transfer[(size_t)k * lanes + to * queries], queries, (float)weight[k]);
      }
    }
    const float* rows = expansion + (int64_t)first * 2 * width;
    for (int v = 0; v < lanes; v += 16) {
      int c = 0;
      for (; c + 8 <= width; c += 8) sum_columns<8>(rows, width, n, c, v, above, out);
      for (; c < width; c++) sum_columns<1>(rows, width, n, c, v, above, out);
    }
  }

  // Whether the sums of all nodes are one vector.
  bool by_permutation() const { return ALRD_AVX512 && node_lanes == 16; }

  template <int N>
  inline __attribute__((always_inline)) void sum_columns(const float* rows, int width, int n, int c, int v,
                                                         const Level* above, std::vector<float>& out) {
    const int lanes = node_lanes;
    vf total[N];
#pragma GCC unroll 8
    for (int i = 0; i < N; i++) total[i] = set1(0);
#if ALRD_AVX512
    if (above && by_permutation()) {
      vf sums[N];
      each<N>([&](auto i) INLINE { sums[i] = load(&above->sums[(size_t)(c + i) * 16]); });
      for (int k = 0; k < division->nodes; k++) {
        const vf weight = load(&transfer[(size_t)k * 16]);
        const vi lane = loadi(&lane_of[(size_t)k * 16]);
        each<N>([&](auto i) INLINE {
          total[i] = fma(_mm512_permutexvar_ps(lane, sums[i]), weight, total[i]);
        });
      }
      above = nullptr;
    }
#endif
    if (above)
      for (int k = 0; k < division->nodes; k++) {
        const vf weight = load(&transfer[(size_t)k * lanes + v]);
        const float* from = &above->spread[((size_t)k * width + c) * lanes + v];
#pragma GCC unroll 8
        for (int i = 0; i < N; i++) total[i] = fma(load(from + (size_t)i * lanes), weight, total[i]);
      }
    for (int f = 0; f < 2 * n; f++) {
      const vf weight = load(&coefficients[(size_t)f * lanes + v]);
      const float* row = rows + (int64_t)f * width + c;
#pragma GCC unroll 8
      for (int i = 0; i < N; i++) total[i] = fma(set1(row[i]), weight, total[i]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < N; i++) store(&out[(size_t)(c + i) * lanes + v], total[i]);
  }
};

// ---- an item

// A piece of a block: tokens [first, first + count), at `position`.
struct Chunk {
  int slot, first, count;
  int64_t position;
};

struct Worker {
  const Arguments& a;
  const Division &division, &exact_division;
  std::vector<uint8_t> codes;
  std::vector<float> column_numbers, scores, span_scores, scales;
  std::vector<float> expansion, exact_expansion;
  Rows rows, exact_rows;
  Rounded fast, nodes;
  Columns columns;
  std::vector<float> sums, exact_sums, highest, total;  // values [query][column], [query][channel]; softmax
  std::vector<int32_t> integers;                        // probabilities, rounded
  std::vector<uint32_t> packed_high, packed_low;        // four to a lane, in the order of a layout
  std::vector<float> steps, plain, value_numbers;
  int row = 0, head = 0, group = 0, value_group = 0, queries = 0;
  bool fast_is_rounded = false, nodes_are_rounded = false;
  int64_t rounded_anchor = 0;
  std::vector<int64_t> query_position;

  Worker(const Arguments& arguments, const Division& d, const Division& e)
      : a(arguments), division(d), exact_division(e) {}

  void start(int row_, int head_) {
    row = row_, head = head_;
    group = head * a.keys.groups / a.heads, value_group = head * a.values.groups / a.heads;
    const int shared = a.query_heads / a.heads;
    queries = shared * a.length;
    query_position.resize(queries);
    int64_t reference = 0;
    for (int l = 0; l < a.length; l++) reference = std::max(reference, a.positions[(int64_t)row * a.length + l]);
    std::vector<float> query((size_t)a.half * 2 * queries);
    for (int j = 0; j < queries; j++) {
      const int l = j % a.length, q_head = head * shared + j / a.length;
      query_position[j] = a.positions[(int64_t)row * a.length + l];
      const float* q = a.query + (((int64_t)row * a.query_heads + q_head) * a.length + l) * 2 * a.half;
      for (int f = 0; f < a.half; f++) {
        const double angle = a.frequency[f] * (double)(query_position[j] - reference);
        const double c = std::cos(angle) * a.scaling, s = std::sin(angle) * a.scaling;
        const float q1 = q[a.order[f]], q2 = q[a.half + a.order[f]];
        query[(size_t)f * 2 * queries + j] = q1 * c - q2 * s;
        query[((size_t)f * 2 + 1) * queries + j] = q2 * c + q1 * s;
      }
    }
    if (a.blocks) {
      expand(a.keys.width, a.key_channel + (int64_t)group * a.keys.width, expansion);
      rows.start(division, a.frequency, expansion.data(), a.keys.width, queries, reference, query);
    }
    expand(a.exact_width, nullptr, exact_expansion);
    exact_rows.start(exact_division, a.frequency, exact_expansion.data(), a.exact_width, queries, reference, query);
    sums.assign((size_t)queries * round_up(a.values.width, 16), 0);
    exact_sums.assign((size_t)queries * round_up(a.output_width, 16), 0);
    highest.assign(queries, -std::numeric_limits<float>::infinity()), total.assign(queries, 0);
    scores.resize((size_t)queries * (SPAN + 16)), span_scores.resize((size_t)queries * (SPAN + 16));
    fast_is_rounded = nodes_are_rounded = false;
  }

  // Rows of this head's expansion, [half][2][width + 1], the last column the bias; `channel` null: those of the group.
  void expand(int width, const int32_t* channel, std::vector<float>& out) {
    const int channels = a.key_count[group];
    std::vector<float> row(round_up(channels, 16));
    out.assign((size_t)a.half * 2 * (width + 1), 0);
    float* to = out.data();
    for (int f = 0; f < a.half; f++)
      for (int i = 0; i < 2; i++, to += width + 1) {
        const int dimension = i * a.half + a.order[f];
        const int64_t r = (int64_t)head * 2 * a.half + dimension;
        if (a.weight)
          numbers(a.weight, r * a.weight_stride, channels, a.weight_type, row.data());
        else
          std::fill(row.begin(), row.end(), 0.0f), row[dimension] = 1;
        for (int c = 0; c < width; c++) {
          const int from = channel ? channel[c] : c < channels ? c : -1;
          to[c] = from < 0 ? 0 : row[from];
        }
        to[width] = a.bias ? number(a.bias, r, a.weight_type) : 0;
      }
  }

  static constexpr int STRIDE = SPAN + 64;   // tokens of the buffers
  static constexpr int ROUNDED = SPAN + 32;  // probabilities of a query, and zeros up to the end of the last word
  static constexpr int PACKED = ROUNDED / 4 + 16;

  // ---- scores

  template <int V>
  void score_tokens(const Rows& r, const Tokens& tokens, int token, int offset, float* out) {
    const Division& d = *r.division;
    const float* q = &r.fast_query[offset / HALF * (size_t)queries * 2 * r.padded];
    for (int f = 0; f < d.fast; f += 3) {
      vf k[6][V];
      multiply<6, V>(fast, r.fast.data(), columns, tokens, a.planes, 2 * f, token, k);
      each<3>([&](auto p) INLINE {
        const float* cosine = &d.cosine[(size_t)(f + p) * 2 * HALF + offset % HALF];
        const float* sine = &d.sine[(size_t)(f + p) * 2 * HALF + offset % HALF];
        each<V>([&](auto v) INLINE {
          const vf c = load(cosine + 16 * v), s = load(sine + 16 * v), x = k[2 * p][v];
          k[2 * p][v] = fnma(k[2 * p + 1][v], s, mul(x, c));
          k[2 * p + 1][v] = fma(x, s, mul(k[2 * p + 1][v], c));
        });
      });
      for (int j = 0; j < queries; j++) {
        float* score = out + (size_t)j * (SPAN + 16);
        vf sum[V];
        each<V>([&](auto v) INLINE { sum[v] = load(score + 16 * v); });
        each<3>([&](auto p) INLINE {
          const vf q1 = set1(q[(size_t)j * 2 * r.padded + f + p]), q2 = set1(q[((size_t)j * 2 + 1) * r.padded + f + p]);
          each<V>([&](auto v) INLINE { sum[v] = fma(q2, k[2 * p + 1][v], fma(q1, k[2 * p][v], sum[v])); });
        });
        each<V>([&](auto v) INLINE { store(score + 16 * v, sum[v]); });
      }
    }
    const int n_rows = d.nodes * queries;
    for (int row = 0; row < n_rows; row += 4) {
      vf y[4][V];
      multiply<4, V>(nodes, r.nodes.data(), columns, tokens, a.planes, row, token, y);
      each<4>([&](auto m) INLINE {
        if (row + m >= n_rows) return;
        float* score = out + (size_t)((row + m) % queries) * (SPAN + 16);
        const float* weight = &d.lagrange[(size_t)((row + m) / queries) * 2 * SPAN + offset];
        each<V>([&](auto v) INLINE {
          store(score + 16 * v, fma(load(weight + 16 * v), y[m][v], load(score + 16 * v)));
        });
      });
    }
  }

  // Scores of n tokens of the buffers, whose offsets from the anchor of `r` start at `offset`.
  void score_span(const Rows& r, int n, int offset, float* out) {
    const Tokens tokens = {codes.data(), column_numbers.data(), STRIDE};
    float* sum = span_scores.data();
    std::fill(span_scores.begin(), span_scores.end(), 0.0f);
    for (int t = 0; t < n;) {
      if (n - t > 32) {
        score_tokens<4>(r, tokens, t, offset + t, sum + t);
        t += 64;
      } else {
        score_tokens<1>(r, tokens, t, offset + t, sum + t);
        t += 16;
      }
    }
    for (int j = 0; j < queries; j++)
      memcpy(out + (size_t)j * (SPAN + 16) + offset, sum + (size_t)j * (SPAN + 16), 4 * n);
  }

  // Step of the codes and the value of their first level, or of their middle (`centred`), for n channels from `c` on.
  void parameters(const Part& part, int slot, int parameter_row, int c, int n, bool centred, float* scale,
                  float* zero) {
    const int64_t i = slot * part.scale_slot_stride + parameter_row * part.scale_row_stride + c;
    const float middle = centred ? (part.levels - 1) * 0.5f : 0;
    for (int k = 0; k < n; k += 16) {
      const int m = std::min(16, n - k);
      alignas(64) float s[16], z[16];
      numbers(part.scale, i + k, m, part.scale_type, s);
      if (part.zero_point) numbers(part.zero_point, i + k, m, part.scale_type, z);
      finish_parameters(part, m, middle, s, z, scale + k, zero + k);
    }
  }

  // The same of n tokens from `first` on in a scale group per token.
  void token_parameters(const Part& part, int slot, int first, int n, int column, bool centred, float* scale,
                        float* zero) {
    const int64_t i = slot * part.scale_slot_stride + first * part.scale_row_stride + column;
    alignas(64) float s[SPAN], z[SPAN];
    strided_numbers(part.scale, i, part.scale_row_stride, n, part.scale_type, s);
    if (part.zero_point) strided_numbers(part.zero_point, i, part.scale_row_stride, n, part.scale_type, z);
    finish_parameters(part, n, centred ? (part.levels - 1) * 0.5f : 0, s, z, scale, zero);
  }

  static void finish_parameters(const Part& part, int n, float middle, const float* s, const float* z, float* scale,
                                float* zero) {
    for (int e = 0; e < n; e++) {
      const float step = s[e] * part.spacing;
      scale[e] = step, zero[e] = (part.zero_point ? z[e] : -s[e] * part.offset) + middle * step;
    }
  }

  // Fill the buffers with tokens of a block, from buffer token `to` on. `scales`: those of the run's channels too.
  void load_keys(const Chunk& chunk, int first, int n, int to, bool scales_too) {
    const Side& side = a.keys;
    const int s0 = side.first_segment[group], s1 = side.first_segment[group + 1];
    for (int i = s0; i < s1; i++) {
      const Segment& segment = side.segments[i];
      const Part& part = side.parts[segment.part];
      const int run = part.bits == 16 ? a.block_length : part.run, run_start = first / run * run;
      const int run_length = std::min(run, a.block_length - run_start);
      if (part.bits == 16) {
        load_states(part, chunk.slot, first, n, segment, to);
        continue;
      }
      const int32_t* words =
          (const int32_t*)part.packed + chunk.slot * part.slot_stride + run_words(part, run_start) * part.token_stride;
      const bool as_codes = i - s0 < side.integers[group];
      uint8_t* to_codes = codes.data() + ((int64_t)(as_codes ? segment.position / 4 : 0) * STRIDE + to) * 4;
      if (!as_codes) to_codes = codes.data() + (int64_t)code_columns() * STRIDE + 4 * to;
      unpack(part, words, run_length, first - run_start, n, segment.channel, segment.count, to_codes, STRIDE);
      if (as_codes && segment.column < 0 && scales_too)
        parameters(part, chunk.slot, run_start / run, segment.channel, segment.count, true,
                   &columns.scale[segment.position], &columns.centre[segment.position]);
      if (as_codes && segment.column >= 0) load_token_scales(part, chunk.slot, first, n, segment, i - s0, to);
      if (!as_codes) dequantize(part, chunk.slot, run_start / run, first, n, segment, to_codes, to);
    }
  }

  int code_columns() const { return round_up(a.keys.width, 4); }

  // Scale and centre of n tokens in a scale group, for `Columns::groups`.
  void load_token_scales(const Part& part, int slot, int first, int n, const Segment& segment, int index, int to) {
    float *scale = &scales[(size_t)index * 2 * STRIDE + to], *centre = scale + STRIDE;
    token_parameters(part, slot, first, n, segment.column, true, scale, centre);
  }

  void dequantize(const Part& part, int slot, int parameter_row, int first, int n, const Segment& segment,
                  const uint8_t* from, int to) {
    std::vector<float>& numbers_ = column_numbers;
    std::vector<float> scale(round_up(segment.count, 16)), zero(scale.size());
    if (segment.column < 0)
      parameters(part, slot, parameter_row, segment.channel, segment.count, false, scale.data(), zero.data());
    const int first_float = columns.first_float;
    for (int t = 0; t < n; t++) {
      if (segment.column >= 0) {
        parameters(part, slot, first + t, segment.column, 1, false, scale.data(), zero.data());
        std::fill(scale.begin(), scale.end(), scale[0]), std::fill(zero.begin(), zero.end(), zero[0]);
      }
      for (int c = 0; c < segment.count; c++)
        numbers_[(size_t)(segment.position - first_float + c) * STRIDE + to + t] =
            from[((int64_t)(c / 4) * STRIDE + t) * 4 + c % 4] * scale[c] + zero[c];
    }
  }

  void load_states(const Part& part, int slot, int first, int n, const Segment& segment, int to) {
    for (int t = 0; t < n; t++) {
      const int64_t at = slot * part.slot_stride + (first + t) * part.token_stride + segment.channel;
      for (int c = 0; c < segment.count; c++)
        column_numbers[(size_t)(segment.position - columns.first_float + c) * STRIDE + to + t] =
            number(part.packed, at + c, a.state_type);
    }
  }

  // The columns of this head's packed keys.
  void set_columns() {
    const Side& side = a.keys;
    const int s0 = side.first_segment[group], n = side.integers[group];
    columns = Columns();
    columns.last = side.width;
    int used = 0;
    columns.groups.clear();
    for (int i = 0; i < n; i++) {
      const Segment& segment = side.segments[s0 + i];
      used = segment.position + round_up(segment.count, 4);
    }
    columns.quads = used / 4, columns.first_float = used, columns.floats = side.columns[group] - used;
    columns.scale.assign(used, 0), columns.centre.assign(used, 0), columns.middle.assign(used, 0);
    scales.assign((size_t)std::max(1, n) * 2 * STRIDE, 0);
    for (int i = 0; i < n; i++) {
      const Segment& segment = side.segments[s0 + i];
      const Part& part = side.parts[segment.part];
      const float middle = (part.levels - 1) * 0.5f;
      for (int c = 0; c < round_up(segment.count, 4); c++) columns.middle[segment.position + c] = middle;
      columns.code_sum += (int64_t)segment.count * (part.levels - 1);
      const float* scale = &scales[(size_t)i * 2 * STRIDE];
      if (segment.column >= 0)
        columns.groups.push_back({segment.position / 4, (segment.position + round_up(segment.count, 4)) / 4, scale,
                                  scale + STRIDE, middle});
    }
    codes.resize((size_t)(2 * code_columns() + 16) * STRIDE);
    column_numbers.assign((size_t)std::max(1, std::max(columns.floats, a.exact_width)) * STRIDE, 0);
  }

  void attend_batch(const std::vector<Chunk>& batch) {
    const int64_t anchor = batch[0].position;
    int n = 0;
    for (const Chunk& chunk : batch) n += chunk.count;
    rows.move(anchor);
    const bool by_block = a.keys.by_block;
    if (!nodes_are_rounded || rounded_anchor != anchor) nodes_are_rounded = false;
    auto round = [&] {
      if (division.fast && (by_block || !fast_is_rounded))
        round_rows(rows.fast.data(), rows.fast_lanes, columns, a.planes, fast);
      if (division.nodes && (by_block || !nodes_are_rounded))
        round_rows(rows.nodes.data(), rows.node_lanes, columns, a.planes, nodes);
      fast_is_rounded = nodes_are_rounded = true, rounded_anchor = anchor;
    };
    if (by_block) {
      int offset = 0;
      for (const Chunk& chunk : batch)
        for (int first = chunk.first; first < chunk.first + chunk.count;) {
          const int last = std::min(chunk.first + chunk.count, (first / a.keys.run + 1) * a.keys.run);
          load_keys(chunk, first, last - first, 0, true);
          round();
          score_span(rows, last - first, offset, scores.data());
          offset += last - first, first = last;
        }
    } else {
      int to = 0;
      for (const Chunk& chunk : batch) {
        load_keys(chunk, chunk.first, chunk.count, to, !fast_is_rounded);
        to += chunk.count;
      }
      round();
      score_span(rows, n, 0, scores.data());
    }
    weigh(n, anchor);
    int from = 0;
    for (const Chunk& chunk : batch) {
      add_values(chunk, from);
      from += chunk.count;
    }
  }

  // ---- softmax

  // Scores of n tokens from `position` on become probabilities, relative to the highest score so far.
  void weigh(int n, int64_t position) {
    const float infinity = std::numeric_limits<float>::infinity();
    const int value_stride = round_up(a.values.width, 16), exact_stride = round_up(a.output_width, 16);
    for (int j = 0; j < queries; j++) {
      float* score = &scores[(size_t)j * (SPAN + 16)];
      const int64_t seen = std::min<int64_t>(n, query_position[j] - position + 1);
      for (int t = std::max<int64_t>(0, seen); t < round_up(n, 16); t++) score[t] = -infinity;
      vf high = set1(-infinity);
      for (int t = 0; t < n; t += 16) high = max(high, load(score + t));
      const float higher = std::max(highest[j], maximum(high));
      if (higher == -infinity) {
        std::fill(score, score + round_up(n, 16), 0.0f);
        continue;
      }
      if (higher > highest[j]) {
        const float decay = highest[j] == -infinity ? 0 : std::exp(highest[j] - higher);
        for (int c = 0; c < value_stride; c++) sums[(size_t)j * value_stride + c] *= decay;
        for (int c = 0; c < exact_stride; c++) exact_sums[(size_t)j * exact_stride + c] *= decay;
        total[j] *= decay, highest[j] = higher;
      }
      vf sum_ = set1(0);
      for (int t = 0; t < n; t += 16) {
        const vf p = exp_negative(sub(load(score + t), set1(higher)));
        store(score + t, p);
        sum_ = add(sum_, p);
      }
      // What is not seen has been weighed as e^-87.
      for (int t = std::max<int64_t>(0, seen); t < round_up(n, 16); t++) score[t] = 0;
      total[j] += sum(sum_);
    }
  }

  // ---- values

  // Round the probabilities times `scale` (null: 1) of tokens [from, from + n) to integers, in `steps` of each query;
  // `plain`: the sum of the probabilities times `zero` (null: 1).
  void round_probabilities(int from, int n, const float* scale, const float* zero) {
    integers.resize((size_t)queries * ROUNDED), steps.resize(queries), plain.resize(queries);
    packed_high.resize((size_t)queries * PACKED), packed_low.resize((size_t)queries * PACKED);
    for (int j = 0; j < queries; j++) {
      const float* p = &scores[(size_t)j * (SPAN + 16) + from];
      alignas(64) float x[ROUNDED] = {0}, z[ROUNDED] = {0};
      for (int t = 0; t < n; t++) x[t] = scale ? p[t] * scale[t] : p[t];
      for (int t = 0; t < n; t++) z[t] = zero ? p[t] * zero[t] : p[t];
      vf high = set1(1e-37f), total_ = set1(0);
      for (int t = 0; t < n; t += 16) high = max(high, load(x + t)), total_ = add(total_, load(z + t));
      steps[j] = maximum(high) / 32512, plain[j] = sum(total_);
      const vf inverse = set1(1 / steps[j]);
      int32_t* out = &integers[(size_t)j * ROUNDED];
      for (int t = 0; t < ROUNDED; t += 16) storei(out + t, to_int(mul(load(x + t), inverse)));
    }
  }

  // The rounded probabilities as bytes in the order of a layout: [query][word * fields + i], four to a lane. The first
  // token is the `lead`th of its word.
  void arrange(Layout layout, int lead, int n) {
    const int words = layout.words(lead + n), fields = layout.fields, tokens = 4 * fields;
    for (int j = 0; j < queries; j++) {
      const int32_t* p = &integers[(size_t)j * ROUNDED];
      alignas(64) uint8_t high[ROUNDED + 32], low[ROUNDED + 32];
      memset(high, 0, lead), memset(low, 0, lead);
      for (int t = 0; t < ROUNDED; t++) high[lead + t] = (p[t] + 128) >> 8, low[lead + t] = p[t];
      uint8_t *to_high = (uint8_t*)&packed_high[(size_t)j * PACKED], *to_low = (uint8_t*)&packed_low[(size_t)j * PACKED];
      if (layout.bits == 2 || layout.bits == 4) {
        const __m128i order = layout.bits == 2 ? _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15)
                                               : _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15);
        for (int t = 0; t < words * tokens; t += 16) {
          _mm_storeu_si128((__m128i*)(to_high + t), _mm_shuffle_epi8(_mm_loadu_si128((__m128i*)(high + t)), order));
          _mm_storeu_si128((__m128i*)(to_low + t), _mm_shuffle_epi8(_mm_loadu_si128((__m128i*)(low + t)), order));
        }
        continue;
      }
      for (int w = 0; w < words; w++)
        for (int i = 0; i < fields; i++)
          for (int k = 0; k < 4; k++) {
            const int from = w * tokens + k * fields + i, to = w * tokens + 4 * i + k;
            to_high[to] = high[from], to_low[to] = low[from];
          }
    }
  }

  // Sum of rounded probability times code, for 16 channels and J queries from `query` on.
  template <int BITS, int J>
  INLINE inline void sum_codes(const Part& part, const int32_t* words, int n, int channel, int count, int query, vi (&out)[J]) {
    constexpr int fields = BITS == TERNARY ? 5 : 8 / BITS;
    vi high[J], low[J];
    each<J>([&](auto j) INLINE { high[j] = low[j] = seti(0); });
    const int n_words = (n + 4 * fields - 1) / (4 * fields);
    const uint32_t *weights_high = &packed_high[(size_t)query * PACKED], *weights_low = &packed_low[(size_t)query * PACKED];
    for (int w = 0; w < n_words; w++) {
      const vi word = loadi(words + (int64_t)w * part.token_stride + channel, count);
      each<fields>([&](auto i) INLINE {
        const vi code = field(word, {BITS, fields}, i);
        each<J>([&](auto j) INLINE {
          high[j] = dot4(high[j], code, seti(weights_high[j * PACKED + w * fields + i]));
          low[j] = dot4(low[j], code, seti(weights_low[j * PACKED + w * fields + i]));
        });
      });
    }
    each<J>([&](auto j) INLINE { out[j] = addi(shl(high[j], 8), low[j]); });
  }

  template <int BITS>
  void add_codes(const Part& part, const int32_t* words, int n, int channel, int count, float weight, const float* scale,
                 const float* zero, float* out, int stride) {
    auto finish = [&](vi total_, int j) INLINE {
      float* to = out + (size_t)j * stride;
      vf y = fma(mul(to_float(total_), set1(steps[j] * weight)), load(scale), load(to));
      if (zero) y = fma(load(zero), set1(plain[j]), y);
      store(to, y);
    };
    int j = 0;
    for (; j + 4 <= queries; j += 4) {
      vi totals[4];
      sum_codes<BITS, 4>(part, words, n, channel, count, j, totals);
      each<4>([&](auto k) INLINE { finish(totals[k], j + k); });
    }
    for (; j < queries; j++) {
      vi totals[1];
      sum_codes<BITS, 1>(part, words, n, channel, count, j, totals);
      finish(totals[0], j);
    }
  }

  void add_values(const Chunk& chunk, int from) {
    const Side& side = a.values;
    const int s0 = side.first_segment[value_group], s1 = side.first_segment[value_group + 1];
    const int stride = round_up(side.width, 16);
    for (int first = chunk.first; first < chunk.first + chunk.count;) {
      const int last = std::min(chunk.first + chunk.count, (first / side.run + 1) * side.run);
      const int n = last - first, at = from + first - chunk.first;
      bool rounded = false;
      int arranged = 0;
      for (int i = s0; i < s1; i++) {
        const Segment& segment = side.segments[i];
        const Part& part = side.parts[segment.part];
        if (i - s0 >= side.integers[value_group]) {
          add_numbers(part, chunk.slot, first, n, at, segment, stride);
          continue;
        }
        const int run_start = first / part.run * part.run, run_length = std::min(part.run, a.block_length - run_start);
        const int32_t* words = (const int32_t*)part.packed + chunk.slot * part.slot_stride +
                               run_words(part, run_start) * part.token_stride;
        alignas(64) float token_scale[SPAN], token_zero[SPAN];
        if (segment.column >= 0) {
          token_parameters(part, chunk.slot, first, n, segment.column, false, token_scale, token_zero);
          round_probabilities(at, n, token_scale, token_zero);
          rounded = false, arranged = 0;
        } else if (!rounded) {
          round_probabilities(at, n, nullptr, nullptr);
          rounded = true, arranged = 0;
        }
        Plane planes[2];
        const int n_planes = planes_of(part.bits, run_length, planes);
        for (int p = n_planes - 1; p >= 0; p--) {
          const Layout layout = planes[p].layout;
          const int lead = (first - run_start) % (4 * layout.fields);
          if (arranged != layout.bits) arrange(layout, lead, n), arranged = layout.bits;
          const int first_word = planes[p].first_word + (first - run_start) / (4 * layout.fields);
          const int32_t* plane_words = words + (int64_t)first_word * part.token_stride;
          for (int c = 0; c < segment.count; c += 16) {
            const int left = std::min(16, segment.count - c);
            alignas(64) float scale[16], zero[16];
            for (int k = 0; k < 16; k++) scale[k] = 1, zero[k] = 1;
            if (segment.column < 0)
              parameters(part, chunk.slot, run_start / part.run, segment.channel + c, left, false, scale, zero);
            for (int k = left; k < 16; k++) scale[k] = zero[k] = 0;
            auto add = [&](auto bits) {
              add_codes<bits>(part, plane_words, lead + n, segment.channel + c, left, 1 << planes[p].shift, scale,
                              p ? nullptr : zero, &sums[segment.position + c], stride);
            };
            switch (layout.bits) {
              case 1: add(std::integral_constant<int, 1>()); break;
              case 2: add(std::integral_constant<int, 2>()); break;
              case 4: add(std::integral_constant<int, 4>()); break;
              case 8: add(std::integral_constant<int, 8>()); break;
              default: add(std::integral_constant<int, TERNARY>());
            }
          }
        }
      }
      first = last;
    }
  }

  // Values that are not multiplied as codes.
  void add_numbers(const Part& part, int slot, int first, int n, int at, const Segment& segment, int stride) {
    const int width = round_up(segment.count, 16);
    value_numbers.resize((size_t)n * width);
    if (part.bits == 16) {
      for (int t = 0; t < n; t++)
        numbers(part.packed, slot * part.slot_stride + (first + t) * part.token_stride + segment.channel,
                segment.count, a.state_type, &value_numbers[(size_t)t * width]);
    } else {
      const int run_start = first / part.run * part.run, run_length = std::min(part.run, a.block_length - run_start);
      const int32_t* words = (const int32_t*)part.packed + slot * part.slot_stride +
                             run_words(part, run_start) * part.token_stride;
      std::vector<uint8_t> bytes((size_t)width * STRIDE);
      unpack(part, words, run_length, first - run_start, n, segment.channel, segment.count, bytes.data(), STRIDE);
      std::vector<float> scale(width), zero(width);
      if (segment.column < 0)
        parameters(part, slot, run_start / part.run, segment.channel, segment.count, false, scale.data(), zero.data());
      for (int t = 0; t < n; t++) {
        if (segment.column >= 0) {
          parameters(part, slot, first + t, segment.column, 1, false, scale.data(), zero.data());
          std::fill(scale.begin(), scale.end(), scale[0]), std::fill(zero.begin(), zero.end(), zero[0]);
        }
        for (int c = 0; c < segment.count; c++)
          value_numbers[(size_t)t * width + c] =
              bytes[((size_t)(c / 4) * STRIDE + t) * 4 + c % 4] * scale[c] + zero[c];
      }
    }
    accumulate(n, at, width, &sums[segment.position], stride);
  }

  // Add to each query's sums the probabilities times `value_numbers` [n][width].
  void accumulate(int n, int at, int width, float* out, int stride) {
    for (int j = 0; j < queries; j++)
      for (int c = 0; c < width; c += 16) {
        vf y = load(out + (size_t)j * stride + c);
        for (int t = 0; t < n; t++)
          y = fma(set1(scores[(size_t)j * (SPAN + 16) + at + t]), load(&value_numbers[(size_t)t * width + c]), y);
        store(out + (size_t)j * stride + c, y);
      }
  }

  // ---- tokens in full precision

  void attend_exact(const Exact& exact) {
    const int channels = a.key_count[group], value_channels = a.value_count[value_group];
    columns = Columns();
    columns.last = a.exact_width, columns.floats = channels;
    column_numbers.assign((size_t)std::max(1, a.exact_width) * STRIDE, 0);
    for (int first = 0; first < exact.count[row]; first += SPAN) {
      const int n = std::min(SPAN, exact.count[row] - first);
      const int64_t position = exact.start[row] + first;
      exact_rows.move(position);
      fast.lanes = exact_rows.fast_lanes, nodes.lanes = exact_rows.node_lanes;
      for (int t = 0; t < n; t++) {
        const int64_t at = row * exact.key_row + (first + t) * exact.key_token + a.key_start[group];
        for (int c = 0; c < channels; c++)
          column_numbers[(size_t)c * STRIDE + t] = number(exact.keys, at + c, a.state_type);
      }
      score_span(exact_rows, n, 0, scores.data());
      weigh(n, position);
      const int width = round_up(value_channels, 16);
      value_numbers.resize((size_t)n * width);
      for (int t = 0; t < n; t++)
        numbers(exact.values, row * exact.value_row + (first + t) * exact.value_token + a.value_start[value_group],
                value_channels, a.state_type, &value_numbers[(size_t)t * width]);
      accumulate(n, 0, width, exact_sums.data(), round_up(a.output_width, 16));
    }
  }

  // The words of a head group in a block, on their way while the block before it is computed.
  void prefetch(const Side& side, int of, int slot) const {
    for (int i = side.first_segment[of]; i < side.first_segment[of + 1]; i++) {
      const Segment& segment = side.segments[i];
      const Part& part = side.parts[segment.part];
      const int size = part.bits == 16 && a.state_type != FLOAT32 ? 2 : 4;
      for (int r = 0; r < part.rows; r++) {
        const char* row = (const char*)part.packed + (slot * part.slot_stride + r * part.token_stride) * size;
        for (int c = segment.channel * size; c < (segment.channel + segment.count) * size; c += 64)
          _mm_prefetch(row + c, _MM_HINT_T0);
      }
    }
  }

  // Blocks [first, last) of the row.
  void attend_blocks(int first, int last) {
    const int64_t plane = (int64_t)a.batch * a.blocks;
    const int32_t* table = a.table + (int64_t)row * a.blocks;
    set_columns();
    std::vector<Chunk> batch;
    int tokens = 0;
    auto flush = [&] {
      if (!batch.empty()) attend_batch(batch);
      batch.clear(), tokens = 0;
    };
    for (int i = first; i < last; i++) {
      const int count = table[2 * plane + i];
      if (i + 1 < last) prefetch(a.keys, group, table[i + 1]), prefetch(a.values, value_group, table[i + 1]);
      for (int t = 0; t < count; t += SPAN) {
        const Chunk chunk = {table[i], t, std::min(SPAN, count - t), (int64_t)table[plane + i] + t};
        // Tokens of a batch are at consecutive positions.
        if (tokens && (tokens + chunk.count > SPAN || batch[0].position + tokens != chunk.position)) flush();
        batch.push_back(chunk), tokens += chunk.count;
      }
    }
    flush();
  }

  // [query][output_width + 2]: sums of values by channel, highest score, sum of weights.
  void finish(float* out) {
    const int stride = round_up(a.values.width, 16), exact_stride = round_up(a.output_width, 16);
    const int32_t* channel = a.value_channel + (int64_t)value_group * a.values.width;
    for (int j = 0; j < queries; j++, out += a.output_width + 2) {
      for (int c = 0; c < a.output_width; c++) out[c] = exact_sums[(size_t)j * exact_stride + c];
      for (int c = 0; c < a.values.width; c++)
        if (channel[c] >= 0) out[channel[c]] += sums[(size_t)j * stride + c];
      out[a.output_width] = highest[j], out[a.output_width + 1] = total[j];
    }
  }
};

}  // namespace

extern "C" int alrd_attention(const Arguments* arguments) {
  const Arguments& a = *arguments;
  const int shared = a.query_heads / a.heads, queries = shared * a.length;
  const int heads = a.batch * a.heads;
  int splits = 1;
  if (heads % a.threads) splits = std::min((4 * a.threads + heads - 1) / heads, std::max(1, a.blocks / 4));
  const Division& division = division_of(a.frequency, a.half, a.tolerance, a.keys.width, queries);
  const Division& exact_division = division_of(a.frequency, a.half, a.tolerance, 8 * a.exact_width, queries);
  const int64_t width = a.output_width + 2, share = queries * width;
  std::vector<float> partial((size_t)heads * splits * share);
#pragma omp parallel num_threads(a.threads)
  {
    Worker worker(a, division, exact_division);
#pragma omp for schedule(dynamic)
    for (int item = 0; item < heads * splits; item++) {
      const int split = item % splits, head = item / splits;
      worker.start(head / a.heads, head % a.heads);
      if (split == 0)
        for (int i = 0; i < a.n_exact; i++) worker.attend_exact(a.exact[i]);
      if (a.blocks) worker.attend_blocks((int64_t)a.blocks * split / splits, (int64_t)a.blocks * (split + 1) / splits);
      worker.finish(&partial[(size_t)item * share]);
    }
  }
  for (int head = 0; head < heads; head++) {
    const int b = head / a.heads, h = head % a.heads;
    for (int j = 0; j < queries; j++) {
      const int q_head = h * shared + j / a.length, l = j % a.length;
      float* out = a.output + (((int64_t)b * a.query_heads + q_head) * a.length + l) * a.output_width;
      const float* parts = &partial[(size_t)head * splits * share + j * width];
      float highest = -std::numeric_limits<float>::infinity(), total = 0;
      for (int s = 0; s < splits; s++) highest = std::max(highest, parts[s * share + a.output_width]);
      std::fill(out, out + a.output_width, 0.0f);
      for (int s = 0; s < splits; s++) {
        const float* part = parts + s * share;
        if (part[a.output_width] == -std::numeric_limits<float>::infinity()) continue;
        const float weight = std::exp(part[a.output_width] - highest);
        total += weight * part[a.output_width + 1];
        for (int c = 0; c < a.output_width; c++) out[c] += weight * part[c];
      }
      for (int c = 0; c < a.output_width && total > 0; c++) out[c] /= total;
    }
  }
  return 0;
}

// Whether codes of 8 bits can be multiplied as such.
extern "C" int alrd_takes_bytes() { return ALRD_AVX512; }
