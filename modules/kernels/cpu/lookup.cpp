// Attention over codes of 1, 2 and 4 bits whose scales are constant along the sums: keys quantized per token (and
// cached after RoPE), values per channel (QLUTATTN's formats). Two methods give the integer sums q·k and Σ p·v of a
// block:
//
// * look-up: for each query, and for the weights of each block, tables of the sums over all values of the 4 / bits
//   codes that fill a four-bit index. An entry has 14 bits, in two tables of seven, so that the bytes of two look-ups
//   add up without a carry. AVX-512 VBMI: a table of 64 bytes holds four of 16 entries, one for each byte of a packed
//   word; bits 4 and 5 of the index are the byte's place, and vpdpbusd adds the four up. AVX2: vpshufb, 16-bit sums.
// * dot: the codes times the query, or the weights, in two int8 digits (vpdpbusd; AVX2: vpmaddubsw).
//
// Packed words stand as in modules/quant_utils.py, [words, channels]. Four words of a channel are a "set"; results and
// weights are in "set order": token (word r, byte k, code i) of a set at i * 16 + 4 * r + k.

#include <immintrin.h>
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12 warns of its own AVX-512 header
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

namespace {

constexpr int64_t kChunk = 16;  // channels read at a time

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <int BITS>
struct Format {
  static constexpr int per_byte = 8 / BITS, per_word = 32 / BITS, levels = 1 << BITS;
  static constexpr int combined = 4 / BITS;  // codes of an index
  static constexpr int per_set = 16 * per_byte;
};

// One side's codes at one width by one method. All sizes in bytes; `channels` are those of one scale group of a head.
struct Kernel {
  int32_t limit;  // largest |q| and p as integers
  int64_t (*query_bytes)(int64_t channels);
  int32_t (*prepare_query)(const int32_t* query, int64_t channels, uint8_t* out);  // returns what to subtract
  int64_t (*key_bytes)(int64_t words, int64_t channels);
  void (*unpack_keys)(const int32_t* packed, int64_t stride, int64_t words, int64_t channels, uint8_t* out);
  void (*score)(const uint8_t* query, const uint8_t* keys, int64_t words, int64_t channels, int32_t* out);
  int64_t (*weight_bytes)(int64_t words);
  void (*prepare_weights)(const int16_t* weights, int64_t words, uint8_t* out);
  int64_t (*value_bytes)(int64_t words, int64_t channels);
  void (*unpack_values)(const int32_t* packed, int64_t stride, int64_t words, int64_t channels, uint8_t* out);
  void (*sum)(const uint8_t* weights, const uint8_t* values, int64_t words, int64_t channels, int32_t* out);
};

// The query and the weights of the dot products: two int8 digits, value = 128 * high + low.
template <int BITS>
struct Digits : Format<BITS> {
  using F = Format<BITS>;
  static constexpr int32_t limit = 127 * 128 + 63;
  static int8_t low_digit(int32_t value) { return int8_t(((value + 64) & 127) - 64); }
  static int8_t high_digit(int32_t value) { return int8_t((value - low_digit(value)) / 128); }

  static int64_t query_bytes(int64_t channels) { return ceil_div(channels, 16) * 32; }
  // Digits of four channels: low, high.
  static int32_t prepare_query(const int32_t* query, int64_t channels, uint8_t* out) {
    for (int64_t c = 0; c < ceil_div(channels, 16) * 16; ++c) {
      const int32_t value = c < channels ? query[c] : 0;
      out[c / 4 * 8 + c % 4] = uint8_t(low_digit(value));
      out[c / 4 * 8 + 4 + c % 4] = uint8_t(high_digit(value));
    }
    return 0;
  }
  static int64_t weight_bytes(int64_t words) { return ceil_div(words, 4) * F::per_set * 2; }
  // Digits in set order: all the low ones, then the high ones.
  static void prepare_weights(const int16_t* weights, int64_t words, uint8_t* out) {
    const int64_t n = ceil_div(words, 4) * F::per_set;
    for (int64_t t = 0; t < n; ++t) {
      const int16_t low = int16_t(((weights[t] + 64) & 127) - 64);
      out[t] = uint8_t(low);
      out[n + t] = uint8_t((weights[t] - low) >> 7);
    }
  }
};

#if defined(__AVX512VBMI__) && defined(__AVX512VNNI__) && defined(__AVX512BW__)

using Register = __m512i;

__mmask16 first(int64_t channels) { return channels >= 16 ? 0xffff : (1u << channels) - 1; }

template <class Body>
void in_columns(int64_t columns, const Body& body) {
  int64_t column = 0;
  for (; columns - column >= 8; column += 8) body(std::integral_constant<int, 8>(), column);
  if (columns - column >= 4) body(std::integral_constant<int, 4>(), column), column += 4;
  for (; column < columns; ++column) body(std::integral_constant<int, 1>(), column);
}

// Up to four words of 16 channels: in lane r of register a, dword k: byte k of word r of the channels 4a … 4a + 3.
void load_set(const int32_t* packed, int64_t stride, int64_t words, int64_t channels, Register out[4]) {
  Register v[4];
  for (int r = 0; r < 4; ++r)
    v[r] = r < words && channels > 0 ? _mm512_maskz_loadu_epi32(first(channels), packed + r * stride)
                                     : _mm512_setzero_si512();
  const Register a = _mm512_shuffle_i32x4(v[0], v[1], 0x44), b = _mm512_shuffle_i32x4(v[2], v[3], 0x44);
  const Register c = _mm512_shuffle_i32x4(v[0], v[1], 0xee), d = _mm512_shuffle_i32x4(v[2], v[3], 0xee);
  const Register bytes = _mm512_set4_epi32(0x0f0b0703, 0x0e0a0602, 0x0d090501, 0x0c080400);
  out[0] = _mm512_shuffle_epi8(_mm512_shuffle_i32x4(a, b, 0x88), bytes);
  out[1] = _mm512_shuffle_epi8(_mm512_shuffle_i32x4(a, b, 0xdd), bytes);
  out[2] = _mm512_shuffle_epi8(_mm512_shuffle_i32x4(c, d, 0x88), bytes);
  out[3] = _mm512_shuffle_epi8(_mm512_shuffle_i32x4(c, d, 0xdd), bytes);
}

// Exchange the high half of each field of 2 * SHIFT bits of a with the low half of b's.
template <int SHIFT>
void exchange(Register& a, Register& b, uint8_t low) {
  const Register mask = _mm512_set1_epi8(char(low)), first = a;
  a = _mm512_ternarylogic_epi64(mask, first, _mm512_slli_epi16(b, SHIFT), 0xca);
  b = _mm512_ternarylogic_epi64(mask, _mm512_srli_epi16(first, SHIFT), b, 0xca);
}

template <int BITS>
Register code(Register bytes, int i) {
  return _mm512_and_si512(_mm512_srli_epi16(bytes, i * BITS), _mm512_set1_epi8((1 << BITS) - 1));
}

// Nibble `high` of each byte, with the byte's place in its dword as bits 4 and 5.
Register index_of(Register bytes, bool high) {
  const Register place = _mm512_set1_epi32(0x30201000), nibble = _mm512_set1_epi8(15);
  return _mm512_ternarylogic_epi64(high ? _mm512_srli_epi16(bytes, 4) : bytes, nibble, place, 0xea);
}

Register add_four(Register sum, Register bytes) { return _mm512_dpbusd_epi32(sum, bytes, _mm512_set1_epi8(1)); }

void store(void* out, int64_t i, Register value) { _mm512_store_si512((Register*)out + i, value); }
// Into a register: GCC would load a value anew for each use, and loads are what the inner loops have none to spare of.
Register load(const void* from, int64_t i) {
  Register value = _mm512_load_si512((const Register*)from + i);
  asm("" : "+v"(value));
  return value;
}

template <int BITS>
struct Lookup : Format<BITS> {
  using F = Format<BITS>;
  static constexpr int indexed = 4 * F::combined;  // channels of a register of indices
  static constexpr int32_t limit = 16383 / ((F::levels - 1) * F::combined);

