// The key expansion's rows, which codes are multiplied with, for queries that move along the context (attention.cpp).

#pragma once

#include <cmath>
#include <limits>
#include <list>
#include <memory>
#include <mutex>
#include <vector>

#include "packed_codes.h"
#include "tiles.h"

namespace {

constexpr int SPAN = 256;  // tokens of a batch
constexpr int TURN = 64;   // tokens by which queries are turned; cosines and sines are tabulated for twice as many
constexpr int LEVELS = 4;
constexpr float LIMIT = 0.008f;      // relative error of an expansion row of 8 bits
constexpr float WITH_HIGH = 0.004f;  // and of one that has high bytes
constexpr int MAX_NODES = 8;

// Places by which a width's codes are moved up before they are multiplied, to at most 127. Their weights are smaller
// then, as small as those of codes of 8 bits, beside which they could not be rounded to one byte.
inline int code_shift(int levels) {
  int shift = 0;
  while (shift < 3 && (levels - 1) << (shift + 1) < 128) shift++;
  return shift;
}

// The columns of a span: how their codes, moved up by `code_shift`, become numbers.
struct Columns {
  int quads = 0, floats = 0, first_float = 0, last = 0;  // `last`: the bias
  std::vector<float> scale, centre;                      // of each column: x = scale * (code - middle) + centre
  bool scaled = false;                                   // whether expansion rows must be multiplied with these yet
  std::vector<int32_t> twice_middle;                     // of the codes of each column; a quad has one
  std::vector<float> variance;                           // of the codes of each column, if all are equally frequent
  float all_variance = 0;
  struct Group {
    int first, last;
    const float *scale, *centre;
    float middle;
  };  // per token: quads; [token]
  std::vector<Group> groups;
  const float* token_scale = nullptr;  // [token], of the distances from the centres; null: 1
  int64_t code_sum = 0;                // the largest sum of codes
};

// Expansion rows rounded to integers for a span of tokens. Each row is a lane, their number a multiple of 16. Before
// rounding they are [columns + 1][lanes], the last column the bias. An integer is 256 times its high byte plus its low
// one; few quads of columns have high bytes, since few columns are much heavier than the others.
struct Rounded {
  struct Heavy {
    int32_t quad, row;  // of `high`
  };
  int lanes = 0, groups = 1;
  std::vector<int32_t> weights;      // low bytes [quad][lane], four columns each
  std::vector<int32_t> high;         // high bytes of the quads that have some, [row][lane]
  std::vector<int32_t> quad_of;      // [row]
  std::vector<uint16_t> in_lanes;    // [row][lane / 16]: the lanes that have some
  std::vector<Heavy> heavy;          // those with some in lanes that are multiplied together
  std::vector<int32_t> first_heavy;  // [lanes / together][scale group, at least one], and their end
  std::vector<float> step, inverse;  // [lane]
  std::vector<float> constant;       // [lane]: score = step * product + constant
  std::vector<float> shift;          // with scales of tokens: score = scale * (step * product + shift) + constant
  std::vector<float> totals, sums;   // per token, [scale group][lane]: sum of the integers, and of the weights
  // As tile registers take them, 16 lanes at a time: the low bytes of all quads, and the high ones up to the last that
  // has some, [quad / 16][16 lanes][16 quads].
  Integers tiles, high_tiles;
  int steps = 0;
  std::vector<int> high_steps;  // [lane / 16]

  void reserve(int n_lanes, int quads, int n_groups) {
    lanes = n_lanes;
    groups = std::max(1, n_groups);
    weights.resize((size_t)round_up(quads, 16) * lanes);
    std::fill(weights.begin() + (size_t)quads * lanes, weights.end(), 0);
    high.resize((size_t)quads * lanes);
    quad_of.clear();
    in_lanes.resize((size_t)(quads + 1) * (lanes / 16));
    step.resize(lanes);
    constant.resize(lanes);
    shift.resize(lanes);
    totals.resize((size_t)n_groups * lanes);
    sums.resize((size_t)n_groups * lanes);
  }

  void reserve_tiles(int quads) {
    steps = ceil_div(quads, 16);
    tiles.resize((size_t)lanes * steps * 16);
    high_tiles.resize(tiles.size());
    high_steps.assign(lanes / 16, 0);
  }

  // Where the bytes of a lane's quads from 16 * step on start in the tiles.
  size_t place(int lane, int step) const { return ((size_t)(lane / 16 * steps + step) * 16 + lane % 16) * 64; }

