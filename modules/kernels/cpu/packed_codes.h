// Packed blocks and exact tokens as the attention kernels take them, and the codes in packed words (the format:
// modules/quant_utils.py).

#pragma once

#include "vectors.h"

// structures.py has the same structures.
extern "C" {

// Channels that are stored alike (`PackedPart`); strides in elements, 0 for calibrated scales.
struct Part {
  int32_t bits, run;
  int32_t words;  // per channel in a block; at 16 bits its tokens
  const void* packed;
  int64_t slot_stride, token_stride;  // from slot to slot; from a channel's word (16 bits: token) to the next
  const void *scale, *zero_point;     // zero_point may be null
  int64_t scale_slot_stride, scale_row_stride;
  int32_t scale_type, spacing, offset;  // step = spacing * scale; symmetric zero point = -offset * scale
  int32_t levels;
  const uint8_t* points;  // [128] of a trellis code, by window; null: a code is a level
};

// A run of tokens in full precision for each row of the batch.
struct Exact {
  const void *keys, *values;
  int64_t key_row, key_token, value_row, value_token;
  const int32_t *start, *count;
};

}  // extern "C"

namespace {

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

// The planes of a width: 3 bits are 2 low ones and a high one, 5 and 6 are 4 low ones and one or two.
struct Plane {
  Layout layout;
  int first_word, shift;
};

inline int planes_of(int bits, int run, Plane* planes) {
  const int low = low_bits(bits);
  planes[0] = {layout_of(low), 0, 0};
  if (low == bits) return 1;
  planes[1] = {layout_of(bits - low), planes[0].layout.words(run), low};
  return 2;
}

// Words of a channel in a block that come before those of the run which starts at token `run_start`.
inline int64_t run_words(const Part& part, int run_start) {
  Plane planes[2];
  const int n = planes_of(part.bits, part.run, planes);
  return (int64_t)(run_start / part.run) * (planes[n - 1].first_word + planes[n - 1].layout.words(part.run));
}

#if ALRD_AVX512
// As `unpack`, for a plane and a start that 16 divides: 16 tokens of four channels at a time. `more`: the codes are
// added to what stands there.
template <int BITS>
inline void unpack_vectors(const int32_t* plane, int64_t word_stride, int count, int n_words, int start, int n,
                           int32_t* out, int stride, int shift, bool more) {
  constexpr int fields = 8 / BITS, tokens = 4 * fields, words = tokens < 16 ? 16 / tokens : 1;
  alignas(64) static const auto lanes = [] {
    struct {
      int32_t pick[16], shift[16];
    } y;
    for (int l = 0; l < 16; l++) {
      y.pick[l] = l / fields % 4 + (l / tokens & 1) * 16;
      y.shift[l] = l % fields * BITS;
    }
    return y;
  }();
  // One rotation brings the codes down from where they stand and up by `shift`.
  const vi by = subi(loadi(lanes.shift), seti(shift)), mask = seti((int)(0x01010101u * (((1 << BITS) - 1) << shift)));
  const vi pick = loadi(lanes.pick);
  for (int c = 0; c < count; c += 16, plane += 16, out += 4 * stride) {
    const int left = std::min(16, count - c), quads = (left + 3) / 4;
    for (int t = 0; t < n; t += 16) {
      const int w = (start + t) / tokens;
      vi word[4];
      each<words>([&](auto i) INLINE {
        word[i] = w + i < n_words ? transpose_bytes(loadi(plane + (w + i) * word_stride, left)) : seti(0);
      });
      const int first = (start + t) % tokens / fields;
      auto unpack_quad = [&](int q) INLINE {
        const vi index = addi(pick, seti(first + 4 * q));
        vi code;
        if (words == 1) {
          code = _mm512_permutexvar_epi32(index, word[0]);
        } else {
          code = _mm512_permutex2var_epi32(word[0], index, word[1]);
          if (words == 4)
            code = _mm512_mask_blend_epi32(0xFF00, code, _mm512_permutex2var_epi32(word[2], index, word[3]));
        }
        code = andi(_mm512_rorv_epi32(code, by), mask);
        int32_t* to = out + q * stride + t;
        storei(to, more ? ori(loadi(to), code) : code);
      };
      if (quads == 4)
        each<4>([&](auto q) INLINE { unpack_quad(q); });
      else
        for (int q = 0; q < quads; q++) unpack_quad(q);
    }
  }
}
#endif

// Codes of tokens [start, start + n) of a run times 2^shift, for `count` channels: codes[quad][token][4], `stride`
// tokens a quad. What is written goes on to the end of the last word.
void unpack_codes(const Part& part, const int32_t* words, int run_length, int start, int n, int channel, int count,
                  uint8_t* codes, int stride, int shift) {
  Plane planes[2];
  const int n_planes = planes_of(part.bits, run_length, planes);
  for (int p = 0; p < n_planes; p++) {
    const Layout layout = planes[p].layout;
    const int tokens = 4 * layout.fields, up = planes[p].shift + shift;
    const int32_t* plane = words + (int64_t)planes[p].first_word * part.token_stride + channel;
#if ALRD_AVX512
    if (layout.bits != TERNARY && start % 16 == 0) {
      const auto unpack_plane = layout.bits == 1   ? unpack_vectors<1>
                                : layout.bits == 2 ? unpack_vectors<2>
                                : layout.bits == 4 ? unpack_vectors<4>
                                                   : unpack_vectors<8>;
      unpack_plane(plane, part.token_stride, count, layout.words(run_length), start, n, (int32_t*)codes, stride, up, p);
      continue;
    }
#endif
    for (int c = 0; c < count; c += 16) {
      const int left = std::min(16, count - c), quads = (left + 3) / 4;
      int32_t* out = (int32_t*)codes + (int64_t)(c / 4) * stride;
      for (int w = start / tokens; w * tokens < start + n; w++) {
        const vi word = loadi(plane + (int64_t)w * part.token_stride + c, left);
        for (int i = 0; i < layout.fields; i++) {
          int32_t lanes[16];  // [quad][j]: token fields * j + i
          storei(lanes, shl(transpose_bytes(field(word, layout, i)), up));
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

// The codes of a chain of a trellis become its points (modules/trellis.py), in the layout of `unpack_codes`.
template <int BITS>
void trace(const uint8_t* points, int quads, int n, int32_t* codes, int stride) {
  // Of codes of which `kept` bits are still looked at, `back` channels further on; a byte is a channel.
  const auto moved = [](vi code, vi before, int kept, int back, int by) INLINE {
    const vi mask = seti(0x01010101 * ((1 << kept) - 1));
    code = andi(code, mask), before = andi(before, mask);
    return shl(ori(shl(code, 8 * back), shr(before, 32 - 8 * back)), by);
  };
  const ByteTable table(points);
  for (int t = 0; t < n; t += 16) {
    vi one = seti(0), two = one, four = one;  // of the quad before: codes, pairs of them, fours of them
    for (int q = 0; q < quads; q++) {
      int32_t* at = codes + q * stride + t;
      const vi code = loadi(at);
      vi window = ori(code, moved(code, one, std::min(BITS, 7 - BITS), 1, BITS));
      if (BITS <= 3) {
        const vi pair = window;
        window = ori(pair, moved(pair, two, std::min(2 * BITS, 7 - 2 * BITS), 2, 2 * BITS));
        two = pair;
      }
      if (BITS == 1) {
        const vi fours = window;
        window = ori(fours, shl(andi(four, seti(0x07070707)), 4));
        four = fours;
      }
      one = code;
      storei(at, table.of(window));
    }
  }
}

// As `unpack_codes`; of a trellis, whose chain the channels are, points.
void unpack(const Part& part, const int32_t* words, int run_length, int start, int n, int channel, int count,
            uint8_t* codes, int stride, int shift = 0) {
  unpack_codes(part, words, run_length, start, n, channel, count, codes, stride, shift);
  if (!part.points) return;
  with_width(part.bits, [&](auto bits) {
    if constexpr (bits <= 6) trace<bits>(part.points, (count + 3) / 4, n, (int32_t*)codes, stride);
  });
}

}  // namespace