  static int64_t groups(int64_t channels) { return ceil_div(ceil_div(channels, indexed), 2) * 2; }
  static int64_t query_bytes(int64_t channels) { return groups(channels) * 128; }
  static int32_t prepare_query(const int32_t* query, int64_t channels, uint8_t* out) {
    int32_t offset = 0;
    for (int64_t g = 0; g < groups(channels); ++g) {
      int16_t terms[F::combined][4];
      for (int j = 0; j < indexed; ++j) {
        const int64_t c = g * indexed + j;
        terms[j / 4][j % 4] = int16_t(c < channels ? query[c] : 0);
        offset -= std::min<int32_t>(terms[j / 4][j % 4], 0) * (F::levels - 1);
      }
      tables<true>([&](int j) { return terms[j]; }, out + g * 128);
    }
    return offset;
  }

  static int64_t sets(int64_t words) { return ceil_div(words, 4); }
  static int64_t key_bytes(int64_t words, int64_t channels) {
    return sets(words) * groups(channels) * F::per_byte * 64;
  }
  static void unpack_keys(const int32_t* packed, int64_t stride, int64_t words, int64_t channels, uint8_t* out) {
    const int64_t chunks = ceil_div(groups(channels), BITS), used = groups(channels);
    for (int64_t set = 0; set < sets(words); ++set) {
      uint8_t* at = out + set * used * F::per_byte * 64;
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        Register v[4];
        const int64_t c = chunk * kChunk;
        load_set(packed + 4 * set * stride + c, stride, words - 4 * set, channels - c, v);
        if (BITS == 1) {  // v[m] ends with codes m and m + 4 of the four channels of an index
          exchange<1>(v[0], v[1], 0x55), exchange<1>(v[2], v[3], 0x55);
          exchange<2>(v[0], v[2], 0x33), exchange<2>(v[1], v[3], 0x33);
        } else if (BITS == 2) {
          exchange<2>(v[0], v[1], 0x33), exchange<2>(v[2], v[3], 0x33);
        }
        constexpr int each = F::combined;  // registers of a group
        for (int g = 0; g < BITS && chunk * BITS + g < used; ++g)
          for (int i = 0; i < F::per_byte; ++i)
            store(at, (chunk * BITS + g) * F::per_byte + i, index_of(v[g * each + i % each], i >= each));
      }
    }
  }
  static void score(const uint8_t* query, const uint8_t* keys, int64_t words, int64_t channels, int32_t* out) {
    const int64_t used = groups(channels);
    for (int64_t set = 0; set < sets(words); ++set) {
      Register low[F::per_byte], high[F::per_byte];
      for (int i = 0; i < F::per_byte; ++i) low[i] = high[i] = _mm512_setzero_si512();
      for (int64_t g = 0; g < used; g += 2) {
        const uint8_t* at = keys + (set * used + g) * F::per_byte * 64;
        const Register low_0 = load(query, 2 * g), high_0 = load(query, 2 * g + 1);
        const Register low_1 = load(query, 2 * g + 2), high_1 = load(query, 2 * g + 3);
        for (int i = 0; i < F::per_byte; ++i) {
          const Register x = load(at, i), y = load(at, F::per_byte + i);
          low[i] =
              add_four(low[i], _mm512_add_epi8(_mm512_permutexvar_epi8(x, low_0), _mm512_permutexvar_epi8(y, low_1)));
          high[i] = add_four(high[i],
                             _mm512_add_epi8(_mm512_permutexvar_epi8(x, high_0), _mm512_permutexvar_epi8(y, high_1)));
        }
      }
      for (int i = 0; i < F::per_byte; ++i)
        store(out, set * F::per_byte + i, _mm512_add_epi32(low[i], _mm512_slli_epi32(high[i], 7)));
    }
  }

  static int64_t weight_bytes(int64_t words) { return words * 256; }
  static void prepare_weights(const int16_t* weights, int64_t words, uint8_t* out) {
    for (int64_t w = 0; w < words; ++w)
      for (int nibble = 0; nibble < 2; ++nibble) {
        const int16_t* first = weights + w / 4 * F::per_set + nibble * F::combined * 16 + w % 4 * 4;
        tables<false>([&](int j) { return first + j * 16; }, out + w * 256 + nibble * 128);
      }
  }

  // Tables of the sums of codes times terms, less the least of them; `terms(j)`: code j's four, one for each lane.
  template <bool SIGNED, class Terms>
  static void tables(const Terms& terms, uint8_t* out) {
    const Register own = _mm512_set4_epi32(0x00070006, 0x00050004, 0x00030002, 0x00010000);
    const Register lane =
        _mm512_inserti32x4(_mm512_inserti32x4(_mm512_inserti32x4(_mm512_set1_epi16(0x0100), _mm_set1_epi16(0x0302), 1),
                                              _mm_set1_epi16(0x0504), 2),
                           _mm_set1_epi16(0x0706), 3);
    const Register seven = _mm512_set1_epi16(127), top = _mm512_set1_epi16(F::levels - 1);
    Register p[F::combined], least = _mm512_setzero_si512();
    for (int j = 0; j < F::combined; ++j) {
      int64_t four;
      std::memcpy(&four, terms(j), 8);
      p[j] = _mm512_shuffle_epi8(_mm512_set1_epi64(four), lane);
      if (SIGNED) least = _mm512_add_epi16(least, _mm512_min_epi16(p[j], _mm512_setzero_si512()));
    }
    // Entries with the index's highest bit clear, and set.
    Register clear, set;
    if (BITS == 4) {
      clear = _mm512_mullo_epi16(p[0], own);
      set = _mm512_slli_epi16(p[0], 3);
    } else if (BITS == 2) {
      clear = _mm512_mullo_epi16(p[0], _mm512_and_si512(own, _mm512_set1_epi16(3)));
      clear = _mm512_mask_add_epi16(clear, 0xf0f0f0f0, clear, p[F::combined - 1]);
      set = _mm512_slli_epi16(p[F::combined - 1], 1);
    } else {
      clear = _mm512_maskz_mov_epi16(0xaaaaaaaa, p[0]);
      clear = _mm512_mask_add_epi16(clear, 0xcccccccc, clear, p[1 % F::combined]);
      clear = _mm512_mask_add_epi16(clear, 0xf0f0f0f0, clear, p[2 % F::combined]);
      set = p[3 % F::combined];
    }
    if (SIGNED) clear = _mm512_sub_epi16(clear, _mm512_mullo_epi16(least, top));
    set = _mm512_add_epi16(clear, set);
    store(out, 0, _mm512_packus_epi16(_mm512_and_si512(clear, seven), _mm512_and_si512(set, seven)));
    store(out, 1, _mm512_packus_epi16(_mm512_srli_epi16(clear, 7), _mm512_srli_epi16(set, 7)));
  }