  // The quads of the tiles as rows of words, for processors without tile registers.
  void spread_tiles() {
    alignas(64) int32_t any[16];
    Integers words((size_t)16 * lanes);
    for (int step = 0; step < steps; step++) {
      vi some = seti(0);
      for (int v = 0; v < lanes / 16; v++) {
        const size_t from = place(16 * v, step) / 4;
        transpose_words(&tiles[from], 16, &weights[(size_t)16 * step * lanes + 16 * v], lanes);
        for (int i = 0; i < 16 && step < high_steps[v]; i++) some = ori(some, loadi(&high_tiles[from + 16 * i]));
      }
      storei(any, some);
      if (std::all_of(any, any + 16, [](int32_t x) { return x == 0; })) continue;
      for (int v = 0; v < lanes / 16; v++)
        if (step < high_steps[v])
          transpose_words(&high_tiles[place(16 * v, step) / 4], 16, &words[16 * v], lanes);
        else
          for (int q = 0; q < 16; q++) storei(&words[(size_t)q * lanes + 16 * v], seti(0));
      for (int q = 0; q < 16; q++) {
        if (!any[q]) continue;
        const size_t row = quad_of.size();
        for (int v = 0; v < lanes / 16; v++) {
          const vi x = loadi(&words[(size_t)q * lanes + 16 * v]);
          storei(&high[row * lanes + 16 * v], x);
          in_lanes[row * (lanes / 16) + v] = above_a_byte(x) | above_a_byte(shl(x, 8));
        }
        quad_of.push_back(16 * step + q);
      }
    }
  }

#if ALRD_TILES
  // The tiles of quads that are rows of words.
  void gather_tiles(int quads) {
    reserve_tiles(quads);
    std::vector<int32_t> by_quad((size_t)steps * 16 * lanes, 0);
    for (size_t row = 0; row < quad_of.size(); row++) {
      std::copy_n(&high[row * lanes], lanes, &by_quad[(size_t)quad_of[row] * lanes]);
      for (int v = 0; v < lanes / 16; v++)
        if (in_lanes[row * (lanes / 16) + v]) high_steps[v] = quad_of[row] / 16 + 1;
    }
    for (int v = 0; v < lanes / 16; v++)
      for (int step = 0; step < steps; step++) {
        const size_t from = (size_t)step * 16 * lanes + 16 * v, to = place(16 * v, step) / 4;
        transpose_words(&weights[from], lanes, &tiles[to], 16);
        if (step < high_steps[v]) transpose_words(&by_quad[from], lanes, &high_tiles[to], 16);
      }
  }
#endif

