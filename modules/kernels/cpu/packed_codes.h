// What the kernel is told, and the codes of packed blocks (`modules/quant_utils.py` has the format).

#pragma once

#include "vectors.h"

// ---- arguments; `modules/kernels/cpu/attention.py` has the same structures

extern "C" {

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
  const float* query;          // [B, H_q, L, 2 half]
  const int64_t* positions;    // [B, L]
  const double* frequency;     // [half], falling; 0: no rotation
  const int32_t* order;        // [half], the pair of each frequency
  const void *weight, *bias;   // of the expansion, [H_kv * 2 half, weight_stride], [H_kv * 2 half]; may be null
  const int32_t* key_channel;  // [groups, keys.width] channel of the group in a column, -1: none
  const int32_t* table;        // [3, B, blocks]
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

// ---- codes in words

// How the codes of a plane stand in a word: `fields` tokens in a byte, 4 bytes.
struct Layout {
  int bits, fields;
  int words(int tokens) const { return (tokens + 4 * fields - 1) / (4 * fields); }
};

inline Layout layout_of(int bits) { return {bits, bits == TERNARY ? 5 : 8 / bits}; }

// Bytes j of a lane: the code of token `fields * j + i` of its word.
inline vi field(vi word, Layout layout, int i) {
  if (layout.bits != TERNARY) {
    const vi mask = seti((int)(0x01010101u * ((1 << layout.bits) - 1)));
    return andi(shr(word, layout.bits * i), mask);
  }
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
    struct {
      int32_t pick[16], shift[16];
    } y;
    for (int l = 0; l < 16; l++) y.pick[l] = l / fields % 4 + (l / tokens & 1) * 16, y.shift[l] = l % fields * BITS;
    return y;
  }();
  const vi by = loadi(lanes.shift), mask = seti((int)(0x01010101u * ((1 << BITS) - 1)));
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

}  // namespace