  static int64_t value_bytes(int64_t words, int64_t channels) { return words * ceil_div(channels, 16) * 128; }
  static void unpack_values(const int32_t* packed, int64_t stride, int64_t words, int64_t channels, uint8_t* out) {
    const int64_t columns = ceil_div(channels, 16);
    for (int64_t w = 0; w < words; ++w)
      for (int64_t c = 0; c < columns; ++c) {
        const Register x = _mm512_maskz_loadu_epi32(first(channels - c * 16), packed + w * stride + c * 16);
        store(out, (w * columns + c) * 2, index_of(x, false));
        store(out, (w * columns + c) * 2 + 1, index_of(x, true));
      }
  }
  static void sum(const uint8_t* weights, const uint8_t* values, int64_t words, int64_t channels, int32_t* out) {
    const int64_t columns = ceil_div(channels, 16);
    in_columns(columns, [&](auto width, int64_t column) {
      Register low[width], high[width];
      for (int c = 0; c < width; ++c) low[c] = high[c] = _mm512_setzero_si512();
      for (int64_t w = 0; w < words; ++w) {
        const Register low_0 = load(weights, 4 * w), high_0 = load(weights, 4 * w + 1);
        const Register low_1 = load(weights, 4 * w + 2), high_1 = load(weights, 4 * w + 3);
        for (int c = 0; c < width; ++c) {
          const int64_t at = (w * columns + column + c) * 2;
          const Register x = load(values, at), y = load(values, at + 1);
          low[c] =
              add_four(low[c], _mm512_add_epi8(_mm512_permutexvar_epi8(x, low_0), _mm512_permutexvar_epi8(y, low_1)));
          high[c] = add_four(high[c],
                             _mm512_add_epi8(_mm512_permutexvar_epi8(x, high_0), _mm512_permutexvar_epi8(y, high_1)));
        }
      }
      for (int c = 0; c < width; ++c) store(out, column + c, _mm512_add_epi32(low[c], _mm512_slli_epi32(high[c], 7)));
    });
  }
};

template <int BITS>
struct Dot : Digits<BITS> {
  using F = Format<BITS>;

  static int64_t key_bytes(int64_t words, int64_t channels) {
    return ceil_div(words, 4) * ceil_div(channels, 16) * 4 * F::per_byte * 64;
  }
  static void unpack_keys(const int32_t* packed, int64_t stride, int64_t words, int64_t channels, uint8_t* out) {
    int64_t at = 0;
    for (int64_t w = 0; w < words; w += 4)
      for (int64_t c = 0; c < channels; c += 16) {
        Register v[4];
        load_set(packed + w * stride + c, stride, words - w, channels - c, v);
        for (int a = 0; a < 4; ++a)
          for (int i = 0; i < F::per_byte; ++i) store(out, at++, code<BITS>(v[a], i));
      }
  }
  static void score(const uint8_t* query, const uint8_t* keys, int64_t words, int64_t channels, int32_t* out) {
    const int64_t fours = ceil_div(channels, 16) * 4;
    for (int64_t set = 0; set < ceil_div(words, 4); ++set) {
      Register low[F::per_byte], high[F::per_byte];
      for (int i = 0; i < F::per_byte; ++i) low[i] = high[i] = _mm512_setzero_si512();
      for (int64_t a = 0; a < fours; ++a) {
        int32_t digits[2];
        std::memcpy(digits, query + a * 8, 8);
        const Register q_low = _mm512_set1_epi32(digits[0]), q_high = _mm512_set1_epi32(digits[1]);
        for (int i = 0; i < F::per_byte; ++i) {
          const Register x = load(keys, (set * fours + a) * F::per_byte + i);
          low[i] = _mm512_dpbusd_epi32(low[i], x, q_low);
          high[i] = _mm512_dpbusd_epi32(high[i], x, q_high);
        }
      }
      for (int i = 0; i < F::per_byte; ++i)
        store(out, set * F::per_byte + i, _mm512_add_epi32(low[i], _mm512_slli_epi32(high[i], 7)));
    }
  }

  static int64_t value_bytes(int64_t words, int64_t channels) {
    return words * ceil_div(channels, 16) * F::per_byte * 64;
  }
  static void unpack_values(const int32_t* packed, int64_t stride, int64_t words, int64_t channels, uint8_t* out) {
    int64_t at = 0;
    for (int64_t w = 0; w < words; ++w)
      for (int64_t c = 0; c < channels; c += 16) {
        const Register x = _mm512_maskz_loadu_epi32(first(channels - c), packed + w * stride + c);
        for (int i = 0; i < F::per_byte; ++i) store(out, at++, code<BITS>(x, i));
      }
  }
  static void sum(const uint8_t* weights, const uint8_t* values, int64_t words, int64_t channels, int32_t* out) {
    const int64_t columns = ceil_div(channels, 16), n = ceil_div(words, 4) * F::per_set;
    in_columns(columns, [&](auto width, int64_t column) {
      Register low[width], high[width];
      for (int c = 0; c < width; ++c) low[c] = high[c] = _mm512_setzero_si512();
      for (int64_t w = 0; w < words; ++w)
        for (int i = 0; i < F::per_byte; ++i) {
          const uint8_t* at = weights + w / 4 * F::per_set + i * 16 + w % 4 * 4;
          int32_t digits[2];
          std::memcpy(digits, at, 4), std::memcpy(digits + 1, at + n, 4);
          const Register p_low = _mm512_set1_epi32(digits[0]), p_high = _mm512_set1_epi32(digits[1]);
          for (int c = 0; c < width; ++c) {
            const Register x = load(values, (w * columns + column + c) * F::per_byte + i);
            low[c] = _mm512_dpbusd_epi32(low[c], x, p_low);
            high[c] = _mm512_dpbusd_epi32(high[c], x, p_high);
          }
        }
      for (int c = 0; c < width; ++c) store(out, column + c, _mm512_add_epi32(low[c], _mm512_slli_epi32(high[c], 7)));
    });
  }
};

#else

using Register = __m256i;

void store(void* out, int64_t i, Register value) { _mm256_store_si256((Register*)out + i, value); }
Register load(const void* from, int64_t i) { return _mm256_load_si256((const Register*)from + i); }
Register broadcast(const void* four) {
  int32_t value;
  std::memcpy(&value, four, 4);
  return _mm256_set1_epi32(value);
}

// Eight channels of a word, zeros beyond `channels`.
Register load_row(const int32_t* packed, int64_t channels) {
  if (channels >= 8) return _mm256_loadu_si256((const Register*)packed);
  const Register place = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_maskload_epi32(packed, _mm256_cmpgt_epi32(_mm256_set1_epi32(int32_t(channels)), place));
}