  void list_heavy(int together, const Columns& columns) {
    heavy.clear();
    first_heavy.assign(1, 0);
    for (int lane = 0; lane < lanes; lane += together) {
      size_t row = 0;
      for (int group = 0; group < groups; group++) {
        const int last = columns.groups.empty() ? columns.quads : columns.groups[group].last;
        for (; row < quad_of.size() && quad_of[row] < last; row++) {
          bool is_heavy = false;
          for (int l = lane; l < std::min(lanes, lane + together); l++)
            is_heavy |= in_lanes[row * (lanes / 16) + l / 16] >> l % 16 & 1;
          if (is_heavy) heavy.push_back({quad_of[row], (int32_t)row});
        }
        first_heavy.push_back(heavy.size());
      }
    }
  }
};

// Largest magnitude and constant of 16 expansion rows, and the variance of their products with the codes.
struct Range {
  vf highest, constant, norm;
};

template <bool SCALED>
inline Range range_of(const float* weights, int lanes, int l, const Columns& columns) {
  vf highs[4], constants[4], norms[4];  // four, so that they do not wait for each other
  each<4>([&](auto i) INLINE { highs[i] = set1(1e-30f), constants[i] = norms[i] = set1(0); });
  for (int c = 0; c < 4 * columns.quads; c += 4)
    each<4>([&](auto i) INLINE {
      const vf weight = load(weights + (int64_t)(c + i) * lanes + l);
      const vf x = SCALED ? mul(weight, set1(columns.scale[c + i])) : weight;
      highs[i] = max(highs[i], abs(x));
      norms[i] = fma(mul(x, x), set1(columns.variance[c + i]), norms[i]);
      if (SCALED) constants[i] = fma(weight, set1(columns.centre[c + i]), constants[i]);
    });
  const vf highest = max(max(highs[0], highs[1]), max(highs[2], highs[3]));
  const vf norm = add(add(norms[0], norms[1]), add(norms[2], norms[3]));
  const vf constant = add(add(add(constants[0], constants[1]), add(constants[2], constants[3])),
                          load(weights + (int64_t)columns.last * lanes + l));
  return {highest, constant, norm};
}

// Steps of 16 rows: the smallest that a byte holds all of a row at, or, where that loses more than LIMIT, the one that
// loses WITH_HIGH; two bytes must hold it. `planes` 2: the smallest that two bytes hold.
inline void set_steps(const Range& range, const Columns& columns, int planes, float* step, float* inverse) {
  const float* highest = (const float*)&range.highest;
  const float* norm = (const float*)&range.norm;
  // Products stay in 32 bits.
  const float limit = std::min<double>(32512, std::floor(2147000000.0 / std::max<int64_t>(1, columns.code_sum)));
  for (int i = 0; i < 16; i++) {
    const float smallest = highest[i] / limit;
    const float of_a_byte = highest[i] / 127, of_error = std::sqrt(12 * norm[i] / columns.all_variance);
    if (planes == 2)
      step[i] = smallest;
    else
      step[i] = of_a_byte > LIMIT * of_error ? std::max(smallest, WITH_HIGH * of_error) : of_a_byte;
    inverse[i] = 1 / step[i];
  }
}

// Four columns of 16 rows as integers, 128 more than they are: what is not in a byte then has a high byte.
template <bool SCALED>
INLINE inline void round_quad(const float* weights, int lanes, int l, int q, const Columns& columns, vf inverse,
                              vi (&out)[4]) {
  each<4>([&](auto i) INLINE {
    const vf weight = load(weights + (int64_t)(4 * q + i) * lanes + l);
    out[i] = to_int(fma(SCALED ? mul(weight, set1(columns.scale[4 * q + i])) : weight, inverse, set1(128)));
  });
}

// The low bytes of four vectors, side by side.
INLINE inline vi bytes_of(const vi (&x)[4]) {
  const vi low = seti(255);
  return ori(ori(andi(x[0], low), shl(andi(x[1], low), 8)), ori(shl(andi(x[2], low), 16), shl(x[3], 24)));
}

template <bool SCALED>
void round_rows(const float* weights, int lanes, int together, const Columns& columns, int planes, Rounded& out) {
  const bool per_token = !columns.groups.empty();
  const int quads = columns.quads, vectors = lanes / 16;
  out.reserve(lanes, quads, columns.groups.size());
  out.inverse.resize(lanes);
  for (int l = 0; l < lanes; l += 16) {
    const Range range = range_of<SCALED>(weights, lanes, l, columns);
    set_steps(range, columns, planes, &out.step[l], &out.inverse[l]);
    store(&out.constant[l], range.constant);
  }
  size_t g = 0;
  // Sums of the low and of the high bytes: per token as they are, else times the middles of their columns.
  std::vector<int32_t> total(2 * lanes, 0);
  std::vector<float> weight_sum(lanes, 0);
  for (int q = 0; q < quads; q++) {
    const vi middle = seti(0x01010101 * (per_token ? 1 : columns.twice_middle[4 * q]));
    const size_t row = out.quad_of.size();
    uint16_t* in_lanes = &out.in_lanes[row * vectors];
    bool is_heavy = false;
    for (int l = 0; l < lanes; l += 16) {
      vi x[4];
      round_quad<SCALED>(weights, lanes, l, q, columns, load(&out.inverse[l]), x);
      const vi word = xori(bytes_of(x), seti((int)0x80808080u));
      storei(&out.weights[(size_t)q * lanes + l], word);
      storei(&total[l], dot4(loadi(&total[l]), middle, word));
      in_lanes[l / 16] = above_a_byte(ori(ori(x[0], x[1]), ori(x[2], x[3])));
      is_heavy |= in_lanes[l / 16] != 0;
      for (int i = 0; i < 4 && per_token; i++)
        store(&weight_sum[l], add(load(&weight_sum[l]), load(weights + (int64_t)(4 * q + i) * lanes + l)));
    }
    if (is_heavy) {
      for (int l = 0; l < lanes; l += 16) {
        vi x[4];
        round_quad<SCALED>(weights, lanes, l, q, columns, load(&out.inverse[l]), x);
        each<4>([&](auto i) INLINE { x[i] = sar(x[i], 8); });
        const vi word = bytes_of(x);
        storei(&out.high[row * lanes + l], word);
        storei(&total[lanes + l], dot4(loadi(&total[lanes + l]), middle, word));
      }
      out.quad_of.push_back(q);
    }
    if (per_token && q + 1 == columns.groups[g].last) {
      for (int l = 0; l < lanes; l += 16) {
        store(&out.totals[g * lanes + l], to_float(addi(shl(loadi(&total[lanes + l]), 8), loadi(&total[l]))));
        store(&out.sums[g * lanes + l], load(&weight_sum[l]));
      }
      std::fill(total.begin(), total.end(), 0);
      std::fill(weight_sum.begin(), weight_sum.end(), 0.0f);
      g++;
    }
  }
  out.list_heavy(together, columns);
  if (per_token) return;
#if ALRD_TILES
  if (has_tiles()) out.gather_tiles(quads);
#endif
  for (int l = 0; l < lanes; l += 16) {
    const vf of_middles = to_float(addi(shl(loadi(&total[lanes + l]), 8), loadi(&total[l])));
    const vf shift = mul(mul(of_middles, set1(-0.5f)), load(&out.step[l]));
    store(&out.shift[l], shift);
    // The scale of a token multiplies what its codes are beside their middle, not the bias and the centres.
    if (!columns.token_scale) store(&out.constant[l], add(load(&out.constant[l]), shift));
  }
}

// The same of `rows` rows, the first of `lanes` lanes; `expand(row, to)` writes the columns and the bias of one.
template <bool SCALED, class Expand>
void round_lanes(Expand expand, int rows, int lanes, int together, const Columns& columns, int planes, Rounded& out) {
  const bool per_token = !columns.groups.empty();
  const int used = 4 * columns.quads;
  out.reserve(lanes, columns.quads, columns.groups.size());
  out.reserve_tiles(columns.quads);
  const int width = 64 * out.steps;
  alignas(64) float step[16], inverse[16], highs[256], norms[256], constants[256], biases[16];
  alignas(64) int32_t middles[256];
  Floats scaled((size_t)16 * width), rows_((size_t)16 * (columns.last + 17));
  std::fill(scaled.begin(), scaled.end(), 0.0f);
  for (int first = 0; first < lanes; first += 16) {
    const int n = std::clamp(rows - first, 0, 16);
    for (int i = 0; i < 16; i++) {
      float *row = &rows_[(size_t)i * (columns.last + 17)], *to = &scaled[(size_t)i * width];
      if (i < n)
        expand(first + i, row);
      else
        std::fill_n(row, columns.last + 1, 0.0f);
      std::copy_n(row, used, to);
      vf highest = set1(1e-30f), of_centres = set1(0), norm = set1(0);
      for (int c = 0; c < width; c += 16) {
        const vf weight = load(to + c), x = SCALED ? mul(weight, load(&columns.scale[c])) : weight;
        if (SCALED) of_centres = fma(weight, load(&columns.centre[c]), of_centres);
        highest = max(highest, abs(x));
        norm = fma(mul(x, x), load(&columns.variance[c]), norm);
        store(to + c, x);
      }
      store(highs + 16 * i, highest);
      store(norms + 16 * i, norm);
      store(constants + 16 * i, of_centres);
      biases[i] = row[columns.last];
    }
    const auto plus = [](auto x, auto y) { return add(x, y); };
    const Range range = {fold(highs, [](vf x, vf y) { return max(x, y); }), add(fold(constants, plus), load(biases)),
                         fold(norms, plus)};
    set_steps(range, columns, planes, step, inverse);
    store(&out.step[first], load(step));
    store(&out.constant[first], range.constant);
    for (int i = 0; i < 16; i++) {
      float* row = &scaled[(size_t)i * width];
      const vf by = set1(inverse[i]);
      vi of_middles = seti(0);
      for (int s = 0; s < out.steps; s++) {
        uint8_t* low = (uint8_t*)out.tiles.data() + out.place(first + i, s);
        uint8_t* high = (uint8_t*)out.high_tiles.data() + out.place(first + i, s);
        int above = 0;
        each<4>([&](auto k) INLINE {
          const int c = 64 * s + 16 * k;
          const vi x = to_int(fma(load(row + c), by, set1(128))), integer = subi(x, seti(128));
          store_bytes(low + 16 * k, integer);
          store_bytes(high + 16 * k, sar(x, 8));
          above |= above_a_byte(x);
          of_middles = addi(of_middles, muli(integer, loadi(&columns.twice_middle[c])));
          if (per_token) storei(row + c, integer);
        });
        if (above) out.high_steps[first / 16] = std::max(out.high_steps[first / 16], s + 1);
      }
      storei(middles + 16 * i, of_middles);
      for (size_t g = 0; g < columns.groups.size(); g++) {
        const float* weight = &rows_[(size_t)i * (columns.last + 17)];
        int64_t total = 0;
        float of_weights = 0;
        for (int c = 4 * columns.groups[g].first; c < 4 * columns.groups[g].last; c++) {
          total += ((const int32_t*)row)[c];
          of_weights += weight[c];
        }
        out.totals[g * lanes + first + i] = total;
        out.sums[g * lanes + first + i] = of_weights;
      }
    }
    const vf of_middles = to_float(fold(middles, [](vi x, vi y) { return addi(x, y); }));
    store(&out.shift[first], mul(mul(of_middles, set1(-0.5f)), load(step)));
  }
  if (!has_tiles() || per_token) {
    out.spread_tiles();
    out.list_heavy(together, columns);
  }
  if (per_token || columns.token_scale) return;
  // The scale of a token multiplies what its codes are beside their middle, not the bias and the centres.
  for (int l = 0; l < lanes; l++) out.constant[l] += out.shift[l];
}

// The span's codes and numbers.
struct Tokens {
  const uint8_t* codes;            // [quad][token][4]
  const float* numbers;            // [column][token]
  int code_stride, number_stride;  // tokens
  // Products of codes with the low bytes of 16 lanes, and with the high ones, [2][16][TILE]; null: not by tiles.
  const int32_t* products;
};

// Codes of quads [first, last) times M expansion rows, for 16 V tokens.
template <int M, int V>
INLINE inline void multiply_codes(const int32_t* weights, int lanes, const uint8_t* codes, int stride, int first,
                                  int last, vi (&sum)[M][V]) {
  weights += (size_t)first * lanes;
  codes += (size_t)first * stride * 4;
  for (int q = first; q < last; q++, weights += lanes, codes += (size_t)stride * 4) {
    vi code[V];
    each<V>([&](auto v) INLINE { code[v] = loadi(codes + 64 * v); });
    each<M>([&](auto m) INLINE {
      const vi weight = seti(weights[m]);
      each<V>([&](auto v) INLINE { sum[m][v] = dot4(sum[m][v], code[v], weight); });
    });
  }
}

// The same with the high bytes too, of the heavy quads of scale group `group`.
template <int M, int V>
INLINE inline void multiply_rounded(const Rounded& rounded, const Tokens& tokens, int lane, int token, int group,
                                    int first, int last, vi (&sum)[M][V]) {
  if (tokens.products) {
    const int32_t* products = tokens.products + lane % 16 * TILE + token;
    each<M>([&](auto m) INLINE { each<V>([&](auto v) INLINE { sum[m][v] = loadi(products + m * TILE + 16 * v); }); });
    if (!rounded.high_steps[lane / 16]) return;
    const int32_t* high = products + 16 * TILE;
    each<M>([&](auto m) INLINE {
      each<V>([&](auto v) INLINE { sum[m][v] = addi(shl(loadi(high + m * TILE + 16 * v), 8), sum[m][v]); });
    });
    return;
  }
  const int32_t* weights = rounded.weights.data() + lane;
  const uint8_t* codes = tokens.codes + (int64_t)token * 4;
  each<M>([&](auto m) INLINE { each<V>([&](auto v) INLINE { sum[m][v] = seti(0); }); });
  const int32_t* of_lanes = &rounded.first_heavy[lane / M * rounded.groups + group];
  const int heavy = of_lanes[0], end = of_lanes[1];
  for (int k = heavy; k < end; k++) {
    const int32_t* high = rounded.high.data() + (size_t)rounded.heavy[k].row * rounded.lanes + lane;
    multiply_codes<M, V>(high, 0, codes + (size_t)rounded.heavy[k].quad * tokens.code_stride * 4, 0, 0, 1, sum);
  }
  if (heavy < end) each<M>([&](auto m) INLINE { each<V>([&](auto v) INLINE { sum[m][v] = shl(sum[m][v], 8); }); });
  multiply_codes<M, V>(weights, rounded.lanes, codes, tokens.code_stride, first, last, sum);
}

// Expansion rows before rounding: how far their lanes, and their columns, are apart.
struct Lanes {
  const float* weights;
  int64_t lane, column;
  Lanes from(int first) const { return {weights + first * lane, lane, column}; }
};

// M expansion rows times 16 V tokens from `token` on; `lanes`: from the first of them on.
template <int M, int V>
INLINE inline void multiply(const Rounded& rounded, const Lanes& lanes, const Columns& columns, const Tokens& tokens,
                            int lane, int token, vf (&out)[M][V]) {
  if (columns.groups.empty() && columns.quads) {
    vi sum[M][V];
    multiply_rounded<M, V>(rounded, tokens, lane, token, 0, 0, columns.quads, sum);
    each<M>([&](auto m) INLINE {
      const vf step = set1(rounded.step[lane + m]), constant = set1(rounded.constant[lane + m]);
      if (columns.token_scale) {
        const vf shift = set1(rounded.shift[lane + m]);
        each<V>([&](auto v) INLINE {
          const vf scale = load(columns.token_scale + token + 16 * v);
          out[m][v] = fma(fma(to_float(sum[m][v]), step, shift), scale, constant);
        });
        return;
      }
      each<V>([&](auto v) INLINE { out[m][v] = fma(to_float(sum[m][v]), step, constant); });
    });
  } else {
    each<M>([&](auto m) INLINE {
      const vf constant = set1(lanes.weights[columns.last * lanes.column + m * lanes.lane]);
      each<V>([&](auto v) INLINE { out[m][v] = constant; });
    });
    for (size_t g = 0; g < columns.groups.size(); g++) {
      const Columns::Group& group = columns.groups[g];
      vi sum[M][V];
      multiply_rounded<M, V>(rounded, tokens, lane, token, g, group.first, group.last, sum);
      each<M>([&](auto m) INLINE {
        const vf step = set1(rounded.step[lane + m]), weight_sum = set1(rounded.sums[g * rounded.lanes + lane + m]);
        const vf all = set1(-group.middle * rounded.totals[g * rounded.lanes + lane + m]);
        each<V>([&](auto v) INLINE {
          const vf centred = mul(add(to_float(sum[m][v]), all), step);
          out[m][v] = fma(centred, load(group.scale + token + 16 * v), out[m][v]);
          out[m][v] = fma(weight_sum, load(group.centre + token + 16 * v), out[m][v]);
        });
      });
    }
  }
  const float* of_lane = lanes.weights + columns.first_float * lanes.column;
  const float* number = tokens.numbers + token;
  for (int c = 0; c < columns.floats; c++, of_lane += lanes.column, number += tokens.number_stride) {
    vf x[V];
    each<V>([&](auto v) INLINE { x[v] = load(number + 16 * v); });
    each<M>([&](auto m) INLINE {
      const vf r = set1(of_lane[m * lanes.lane]);
      each<V>([&](auto v) INLINE { out[m][v] = fma(r, x[v], out[m][v]); });
    });
  }
}

// Division of the pairs: the first `fast` are rebuilt, the next ones belong to level 0, 1, …; tables of cosines.
struct Division {
  int half, fast, nodes, levels;
  int together;           // pairs that are rebuilt together
  int first[LEVELS + 1];  // pairs of level l: [first[l], first[l + 1])
  double span[LEVELS], interval[LEVELS], node[LEVELS][MAX_NODES];
  std::vector<float> cosine, sine;            // [fast, padded][2 TURN] of offsets
  std::vector<float> turn_cosine, turn_sine;  // [SPAN / TURN][fast], turns back by multiples of TURN
  std::vector<float> lagrange;                // [nodes][2 SPAN]
  std::vector<float> node_cosine, node_sine;  // [half][MAX_NODES]
  double scale[LEVELS][MAX_NODES];            // of the Lagrange polynomials

