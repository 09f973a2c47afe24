// Attention of many queries to a tile of keys and values in bfloat16, folded into what they have seen before.
//
// Products of pairs of bfloat16 are summed up in float32. Keys are laid out with 64 tokens side by side, a pair of
// channels to a lane; values with 64 channels side by side, a pair of tokens to a lane. So a pair of a query's
// channels, or of its probabilities, is one number that all lanes are multiplied with. As in flash attention
// (arXiv:2205.14135, section 3.1) the sums are relative to the highest score so far.

#include <cmath>
#include <vector>

#include "softmax.h"

// modules/kernels/cpu/fold.py has the same structure.
extern "C" struct Fold {
  const uint16_t *query, *keys, *values;  // [B, H_q, L, d], [B, H_kv, n, d]
  const uint8_t* seen;                    // [B, L, n], whether a query sees a token; null: they see all
  float *summed, *highest, *total;        // [B, H_q, L, d], [B, H_q, L]; the sums are not divided by the total
  int64_t query_row, query_head, query_token, key_row, key_head, key_token, value_row, value_head, value_token;
  int64_t sum_row, sum_head, state_row, state_head;
  int32_t batch, heads, shared, length, tokens, size, threads;
  float scaling;
};

#if ALRD_AVX512 && defined(__AVX512BF16__)

namespace {

constexpr int WIDE = 64;   // tokens, or channels, side by side
constexpr int BLOCK = 48;  // queries of an item
constexpr int SOME = 6;    // queries whose sums stay in registers

inline vf dot2(vf sum, vi a, vi b) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }

// Keys and values of a head as they are multiplied.
struct Packed {
  std::vector<uint32_t> keys, values;  // [n / 64][d / 2][64], [d / 64][n / 2][64]

  void pack(const Fold& f, int row, int head, int pairs, int n, int channels) {
    keys.assign((size_t)n * pairs, 0);
    values.assign((size_t)n / 2 * channels, 0);
    const uint16_t* key = f.keys + row * f.key_row + head * f.key_head;
    const uint16_t* value = f.values + row * f.value_row + head * f.value_head;
    for (int t = 0; t < f.tokens; t++, key += f.key_token) {
      uint32_t* to = &keys[(size_t)(t / WIDE) * pairs * WIDE + t % WIDE];
      for (int p = 0; p < pairs; p++) memcpy(to + p * WIDE, key + 2 * p, 4);
    }
    const std::vector<uint16_t> none(f.size);
    for (int t = 0; t < f.tokens; t += 2, value += 2 * f.value_token) {
      const uint16_t* next = t + 1 < f.tokens ? value + f.value_token : none.data();
      for (int first = 0; first < f.size; first += WIDE) {
        uint32_t* to = &values[((size_t)first * n / 2) + (size_t)t / 2 * WIDE];
        const int last = std::min(WIDE, f.size - first);
        for (int c = 0; c < last; c++) to[c] = value[first + c] | (uint32_t)next[first + c] << 16;
      }
    }
  }
};

// Add to sums [J][64] the products of pairs [J][stride] with `pairs` rows of 64 lanes.
template <int J>
INLINE inline void multiply(const uint32_t* numbers, int stride, const uint32_t* rows, int pairs, float* out,
                            int out_stride) {
  vf sums[J][4];
  each<J>([&](auto j) INLINE { each<4>([&](auto v) INLINE { sums[j][v] = load(out + j * out_stride + 16 * v); }); });
  for (int p = 0; p < pairs; p++, rows += WIDE) {
    vi row[4];
    each<4>([&](auto v) INLINE { row[v] = loadi(rows + 16 * v); });
    each<J>([&](auto j) INLINE {
      const vi number = seti(numbers[j * stride + p]);
      each<4>([&](auto v) INLINE { sums[j][v] = dot2(sums[j][v], row[v], number); });
    });
  }
  each<J>([&](auto j) INLINE { each<4>([&](auto v) INLINE { store(out + j * out_stride + 16 * v, sums[j][v]); }); });
}

// The queries of a block against a tile: rooms for both, which a thread keeps.
struct Block {
  std::vector<uint32_t> query, weights;  // [48][d / 2], [48][n / 2]
  std::vector<float> scores, sums;       // [48][n], [48][channels]