// Bytes [4 channels][4 bytes of a word] of a lane to [4 bytes of a word][4 channels].
Register by_byte(Register lane) {
  const Register order =
      _mm256_setr_epi32(0x0c080400, 0x0d090501, 0x0e0a0602, 0x0f0b0703, 0x0c080400, 0x0d090501, 0x0e0a0602, 0x0f0b0703);
  return _mm256_shuffle_epi8(lane, order);
}

// In each lane: dword i of register j becomes dword j of register i.
void transpose(Register v[4]) {
  const Register a = _mm256_unpacklo_epi32(v[0], v[1]), b = _mm256_unpacklo_epi32(v[2], v[3]);
  const Register c = _mm256_unpackhi_epi32(v[0], v[1]), d = _mm256_unpackhi_epi32(v[2], v[3]);
  v[0] = _mm256_unpacklo_epi64(a, b), v[1] = _mm256_unpackhi_epi64(a, b);
  v[2] = _mm256_unpacklo_epi64(c, d), v[3] = _mm256_unpackhi_epi64(c, d);
}

// Exchange the high half of each field of 2 * SHIFT bits of a with the low half of b's.
template <int SHIFT>
void exchange(Register& a, Register& b, uint8_t low) {
  const Register mask = _mm256_set1_epi8(char(low)), first = a;
  a = _mm256_or_si256(_mm256_and_si256(mask, first), _mm256_andnot_si256(mask, _mm256_slli_epi16(b, SHIFT)));
  b = _mm256_or_si256(_mm256_and_si256(mask, _mm256_srli_epi16(first, SHIFT)), _mm256_andnot_si256(mask, b));
}

template <int BITS>
Register code(Register bytes, int i) {
  return _mm256_and_si256(_mm256_srli_epi16(bytes, i * BITS), _mm256_set1_epi8((1 << BITS) - 1));
}

Register index_of(Register bytes, bool high) {
  return _mm256_and_si256(high ? _mm256_srli_epi16(bytes, 4) : bytes, _mm256_set1_epi8(15));
}

// Add the 16-bit entries of 16 indices in each lane, those of bytes 0 … 7 and of bytes 8 … 15.
void add_entries(Register index, Register low, Register high, Register& a, Register& b) {
  const Register x = _mm256_shuffle_epi8(low, index), y = _mm256_shuffle_epi8(high, index);
  a = _mm256_add_epi16(a, _mm256_unpacklo_epi8(x, y)), b = _mm256_add_epi16(b, _mm256_unpackhi_epi8(x, y));
}

template <int BITS>
struct Lookup : Format<BITS> {
  using F = Format<BITS>;
  static constexpr int kTogether = 4;  // entries that a 16-bit sum of the keys has room for; twice that for values
  static constexpr int32_t limit = 8191 / ((F::levels - 1) * F::combined);

  // Of eight channels group g takes, in lane l, channels 4l + g * combined and the next ones.
  static int64_t groups(int64_t channels) { return ceil_div(channels, 8) * BITS; }
  static int64_t query_bytes(int64_t channels) { return groups(channels) * 64; }
  static int32_t prepare_query(const int32_t* query, int64_t channels, uint8_t* out) {
    for (int64_t g = 0; g < groups(channels); ++g)
      for (int lane = 0; lane < 2; ++lane) {
        const int64_t first = g / BITS * 8 + 4 * lane + g % BITS * F::combined;
        const auto term = [&](int j) { return int16_t(first + j < channels ? query[first + j] : 0); };
        const Register bytes = table(term);
        _mm_store_si128((__m128i*)(out + g * 64 + lane * 16), _mm256_castsi256_si128(bytes));
        _mm_store_si128((__m128i*)(out + g * 64 + 32 + lane * 16), _mm256_extracti128_si256(bytes, 1));
      }
    return 0;
  }

  static int64_t key_bytes(int64_t words, int64_t channels) {
    return ceil_div(words, 4) * groups(channels) * F::per_byte * 32;
  }
  static void unpack_keys(const int32_t* packed, int64_t stride, int64_t words, int64_t channels, uint8_t* out) {
    int64_t at = 0;
    for (int64_t w = 0; w < words; w += 4)
      for (int64_t c = 0; c < channels; c += 8) {
        Register v[4];
        for (int r = 0; r < 4; ++r) v[r] = load_row(packed + (w + r) * stride + c, w + r < words ? channels - c : 0);
        transpose(v);
        if (BITS == 1) {
          exchange<1>(v[0], v[1], 0x55), exchange<1>(v[2], v[3], 0x55);
          exchange<2>(v[0], v[2], 0x33), exchange<2>(v[1], v[3], 0x33);
        } else if (BITS == 2) {
          exchange<2>(v[0], v[1], 0x33), exchange<2>(v[2], v[3], 0x33);
        }
        constexpr int each = F::combined;
        for (int g = 0; g < BITS; ++g)
          for (int i = 0; i < F::per_byte; ++i) store(out, at++, index_of(v[g * each + i % each], i >= each));
      }
  }
  static void score(const uint8_t* query, const uint8_t* keys, int64_t words, int64_t channels, int32_t* out) {
    const int64_t n = groups(channels);
    for (int64_t set = 0; set < ceil_div(words, 4); ++set)
      for (int i = 0; i < F::per_byte; ++i) {
        Register first = _mm256_setzero_si256(), second = first;
        for (int64_t g = 0; g < n; g += kTogether) {
          Register a = _mm256_setzero_si256(), b = a;
          for (int64_t j = g; j < std::min(g + kTogether, n); ++j) {
            const Register index = load(keys, (set * n + j) * F::per_byte + i);
            add_entries(index, load(query, 2 * j), load(query, 2 * j + 1), a, b);
          }
          first = _mm256_add_epi32(first, add_lanes(a)), second = _mm256_add_epi32(second, add_lanes(b));
        }
        store(out, (set * F::per_byte + i) * 2, first), store(out, (set * F::per_byte + i) * 2 + 1, second);
      }
  }
  static Register add_lanes(Register x) {
    return _mm256_add_epi32(_mm256_cvtepi16_epi32(_mm256_castsi256_si128(x)),
                            _mm256_cvtepi16_epi32(_mm256_extracti128_si256(x, 1)));
  }