  // Weights of the nodes of a level at x.
  void interpolate(int l, double x, double* weight) const {
    double before = 1, after = 1;
    for (int k = 0; k < nodes; k++) {
      weight[k] = scale[l][k] * before;
      before *= x - node[l][k];
    }
    for (int k = nodes - 1; k >= 0; k--) {
      weight[k] *= after;
      after *= x - node[l][k];
    }
  }
};

// The cheapest division for `columns` products per expansion row and token, and `queries` that share a key head;
// `by_tiles`: products are those of tile registers, and rows of rebuilt pairs are rounded once. A negative tolerance:
// all pairs are rebuilt.
Division divide(const double* frequency, int half, double tolerance, int columns, int queries, bool by_tiles) {
  Division best;
  double best_cost = std::numeric_limits<double>::infinity();
  const double quads = columns / 4.0 * (by_tiles ? 0.3 : 1);
  const int together = has_tiles() ? 2 : 3;  // three load fewer codes, two leave fewer lanes of a tile empty
  for (int nodes : {0, 1, 4, 6, 8}) {
    if (nodes && tolerance < 0) continue;
    if (nodes == 1 && frequency[0] != 0) continue;
    // |error| of a pair of angle z at the ends of the interval: z^K / (2^(K-1) K!)
    double bound = nodes ? tolerance * std::ldexp(1.0, nodes - 1) : 0;
    for (int k = 2; k <= nodes; k++) bound *= k;
    const double z = nodes > 1 ? std::pow(bound, 1.0 / nodes) : 0;
    int fast = 0;
    while (fast < half && (nodes == 0 || frequency[fast] * SPAN / 2 > z)) fast++;
    fast = std::min(half, round_up(fast, together));
    const int node_lanes = round_up(nodes * queries, 16), lanes = round_up(2 * fast, 16) + node_lanes;
    // Sums at more nodes than a vector holds took five times as long (16 lanes against 32).
    const double sums = node_lanes * (nodes + 16) / 12.0 * (node_lanes > 16 ? 2.5 : 1);
    // Per batch of SPAN: rounding, and the sums at the nodes, beside which products by tiles are half as dear as
    // others.
    const double of_batch = by_tiles ? 2 * columns * (node_lanes / 2.0 + sums) : columns * (lanes / 2.0 + sums);
    // Products and their rotations are per 16 tokens.
    const double cost = fast * (2 * quads + 8 + 2 * queries) + nodes * queries * (quads + 2) + of_batch / (SPAN / 16);
    if (cost >= best_cost) continue;
    best_cost = cost;
    Division d;
    d.half = half;
    d.fast = fast;
    d.together = together;
    d.nodes = fast == half ? 0 : nodes;
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
  const int fast = round_up(d.fast, together);
  for (int l = 0; l < LEVELS; l++)
    for (int k = 0; k < d.nodes; k++) {
      d.scale[l][k] = 1;
      for (int m = 0; m < d.nodes; m++)
        if (m != k) d.scale[l][k] /= d.node[l][k] - d.node[l][m];
    }
  d.cosine.assign((size_t)fast * 2 * TURN, 0);
  d.sine = d.cosine;
  for (int f = 0; f < d.fast; f++)
    for (int o = 0; o < 2 * TURN; o++) {
      d.cosine[(size_t)f * 2 * TURN + o] = std::cos(frequency[f] * o);
      d.sine[(size_t)f * 2 * TURN + o] = std::sin(frequency[f] * o);
    }
  for (int o = 0; o < SPAN; o += TURN)
    for (int f = 0; f < d.fast; f++) {
      d.turn_cosine.push_back(std::cos(frequency[f] * o));
      d.turn_sine.push_back(-std::sin(frequency[f] * o));
    }
  d.lagrange.resize((size_t)d.nodes * 2 * SPAN);
  for (int o = 0; o < 2 * SPAN; o++) {
    double weight[MAX_NODES];
    d.interpolate(0, o, weight);
    for (int k = 0; k < d.nodes; k++) d.lagrange[(size_t)k * 2 * SPAN + o] = weight[k];
  }
  d.node_cosine.resize((size_t)half * MAX_NODES);
  d.node_sine.resize((size_t)half * MAX_NODES);
  for (int l = 0; l < d.levels; l++)
    for (int f = d.first[l]; f < d.first[l + 1]; f++)
      for (int k = 0; k < d.nodes; k++) {
        d.node_cosine[f * MAX_NODES + k] = std::cos(frequency[f] * d.node[l][k]);
        d.node_sine[f * MAX_NODES + k] = std::sin(frequency[f] * d.node[l][k]);
      }
  return best;
}

// The division for these arguments, made once.
const Division& division_of(const double* frequency, int half, double tolerance, int columns, int queries,
                            bool by_tiles) {
  struct Kept {
    std::vector<double> frequency;
    double tolerance;
    int columns, queries;
    bool by_tiles;
    std::unique_ptr<Division> division;
  };
  static std::mutex mutex;
  static std::list<Kept> all;  // addresses stay as it grows
  const std::lock_guard<std::mutex> guard(mutex);
  for (const Kept& kept : all)
    if (kept.tolerance == tolerance && kept.columns == columns && kept.queries == queries &&
        kept.by_tiles == by_tiles && kept.frequency.size() == (size_t)half &&
        std::equal(frequency, frequency + half, kept.frequency.begin()))
      return *kept.division;
  all.push_back({{frequency, frequency + half},
                 tolerance,
                 columns,
                 queries,
                 by_tiles,
                 std::make_unique<Division>(divide(frequency, half, tolerance, columns, queries, by_tiles))});
  return *all.back().division;
}

// The expansion rows of one key head, for queries that move along the context.
struct ExpansionRows {
  const Division* division;
  const double* frequency;
  const float* expansion;  // [half][2][columns + 1], then rows of zeros up to whole vectors of lanes; null: not kept
  int columns, queries, fast_lanes, node_lanes;
  int64_t reference;              // position to which the queries below are rotated
  std::vector<float> query;       // [half][2][queries]
  std::vector<float> pair_query;  // [queries][2][fast, padded]: of the fast pairs
  std::vector<float> fast_query;  // [SPAN / TURN][queries][2][fast, padded]: rotated to the distances from the anchor
  int padded;                     // fast, padded
  std::vector<float> nodes;       // [columns + 1][node_lanes], lane k * queries + j
  struct Level {
    bool valid = false, turned = false;
    int64_t anchor = 0, turned_to = 0, step = 0;
    std::vector<double> cosine, sine, step_cosine, step_sine;  // [pairs]: to the anchor; by the last step
    std::vector<float> sums;                                   // [columns + 1][node_lanes]
    std::vector<float> spread;  // [nodes][columns + 1][node_lanes]: sums of a node in the lanes of all nodes
  } level[LEVELS];
  std::vector<float> lane_values;   // [half][q1, q2, cosine and sine of the node's offset][node_lanes]
  std::vector<float> coefficients;  // [pairs][2][node_lanes]
  std::vector<float> transfer;      // [nodes above][node_lanes]
  std::vector<int32_t> lane_of;     // [nodes above][node_lanes]: lane of the same query there
  int64_t base = 0;

  // The rows of a head, whatever its queries are.
  void of(const Division& d, const double* frequencies, const float* expansion_, int columns_, int n_queries) {
    division = &d;
    frequency = frequencies;
    expansion = expansion_;
    columns = columns_;
    queries = n_queries;
    fast_lanes = round_up(2 * round_up(d.fast, d.together), 16);
    node_lanes = round_up(d.nodes * queries, 16);
    padded = round_up(d.fast + 2, 16);
    pair_query.assign((size_t)queries * 2 * padded, 0);
    fast_query.assign((size_t)SPAN / TURN * queries * 2 * padded, 0);
    lane_of.resize((size_t)d.nodes * node_lanes);
    for (int k = 0; k < d.nodes; k++)
      for (int lane = 0; lane < node_lanes; lane++)
        lane_of[(size_t)k * node_lanes + lane] = k * queries + lane % queries;
    lane_values.assign((size_t)d.half * 4 * node_lanes, 0);
    for (int f = d.fast; f < d.half; f++)
      for (int lane = 0; lane < d.nodes * queries; lane++) {
        float* to = &lane_values[(size_t)f * 4 * node_lanes + lane];
        to[2 * node_lanes] = d.node_cosine[f * MAX_NODES + lane / queries];
        to[3 * node_lanes] = d.node_sine[f * MAX_NODES + lane / queries];
      }
  }

  // Lanes a_0, b_0, a_1, b_1, … of the fast pairs; and those of the nodes.
  Lanes fast() const { return {expansion, columns + 1, 1}; }
  Lanes node_rows() const { return {nodes.data(), 1, node_lanes}; }

  // Other queries of the same head.
  void start(int64_t reference_, std::vector<float> query_) {
    const Division& d = *division;
    reference = reference_;
    query = std::move(query_);
    for (int f = 0; f < d.fast; f++)
      for (int i = 0; i < 2; i++)
        for (int j = 0; j < queries; j++)
          pair_query[((size_t)j * 2 + i) * padded + f] = query[((size_t)f * 2 + i) * queries + j];
    for (int f = d.fast; f < d.half; f++)
      for (int lane = 0; lane < d.nodes * queries; lane++) {
        float* to = &lane_values[(size_t)f * 4 * node_lanes + lane];
        to[0] = query[((size_t)f * 2) * queries + lane % queries];
        to[node_lanes] = query[((size_t)f * 2 + 1) * queries + lane % queries];
      }
    restart();
  }

  // Forget the batches so far, on which the next ones' errors would depend.
  void restart() {
    for (int l = 0; l < LEVELS; l++) level[l].valid = level[l].turned = false;
  }

  // Pairs [first, last) rotated from the reference to the distance from `anchor`.
  void turn(Level& at, int first, int last, int64_t anchor) {
    const int n = last - first;
    const int64_t step = anchor - at.turned_to;
    at.cosine.resize(n);
    at.sine.resize(n);
    at.step_cosine.resize(n);
    at.step_sine.resize(n);
    double *cosine = at.cosine.data(), *sine = at.sine.data();
    const double *by_cosine = at.step_cosine.data(), *by_sine = at.step_sine.data();
    if (at.turned && step == at.step) {
#pragma GCC ivdep
      for (int f = 0; f < n; f++) {
        const double c = cosine[f], s = sine[f];
        cosine[f] = c * by_cosine[f] - s * by_sine[f];
        sine[f] = s * by_cosine[f] + c * by_sine[f];
      }
    } else {
      for (int f = 0; f < n; f++) {
        const double angle = frequency[first + f] * (double)(reference - anchor);
        cosine[f] = std::cos(angle);
        sine[f] = std::sin(angle);
        if (!at.turned) continue;
        at.step_cosine[f] = std::cos(frequency[first + f] * (double)step);
        at.step_sine[f] = -std::sin(frequency[first + f] * (double)step);
      }
      at.step = at.turned ? step : 0;
    }
    at.turned = true;
    at.turned_to = anchor;
  }

  // Compute `nodes` and `fast_query` for batches that start at `anchor`.
  void move(int64_t anchor) {
    const Division& d = *division;
    if (!level[0].valid && !level[0].turned) base = anchor;
    if (anchor < base) {
      base = anchor;
      level[1].valid = level[2].valid = level[3].valid = false;
    }
    if (level[0].valid && level[0].anchor == anchor) return;
    if (level[0].valid && frequency[0] == 0) return;  // nothing turns
    // Level 0 keeps the rotations of the fast pairs too.
    turn(level[0], 0, d.first[1], anchor);
    const double *cosine = level[0].cosine.data(), *sine = level[0].sine.data();
    for (int j = 0; j < queries; j++) {
      const float *q1 = &pair_query[(size_t)j * 2 * padded], *q2 = q1 + padded;
      float *a = &fast_query[(size_t)j * 2 * padded], *b = a + padded;
#pragma GCC ivdep
      for (int f = 0; f < d.fast; f++) {
        const float x = cosine[f], y = sine[f];
        a[f] = q1[f] * x - q2[f] * y;
        b[f] = q2[f] * x + q1[f] * y;
      }
      for (int i = 1; i < SPAN / TURN; i++) {
        const float *x = d.turn_cosine.data() + (size_t)i * d.fast, *y = d.turn_sine.data() + (size_t)i * d.fast;
        float *u = a + (size_t)i * queries * 2 * padded, *v = u + padded;
#pragma GCC ivdep
        for (int f = 0; f < d.fast; f++) {
          u[f] = a[f] * x[f] - b[f] * y[f];
          v[f] = b[f] * x[f] + a[f] * y[f];
        }
      }
    }
    level[0].valid = true;
    level[0].anchor = anchor;
    if (d.nodes) sum(0, anchor, cosine + d.fast, sine + d.fast, nodes);
  }

  void ensure(int l, int64_t position) {
    const Division& d = *division;
    const int64_t span = d.span[l], anchor = base + (position - base) / span * span;
    if (level[l].valid && level[l].anchor == anchor) return;
    turn(level[l], d.first[l], d.first[l + 1], anchor);
    sum(l, anchor, level[l].cosine.data(), level[l].sine.data(), level[l].sums);
    level[l].valid = true;
    level[l].anchor = anchor;
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

  // Sums at the nodes of level `l` over the pairs of this level and of the levels above.
  void sum(int l, int64_t anchor, const double* cosines, const double* sines, std::vector<float>& out) {
    const Division& d = *division;
    const int first = d.first[l], n = d.first[l + 1] - first, lanes = node_lanes, width = columns + 1;
    if (l + 1 < d.levels) ensure(l + 1, anchor);
    out.resize((size_t)width * lanes);
    coefficients.resize((size_t)std::max(1, n) * 2 * lanes);
    for (int f = 0; f < n; f++) {
      const vf c = set1(cosines[f]), s = set1(sines[f]);
      const float* of_pair = &lane_values[(size_t)(first + f) * 4 * lanes];
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
    const float* weights = expansion + (int64_t)first * 2 * width;
    for (int v = 0; v < lanes; v += 16) {
      int c = 0;
      for (; c + 8 <= width; c += 8) sum_columns<8>(weights, width, n, c, v, above, out);
      for (; c < width; c++) sum_columns<1>(weights, width, n, c, v, above, out);
    }
  }

  // Whether the sums of all nodes are one vector.
  bool by_permutation() const { return ALRD_AVX512 && node_lanes == 16; }

  template <int N>
  INLINE inline void sum_columns(const float* weights, int width, int n, int c, int v, const Level* above,
                                 std::vector<float>& out) {
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
        each<N>([&](auto i) INLINE { total[i] = fma(_mm512_permutexvar_ps(lane, sums[i]), weight, total[i]); });
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
      const float* of_pair = weights + (int64_t)f * width + c;
#pragma GCC unroll 8
      for (int i = 0; i < N; i++) total[i] = fma(set1(of_pair[i]), weight, total[i]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < N; i++) store(&out[(size_t)(c + i) * lanes + v], total[i]);
  }
};

}  // namespace