  void fold(const Fold& f, const Packed& packed, int row, int head, int first, int count, int n, int channels) {
    int begin = f.seen ? f.tokens : 0, end = f.seen ? 0 : f.tokens;
    for (int j = 0; j < count && f.seen; j++) {
      const uint8_t* seen = seen_by(f, row, (first + j) % f.length);
      int t = 0, last = f.tokens;
      while (t < begin && !seen[t]) t++;
      while (last > end && !seen[last - 1]) last--;
      begin = std::min(begin, t);
      end = std::max(end, last);
    }
    if (begin >= end) return;
    const int pairs = f.size / 2;
    query.assign((size_t)BLOCK * pairs, 0);
    scores.assign((size_t)BLOCK * n, 0);
    weights.assign((size_t)BLOCK * n / 2, 0);
    sums.assign((size_t)BLOCK * channels, 0);
    for (int j = 0; j < count; j++) {
      const int h = head * f.shared + (first + j) / f.length, l = (first + j) % f.length;
      memcpy(&query[(size_t)j * pairs], f.query + row * f.query_row + h * f.query_head + l * f.query_token, 4 * pairs);
      memcpy(&sums[(size_t)j * channels], of(f, row, h, l), 4 * f.size);
    }
    begin = begin / WIDE * WIDE;
    end = round_up(end, WIDE);
    for (int t = begin; t < end; t += WIDE)
      for (int j = 0; j < count; j += SOME)
        multiply<SOME>(&query[(size_t)j * pairs], pairs, &packed.keys[(size_t)t * pairs], pairs,
                       &scores[(size_t)j * n + t], n);
    for (int j = 0; j < count; j++) {
      const int h = head * f.shared + (first + j) / f.length, l = (first + j) % f.length;
      weigh(f, row, h, l, begin, end, &scores[(size_t)j * n], (uint16_t*)&weights[(size_t)j * n / 2],
            &sums[(size_t)j * channels]);
    }
    for (int c = 0; c < channels; c += WIDE)
      for (int j = 0; j < count; j += SOME)
        multiply<SOME>(&weights[((size_t)j * n + begin) / 2], n / 2, &packed.values[((size_t)c * n + begin * WIDE) / 2],
                       (end - begin) / 2, &sums[(size_t)j * channels + c], channels);
    for (int j = 0; j < count; j++) {
      const int h = head * f.shared + (first + j) / f.length, l = (first + j) % f.length;
      memcpy(of(f, row, h, l), &sums[(size_t)j * channels], 4 * f.size);
    }
  }

  static float* of(const Fold& f, int row, int head, int l) {
    return f.summed + row * f.sum_row + head * f.sum_head + (int64_t)l * f.size;
  }

  static const uint8_t* seen_by(const Fold& f, int row, int l) {
    return f.seen + ((int64_t)row * f.length + l) * f.tokens;
  }

  // Scores of tokens [begin, end) become probabilities relative to the highest score so far; the sums follow it.
  static void weigh(const Fold& f, int row, int head, int l, int begin, int end, float* score, uint16_t* weight,
                    float* sum_) {
    float &highest = f.highest[row * f.state_row + head * f.state_head + l],
          &total = f.total[row * f.state_row + head * f.state_head + l];
    const uint8_t* seen = f.seen ? seen_by(f, row, l) : nullptr;
    auto seen_of = [&](int t) -> __mmask16 {
      const __mmask16 held = f.tokens - t >= 16 ? 0xffff : f.tokens > t ? (1u << (f.tokens - t)) - 1 : 0;
      if (!seen) return held;
      const __m128i bytes = _mm_maskz_loadu_epi8(held, seen + t);
      return _mm_test_epi8_mask(bytes, bytes);
    };
    vf high = set1(-INFINITE);
    for (int t = begin; t < end; t += 16) {
      const vf x = _mm512_mask_blend_ps(seen_of(t), set1(-INFINITE), mul(load(score + t), set1(f.scaling)));
      store(score + t, x);
      high = max(high, x);
    }
    const float top = std::max(highest, maximum(high));
    if (top == -INFINITE) return;
    if (top > highest) {
      const float decay = highest == -INFINITE ? 0 : std::exp(highest - top);
      for (int c = 0; c < f.size; c++) sum_[c] *= decay;
      total *= decay;
      highest = top;
    }
    vf all = set1(0);
    for (int t = begin; t < end; t += 16) {
      const vf p = _mm512_maskz_mov_ps(seen_of(t), exp_negative(sub(load(score + t), set1(top))));
      all = add(all, p);
      _mm256_storeu_si256((__m256i*)(weight + t), (__m256i)_mm512_cvtneps_pbh(p));
    }
    total += sum(all);
  }
};

}  // namespace

// Returns whether the processor has what it takes; null asks for that only.
extern "C" int alrd_fold(const Fold* fold) {
  if (!fold) return 1;
  const Fold& f = *fold;
  const int n = round_up(f.tokens, WIDE), channels = round_up(f.size, WIDE), queries = f.shared * f.length;
  const int blocks = ceil_div(queries, BLOCK), heads = f.batch * f.heads;
  std::vector<Packed> packed(heads);
#pragma omp parallel num_threads(f.threads)
  {
#pragma omp for schedule(dynamic)
    for (int i = 0; i < heads; i++) packed[i].pack(f, i / f.heads, i % f.heads, f.size / 2, n, channels);
    Block block;
#pragma omp for schedule(dynamic)
    for (int i = 0; i < heads * blocks; i++) {
      const int head = i / blocks, first = i % blocks * BLOCK;
      block.fold(f, packed[head], head / f.heads, head % f.heads, first, std::min(BLOCK, queries - first), n, channels);
    }
  }
  return 1;
}

#else

extern "C" int alrd_fold(const Fold*) { return 0; }

#endif