  static int64_t weight_bytes(int64_t words) { return words * 256; }
  static void prepare_weights(const int16_t* weights, int64_t words, uint8_t* out) {
    for (int64_t w = 0; w < words; ++w)
      for (int k = 0; k < 4; ++k)
        for (int nibble = 0; nibble < 2; ++nibble) {
          const int16_t* first = weights + w / 4 * F::per_set + nibble * F::combined * 16 + w % 4 * 4 + k;
          store(out, (w * 4 + k) * 2 + nibble, table([&](int j) { return first[j * 16]; }));
        }
  }
  // The low, then the high bytes of the 16 sums of codes times `term(j)`.
  template <class Term>
  static Register table(const Term& term) {
    const Register index = _mm256_setr_epi16(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    Register sum = _mm256_setzero_si256();
    for (int j = 0; j < F::combined; ++j) {
      const Register code = _mm256_and_si256(_mm256_srli_epi16(index, j * BITS), _mm256_set1_epi16(F::levels - 1));
      sum = _mm256_add_epi16(sum, _mm256_mullo_epi16(_mm256_set1_epi16(term(j)), code));
    }
    const Register low = _mm256_and_si256(sum, _mm256_set1_epi16(255));
    return _mm256_permute4x64_epi64(_mm256_packus_epi16(low, _mm256_srli_epi16(sum, 8)), 0xd8);
  }
  static int64_t value_bytes(int64_t words, int64_t channels) { return words * ceil_div(channels, 32) * 256; }
  static void unpack_values(const int32_t* packed, int64_t stride, int64_t words, int64_t channels, uint8_t* out) {
    int64_t at = 0;
    for (int64_t w = 0; w < words; ++w)
      for (int64_t c = 0; c < channels; c += 32) {
        Register v[4];  // then register k: byte k of 32 channels
        for (int m = 0; m < 4; ++m) v[m] = by_byte(load_row(packed + w * stride + c + 8 * m, channels - c - 8 * m));
        transpose(v);
        for (int k = 0; k < 4; ++k) {
          store(out, at++, index_of(v[k], false));
          store(out, at++, index_of(v[k], true));
        }
      }
  }
  static void sum(const uint8_t* weights, const uint8_t* values, int64_t words, int64_t channels, int32_t* out) {
    const int64_t columns = ceil_div(channels, 32);
    for (int64_t column = 0; column < columns; ++column) {
      Register total[4] = {};
      for (int64_t w = 0; w < words; ++w) {
        Register half[2] = {};
        for (int t = 0; t < 8; ++t) {
          const __m128i* table = (const __m128i*)(weights + (w * 8 + t) * 32);
          add_entries(load(values, (w * columns + column) * 8 + t), _mm256_broadcastsi128_si256(table[0]),
                      _mm256_broadcastsi128_si256(table[1]), half[0], half[1]);
        }
        for (int h = 0; h < 2; ++h) {
          const Register x = _mm256_permute4x64_epi64(half[h], 0xd8);
          const __m128i low = _mm256_castsi256_si128(x), high = _mm256_extracti128_si256(x, 1);
          total[2 * h] = _mm256_add_epi32(total[2 * h], _mm256_cvtepu16_epi32(low));
          total[2 * h + 1] = _mm256_add_epi32(total[2 * h + 1], _mm256_cvtepu16_epi32(high));
        }
      }
      for (int i = 0; i < 4; ++i) store(out, column * 4 + i, total[i]);
    }
  }
};

// 16-bit sums of products of four bytes, at most eight of each: one digit of the query or of the weights.
struct Sums {
  Register low = _mm256_setzero_si256(), high = _mm256_setzero_si256();
  void add(Register codes, Register low_digits, Register high_digits) {
    low = _mm256_add_epi16(low, _mm256_maddubs_epi16(codes, low_digits));
    high = _mm256_add_epi16(high, _mm256_maddubs_epi16(codes, high_digits));
  }
  Register total() const {
    const Register ones = _mm256_set1_epi16(1);
    return _mm256_add_epi32(_mm256_madd_epi16(low, ones), _mm256_slli_epi32(_mm256_madd_epi16(high, ones), 7));
  }
};

template <int BITS>
struct Dot : Digits<BITS> {
  using F = Format<BITS>;

  static int64_t key_bytes(int64_t words, int64_t channels) {
    return ceil_div(words, 4) * ceil_div(channels, 4) * F::per_byte * 64;
  }
  static void unpack_keys(const int32_t* packed, int64_t stride, int64_t words, int64_t channels, uint8_t* out) {
    int64_t at = 0;
    for (int64_t w = 0; w < words; w += 4)
      for (int64_t c = 0; c < channels; c += 4)
        for (int half = 0; half < 2; ++half) {
          const auto row = [&](int64_t r) {
            const int64_t n = r < words ? std::min<int64_t>(channels - c, 4) : 0;
            return _mm256_castsi256_si128(load_row(packed + r * stride + c, n));
          };
          const Register x = by_byte(_mm256_set_m128i(row(w + 2 * half + 1), row(w + 2 * half)));
          for (int i = 0; i < F::per_byte; ++i) store(out, at++, code<BITS>(x, i));
        }
  }
  static void score(const uint8_t* query, const uint8_t* keys, int64_t words, int64_t channels, int32_t* out) {
    const int64_t fours = ceil_div(channels, 4);
    for (int64_t set = 0; set < ceil_div(words, 4); ++set)
      for (int half = 0; half < 2; ++half)
        for (int i = 0; i < F::per_byte; ++i) {
          Register total = _mm256_setzero_si256();
          for (int64_t a = 0; a < fours; a += 8) {
            Sums sums;
            for (int64_t j = a; j < std::min(a + 8, fours); ++j)
              sums.add(load(keys, ((set * fours + j) * 2 + half) * F::per_byte + i), broadcast(query + j * 8),
                       broadcast(query + j * 8 + 4));
            total = _mm256_add_epi32(total, sums.total());
          }
          store(out, (set * F::per_byte + i) * 2 + half, total);
        }
  }

  static int64_t value_bytes(int64_t words, int64_t channels) {
    return words * ceil_div(channels, 8) * F::per_byte * 32;
  }
  static void unpack_values(const int32_t* packed, int64_t stride, int64_t words, int64_t channels, uint8_t* out) {
    int64_t at = 0;
    for (int64_t w = 0; w < words; ++w)
      for (int64_t c = 0; c < channels; c += 8) {
        const Register x = load_row(packed + w * stride + c, channels - c);
        for (int i = 0; i < F::per_byte; ++i) store(out, at++, code<BITS>(x, i));
      }
  }
  static void sum(const uint8_t* weights, const uint8_t* values, int64_t words, int64_t channels, int32_t* out) {
    const int64_t columns = ceil_div(channels, 8), n = ceil_div(words, 4) * F::per_set;
    for (int64_t column = 0; column < columns; ++column) {
      Register total = _mm256_setzero_si256();
      for (int64_t set = 0; set < words; set += 4) {
        Sums sums;
        for (int64_t w = set; w < std::min(set + 4, words); ++w)
          for (int i = 0; i < F::per_byte; ++i) {
            const uint8_t* p = weights + w / 4 * F::per_set + i * 16 + w % 4 * 4;
            const Register codes = load(values, (w * columns + column) * F::per_byte + i);
            sums.add(codes, broadcast(p), broadcast(p + n));
          }
        total = _mm256_add_epi32(total, sums.total());
      }
      store(out, column, total);
    }
  }
};

#endif

template <class K>
constexpr Kernel kernel() {
  return {K::limit,        K::query_bytes,     K::prepare_query, K::key_bytes,     K::unpack_keys, K::score,
          K::weight_bytes, K::prepare_weights, K::value_bytes,   K::unpack_values, K::sum};
}

const Kernel& find_kernel(int64_t bits, bool lookup) {
  static const Kernel kernels[3][2] = {{kernel<Dot<1>>(), kernel<Lookup<1>>()},
                                       {kernel<Dot<2>>(), kernel<Lookup<2>>()},
                                       {kernel<Dot<4>>(), kernel<Lookup<4>>()}};
  return kernels[bits / 2][lookup];
}

// ---- floats

float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

enum Type { kFloat32, kBFloat16, kFloat16 };

void elements(const void* from, int64_t start, int64_t type, int64_t n, float* out) {
  if (type == kFloat32) {
    std::copy_n(static_cast<const float*>(from) + start, n, out);
    return;
  }
  const uint16_t* bits = static_cast<const uint16_t*>(from) + start;
  int64_t i = 0;
  if (type == kBFloat16)
    for (; i < n; ++i) out[i] = from_bits(uint32_t(bits[i]) << 16);
  for (; i + 8 <= n; i += 8) _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(bits + i))));
  for (; i < n; ++i) out[i] = _cvtsh_ss(bits[i]);
}

// out[t] = from[start + token[t] * stride], zero beyond the tokens of the block.
void gather(const void* from, int64_t start, int64_t type, const int32_t* token, int64_t stride, int64_t tokens,
            int64_t n, float* out) {
  const uint16_t* bits = static_cast<const uint16_t*>(from) + start;
  const int32_t last = int32_t(tokens - 1);
  for (int64_t t = 0; t < n; ++t) {
    const uint16_t value = bits[std::min(token[t], last) * stride];
    out[t] = type == kBFloat16 ? from_bits(uint32_t(value) << 16) : _cvtsh_ss(value);
  }
  if (n > tokens)
    for (int64_t t = 0; t < n; ++t) out[t] = token[t] < tokens ? out[t] : 0;
}

// e^x for x <= 0 to 1e-7 (relative); the smallest normal number below -87.
inline float exponential(float x) {
  x = std::max(x, -87.0f);
  const float n = std::nearbyint(x * 1.44269504f);
  const float r = std::fma(n, 2.12194440e-4f, std::fma(n, -0.693359375f, x));
  float y = 1.9875691500e-4f;
  y = std::fma(y, r, 1.3981999507e-3f);
  y = std::fma(y, r, 8.3334519073e-3f);
  y = std::fma(y, r, 4.1665795894e-2f);
  y = std::fma(y, r, 1.6666665459e-1f);
  y = std::fma(y, r, 5.0000001201e-1f);
  return std::fma(y, r * r, r + 1.0f) * from_bits(uint32_t(int32_t(n) + 127) << 23);
}

// ---- attention

// Storage of one side: codes `[slots, words, channels]`; scale and zero point (or null: symmetric) per token
// `[slots, length, groups]` or per channel `[slots, channels]`.
struct Side {
  const Kernel& kernel;
  int64_t bits, words, channels, groups, type;
  const int32_t* packed;
  const void *scale, *zero;

  float step() const { return bits == 1 ? 2.0f : 1.0f; }
  float offset() const { return bits == 1 ? -1.0f : -float(1 << (bits - 1)); }  // the symmetric zero point
};

struct alignas(64) Line {
  uint8_t bytes[64];
};

// Room for the arrays of a thread, each at the start of a line.
struct Arena {
  std::vector<Line> lines;
  int64_t used = 0;
  template <class T>
  T* take(int64_t n) {
    const int64_t start = used;
    used += ceil_div(n * int64_t(sizeof(T)), 64);
    return lines.empty() ? nullptr : reinterpret_cast<T*>(lines.data() + start);
  }
};

struct Group {
  int64_t index, start, channels;  // among a side's scale groups; first channel
};

// An exact run of tokens per row: `[B, tokens, channels]`.
struct Exact {
  const void *keys, *values;
  int64_t type, tokens, key_row, key_token, value_row, value_token;
  const int32_t *start, *count;
};

constexpr int64_t kExact = 32;  // exact tokens at a time

struct Attention {
  const float* query;  // [B, H_q, L, size]
  const int64_t* positions;
  int64_t heads, length, kv_heads, size, value_size, block, blocks;
  const int32_t *slots, *start, *count;  // [B, blocks]
  Side keys, values;
  std::vector<std::vector<Group>> groups;  // of each head
  std::vector<Exact> exact;
  float scaling;

  int64_t queries() const { return heads / kv_heads * length; }
  int64_t padded() const { return ceil_div(keys.words, 4) * 4 * 32 / keys.bits; }
  int64_t padded_values() const { return ceil_div(values.words, 4) * 4 * 32 / values.bits; }

  // Running softmax of a query: highest logit, sum of the weights, weighted values.
  struct State {
    float *highest, *total, *sum;
  };

  struct Work {
    int32_t *token, *from, *integers;
    float *query, *unit, *correction, *weight, *step, *zero, *value_step, *value_zero, *score, *exact;
    int32_t* subtract;
    uint8_t *tables, *key_codes, *value_codes, *weights;
    int16_t* p;
    std::vector<int64_t> query_at, key_at;  // where each group's begin
    int64_t query_stride;
  };

  Work lay_out(Arena& arena, const std::vector<Group>& mine) const {
    Work w;
    const int64_t n = queries(), g = mine.size(), t = padded();
    w.query_stride = 0;
    int64_t key_bytes = 0;
    for (const Group& group : mine) {
      w.query_at.push_back(w.query_stride), w.key_at.push_back(key_bytes);
      w.query_stride += ceil_div(keys.kernel.query_bytes(group.channels), 64) * 64;
      key_bytes += keys.kernel.key_bytes(keys.words, group.channels);
    }
    w.token = arena.take<int32_t>(t), w.from = arena.take<int32_t>(padded_values());
    w.integers = arena.take<int32_t>(std::max(t, ceil_div(value_size, 32) * 32));
    w.query = arena.take<float>(n * size);
    w.unit = arena.take<float>(n * g), w.correction = arena.take<float>(n * g), w.weight = arena.take<float>(n * g);
    w.subtract = arena.take<int32_t>(n * g);
    w.step = arena.take<float>(g * t), w.zero = arena.take<float>(g * t);
    w.value_step = arena.take<float>(value_size), w.value_zero = arena.take<float>(value_size);
    w.score = arena.take<float>(std::max(t, kExact)), w.exact = arena.take<float>(kExact * (size + value_size));
    w.tables = arena.take<uint8_t>(n * w.query_stride), w.key_codes = arena.take<uint8_t>(key_bytes);
    w.value_codes = arena.take<uint8_t>(values.kernel.value_bytes(values.words, value_size));
    w.weights = arena.take<uint8_t>(values.kernel.weight_bytes(values.words));
    w.p = arena.take<int16_t>(padded_values());
    return w;
  }

  // Token of each place in set order.
  static void order(int64_t bits, int64_t padded, int32_t* token) {
    const int64_t per_byte = 8 / bits, per_set = 16 * per_byte;
    for (int64_t at = 0; at < padded; ++at) {
      const int64_t set = at / per_set, i = at % per_set / 16, r = at % 16 / 4, k = at % 4;
      token[at] = int32_t(set * per_set + (4 * r + k) * per_byte + i);
    }
  }

  void prepare(Work& w, int64_t b, int64_t h, const std::vector<Group>& mine) const {
    order(keys.bits, padded(), w.token);
    // Weights come in the keys' set order and go into the values'.
    std::vector<int32_t> place(std::max(padded(), padded_values()));
    for (int64_t at = 0; at < padded(); ++at) place[w.token[at]] = int32_t(at);
    order(values.bits, padded_values(), w.from);
    for (int64_t at = 0; at < padded_values(); ++at) w.from[at] = w.from[at] < padded() ? place[w.from[at]] : -1;

    const float middle = 0.5f * float((1 << keys.bits) - 1);
    std::vector<int32_t> integers(size);
    for (int64_t m = 0; m < queries(); ++m) {
      const float* q = query + (b * heads * length + h * queries() + m) * size;
      for (int64_t c = 0; c < size; ++c) w.query[m * size + c] = q[c] * scaling;
      for (size_t g = 0; g < mine.size(); ++g) {
        const int64_t start = mine[g].start - h * size, n = mine[g].channels;
        float largest = 0, total = 0;
        for (int64_t c = 0; c < n; ++c) {
          const float x = w.query[m * size + start + c];
          largest = std::max(largest, std::fabs(x));
          total += x;
        }
        const float unit = largest > 0 ? largest / keys.kernel.limit : 1.0f;
        int32_t sum = 0;
        for (int64_t c = 0; c < n; ++c) {
          integers[c] = int32_t(std::nearbyint(w.query[m * size + start + c] / unit));
          sum += integers[c];
        }
        const int64_t at = m * mine.size() + g;
        uint8_t* tables = w.tables + m * w.query_stride + w.query_at[g];
        w.subtract[at] = keys.kernel.prepare_query(integers.data(), n, tables);
        w.unit[at] = unit;
        // What rounding the query has lost meets codes around the middle of the grid.
        w.correction[at] = middle * (total - unit * float(sum));
        w.weight[at] = total;
      }
    }
  }

  // Fold a piece of weights that are relative to `highest` into the state; returns their factor.
  static float merge(State& s, float highest, float total, int64_t n) {
    const float higher = std::max(*s.highest, highest);
    const float factor = highest == higher ? 1.0f : exponential(highest - higher);
    if (*s.highest != higher) {
      const float decay = exponential(*s.highest - higher);
      for (int64_t c = 0; c < n; ++c) s.sum[c] *= decay;
      *s.total *= decay;
      *s.highest = higher;
    }
    *s.total += total * factor;
    return factor;
  }

  int64_t visible(int64_t b, int64_t m, int64_t start, int64_t count) const {
    return std::clamp<int64_t>(positions[b * length + m % length] - start + 1, 0, count);
  }

  // The share of query m in fetching a head's words of a block.
  void prefetch(const Side& side, int64_t slot, int64_t channel, int64_t channels, int64_t m) const {
    const int64_t n = queries();
    for (int64_t word = side.words * m / n; word < side.words * (m + 1) / n; ++word) {
      const int32_t* row = side.packed + (slot * side.words + word) * side.channels + channel;
      for (int64_t c = 0; c < channels; c += 16) _mm_prefetch((const char*)(row + c), _MM_HINT_T1);
    }
  }

  // Block j of row b; `next`: slot of the block after it, or -1.
  void attend_block(Work& w, int64_t b, int64_t h, int64_t j, int64_t next, const std::vector<Group>& mine,
                    State* states) const {
    const int64_t at = b * blocks + j, slot = slots[at], tokens = padded();
    int64_t most = 0;
    for (int64_t l = 0; l < length; ++l) most = std::max(most, visible(b, l, start[at], count[at]));
    if (!most) return;

    for (size_t g = 0; g < mine.size(); ++g) {
      keys.kernel.unpack_keys(keys.packed + slot * keys.words * keys.channels + mine[g].start, keys.channels,
                              keys.words, mine[g].channels, w.key_codes + w.key_at[g]);
      float *step = w.step + g * tokens, *zero = w.zero + g * tokens;
      const int64_t from = slot * block * keys.groups + mine[g].index;
      gather(keys.scale, from, keys.type, w.token, keys.groups, block, tokens, step);
      if (keys.zero)
        gather(keys.zero, from, keys.type, w.token, keys.groups, block, tokens, zero);
      else
        for (int64_t t = 0; t < tokens; ++t) zero[t] = keys.offset() * step[t];
      for (int64_t t = 0; t < tokens; ++t) step[t] *= keys.step();
    }
    values.kernel.unpack_values(values.packed + slot * values.words * values.channels + h * value_size, values.channels,
                                values.words, value_size, w.value_codes);
    const int64_t channel = slot * values.channels + h * value_size;
    elements(values.scale, channel, values.type, value_size, w.value_step);
    if (values.zero)
      elements(values.zero, channel, values.type, value_size, w.value_zero);
    else
      for (int64_t c = 0; c < value_size; ++c) w.value_zero[c] = values.offset() * w.value_step[c];
    for (int64_t c = 0; c < value_size; ++c) w.value_step[c] *= values.step();

    const int32_t limit = values.kernel.limit;
    for (int64_t m = 0; m < queries(); ++m) {
      if (next >= 0) {  // a head's rows are too short for the processor to foresee the next one
        prefetch(keys, next, h * size, size, m);
        prefetch(values, next, h * value_size, value_size, m);
      }
      const int64_t seen = visible(b, m, start[at], count[at]);
      if (!seen) continue;
      for (size_t g = 0; g < mine.size(); ++g) {
        const int64_t qg = m * mine.size() + g;
        keys.kernel.score(w.tables + m * w.query_stride + w.query_at[g], w.key_codes + w.key_at[g], keys.words,
                          mine[g].channels, w.integers);
        const float unit = w.unit[qg], weight = w.weight[qg];
        const float correction = w.correction[qg] - unit * float(w.subtract[qg]);
        const float *step = w.step + g * tokens, *zero = w.zero + g * tokens;
        for (int64_t t = 0; t < tokens; ++t) {
          const float score = step[t] * std::fma(unit, float(w.integers[t]), correction) + zero[t] * weight;
          w.score[t] = g ? w.score[t] + score : score;
        }
      }
      const float nothing = -std::numeric_limits<float>::infinity();
      float highest = nothing;
      if (seen < tokens)
        for (int64_t t = 0; t < tokens; ++t) w.score[t] = w.token[t] < seen ? w.score[t] : nothing;
#pragma omp simd reduction(max : highest)
      for (int64_t t = 0; t < tokens; ++t) highest = w.score[t] > highest ? w.score[t] : highest;
      int32_t total = 0;
#pragma omp simd reduction(+ : total)
      for (int64_t t = 0; t < tokens; ++t) {
        w.integers[t] = int32_t(std::nearbyint(exponential(w.score[t] - highest) * float(limit)));
        total += w.integers[t];
      }
      if (keys.bits == values.bits)
        for (int64_t t = 0; t < tokens; ++t) w.p[t] = int16_t(w.integers[t]);
      else
        for (int64_t t = 0; t < padded_values(); ++t)
          w.p[t] = w.from[t] < 0 ? int16_t(0) : int16_t(w.integers[w.from[t]]);
      values.kernel.prepare_weights(w.p, values.words, w.weights);
      values.kernel.sum(w.weights, w.value_codes, values.words, value_size, w.integers);
      const float factor = merge(states[m], highest, float(total) / float(limit), value_size) / float(limit);
      float* sum = states[m].sum;
      for (int64_t c = 0; c < value_size; ++c)
        sum[c] += factor * std::fma(w.value_step[c], float(w.integers[c]), w.value_zero[c] * float(total));
    }
  }

  void attend_exact(Work& w, int64_t b, int64_t h, const Exact& run, State* states) const {
    float *k = w.exact, *v = w.exact + kExact * size;
    for (int64_t first = 0; first < run.count[b]; first += kExact) {
      const int64_t n = std::min<int64_t>(kExact, run.count[b] - first);
      for (int64_t t = 0; t < n; ++t) {
        const int64_t key = b * run.key_row + (first + t) * run.key_token + h * size;
        const int64_t value = b * run.value_row + (first + t) * run.value_token + h * value_size;
        elements(run.keys, key, run.type, size, k + t * size);
        elements(run.values, value, run.type, value_size, v + t * value_size);
      }
      for (int64_t m = 0; m < queries(); ++m) {
        const int64_t seen = visible(b, m, run.start[b] + first, n);
        if (!seen) continue;
        const float* q = w.query + m * size;
        float highest = -std::numeric_limits<float>::infinity(), total = 0;
        for (int64_t t = 0; t < seen; ++t) {
          float score = 0;
#pragma omp simd reduction(+ : score)
          for (int64_t c = 0; c < size; ++c) score += q[c] * k[t * size + c];
          w.score[t] = score;
          highest = std::max(highest, score);
        }
        for (int64_t t = 0; t < seen; ++t) total += w.score[t] = exponential(w.score[t] - highest);
        const float factor = merge(states[m], highest, total, value_size);
        for (int64_t t = 0; t < seen; ++t) {
          const float p = w.score[t] * factor;
          for (int64_t c = 0; c < value_size; ++c)
            states[m].sum[c] = std::fma(p, v[t * value_size + c], states[m].sum[c]);
        }
      }
    }
  }
};

}  // namespace

extern "C" {

// 2: AVX-512 VBMI and VNNI; 1: AVX2.
int64_t lookup_instructions() { return sizeof(Register) == 64 ? 2 : 1; }

// Softmax attention of `query` [batch, heads, length, size] over packed blocks and exact runs.
//
// out: [batch, heads, length, value_size]. table: [3, batch, blocks]. `*_lookup`: by tables, or by dot products.
// widths: channels of the keys' `key_groups` scale groups, each inside one head. exact: `runs` times the fields of
// `Exact`. Types: those of `Type`.
int64_t lookup_attention(float* out, const float* query, const int64_t* positions, int64_t batch, int64_t heads,
                         int64_t length, int64_t kv_heads, int64_t size, int64_t value_size, float scaling,
                         const int32_t* table, int64_t blocks, int64_t block, int64_t key_bits, int64_t key_lookup,
                         const int32_t* key_packed, const void* key_scale, const void* key_zero, int64_t key_type,
                         const int64_t* widths, int64_t key_groups, int64_t value_bits, int64_t value_lookup,
                         const int32_t* value_packed, const void* value_scale, const void* value_zero,
                         int64_t value_type, const int64_t* exact, int64_t runs, int64_t threads) {
  const auto words = [&](int64_t bits) { return ceil_div(block, 32 / bits); };
  Attention a{query,
              positions,
              heads,
              length,
              kv_heads,
              size,
              value_size,
              block,
              blocks,
              table,
              table + batch * blocks,
              table + 2 * batch * blocks,
              {find_kernel(key_bits, key_lookup), key_bits, words(key_bits), kv_heads * size, key_groups, key_type,
               key_packed, key_scale, key_zero},
              {find_kernel(value_bits, value_lookup), value_bits, words(value_bits), kv_heads * value_size, 1,
               value_type, value_packed, value_scale, value_zero},
              std::vector<std::vector<Group>>(kv_heads),
              {},
              scaling};
  for (int64_t g = 0, channel = 0; g < key_groups; channel += widths[g++])
    a.groups[channel / size].push_back({g, channel, widths[g]});
  for (int64_t r = 0; r < runs; ++r) {
    const int64_t* f = exact + r * 10;
    a.exact.push_back({(const void*)f[0], (const void*)f[1], f[2], f[3], f[4], f[5], f[6], f[7], (const int32_t*)f[8],
                       (const int32_t*)f[9]});
  }

  // Pieces of the sequence, so that few heads keep many threads busy.
  const int64_t wanted = ceil_div(4 * threads, batch * kv_heads);
  const int64_t splits = std::clamp<int64_t>(wanted, 1, std::max<int64_t>(blocks / 4, 1));
  const int64_t tasks = batch * kv_heads * splits, n = a.queries(), record = value_size + 2;
  std::vector<float> partial(tasks * n * record);
#pragma omp parallel num_threads(threads)
  {
    Arena arena;
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < tasks; ++task) {
      const int64_t split = task % splits, h = task / splits % kv_heads, b = task / splits / kv_heads;
      Arena measure;
      a.lay_out(measure, a.groups[h]);
      if (int64_t(arena.lines.size()) < measure.used) arena.lines.resize(measure.used);
      arena.used = 0;
      Attention::Work work = a.lay_out(arena, a.groups[h]);
      a.prepare(work, b, h, a.groups[h]);
      std::vector<Attention::State> states;
      for (int64_t m = 0; m < n; ++m) {
        float* at = partial.data() + (task * n + m) * record;
        at[0] = -std::numeric_limits<float>::infinity();
        states.push_back({at, at + 1, at + 2});
      }
      const int64_t end = blocks * (split + 1) / splits;
      for (int64_t j = blocks * split / splits; j < end; ++j) {
        const int64_t next = j + 1 < end ? a.slots[b * blocks + j + 1] : -1;
        a.attend_block(work, b, h, j, next, a.groups[h], states.data());
      }
      if (!split)
        for (const Exact& run : a.exact) a.attend_exact(work, b, h, run, states.data());
    }
#pragma omp for
    for (int64_t i = 0; i < batch * kv_heads * n; ++i) {
      const float* first = partial.data() + (i / n * splits * n + i % n) * record;
      float highest = -std::numeric_limits<float>::infinity(), total = 0;
      for (int64_t s = 0; s < splits; ++s) highest = std::max(highest, first[s * n * record]);
      float* result = out + i * value_size;
      std::fill_n(result, value_size, 0.0f);
      for (int64_t s = 0; s < splits; ++s) {
        const float* piece = first + s * n * record;
        if (piece[1] == 0) continue;
        const float factor = exponential(piece[0] - highest);
        total += factor * piece[1];
        for (int64_t c = 0; c < value_size; ++c) result[c] += factor * piece[2 + c];
      }
      if (total > 0)
        for (int64_t c = 0; c < value_size; ++c) result[c] /= total;
    }
  }
  return 0;
}
}
