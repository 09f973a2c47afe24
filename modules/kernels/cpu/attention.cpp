// Attention of a few new tokens over packed latents; `modules/kernels/attention.py` is the reference.
//
// Work is divided into items: a row of the batch, a key/value head, a share of the row's blocks. An item goes over its
// tokens in batches of at most SPAN, and for each
//   1. unpacks the key codes to bytes, four channels of a token side by side;
//   2. multiplies them with the expansion rows that the queries ask for, and gets scores;
//   3. updates the running softmax, and sums up the value codes weighted by the probabilities.
//
// The expansion rows. With RoPE relative to the batch's first token (offset o), the score of a latent c is
//     sum_f  a_f.c (q1_f cos(t_f o) + q2_f sin(t_f o)) + b_f.c (q2_f cos(t_f o) - q1_f sin(t_f o))
// over the pairs f of frequency t_f, where a_f, b_f are the two rows of the key expansion and (q1, q2) the query
// rotated to its distance from the first token. Fast pairs are rebuilt: a_f and b_f are multiplied, rotation and query
// come after. Slow pairs turn so little within a batch that the sum over them, a vector of the latent space for each
// query and offset, is a polynomial of o: it is computed at K Chebyshev nodes only, these vectors are multiplied, and
// the scores are interpolated between them. The slower a pair, the longer its interval: four levels, each four times as
// long as the one below, hand their sums down by interpolation. The bound of the error is `tolerance` per pair.
//
// The arithmetic. Expansion rows are scaled by the block's scales and rounded to 8 bits, or to 16 (two products) where
// `planes` is 2 or the columns differ so much that 8 bits would lose more than LIMIT of one; codes are exact, minus
// their middle level; products are summed up exactly. Probabilities are rounded to 15 bits. Numbers that are not codes
// (16 bits, sinks, window, float32 models) are multiplied in float32.

#include "expansion.h"
#include "softmax.h"

// attention.py has the same structures.
extern "C" {

// Consecutive channels of a head group in a part, with one scale group if scales are per token (column >= 0).
struct Segment {
  int32_t part, channel, count, column;
  int32_t position;  // where they stand among the columns of the group
};

struct Side {
  const Part* parts;
  const Segment* segments;       // segments multiplied as codes come first
  const int32_t* first_segment;  // [groups + 1]
  const int32_t* integers;       // [groups] segments that are multiplied as codes
  const int32_t* columns;        // [groups] columns in use
  const uint8_t* token_scale;    // [slots, block_length, groups], powers of 2^(1/16) from 128 on; null: 1
  int32_t groups, width;         // columns of the widest group
  int32_t run;                   // tokens of a block that share scales per channel
  int32_t by_block;              // whether scales per channel belong to blocks
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
  float* log_sum;                // [B, H_q, L]
  Side keys, values;
  int32_t batch, query_heads, heads, length, half, blocks, block_length, exact_width, output_width, n_exact;
  int32_t state_type, weight_type, weight_stride, planes, threads;
  float scaling, tolerance;
};

}  // extern "C"

namespace {

// A piece of a block: tokens [first, first + count), at `position`.
struct Chunk {
  int slot, first, count;
  int64_t position;
};

// The scales of tokens by their bytes (`decode_token_scale` of modules/quant_utils.py).
struct TokenScales {
  float of[256];
  TokenScales() {
    for (int i = 0; i < 256; i++) of[i] = (float)std::exp2((i - 128) / 16.0);
  }
};

const TokenScales TOKEN_SCALES;

struct Worker {
  const Arguments& a;
  const Division &division, &exact_division;
  std::vector<uint8_t> codes;
  std::vector<float> column_numbers, scores, span_scores, scales, key_scales;
  std::vector<float> weight, exact_weight;  // of this head's expansion
  ExpansionRows expansion, exact_expansion;
  Rounded fast, nodes;
  Columns columns;
  std::vector<float> sums, exact_sums, highest, total;  // values [query][column], [query][channel]; softmax
  std::vector<int32_t> integers;                        // probabilities, rounded
  std::vector<uint32_t> packed_high, packed_low;        // four to a lane, in the order of a layout
  std::vector<float> steps, plain, scaled, value_numbers;
  int row = 0, head = 0, group = 0, value_group = 0, queries = 0;
  bool fast_is_rounded = false, nodes_are_rounded = false;
  int64_t rounded_anchor = 0;
  std::vector<int64_t> query_position;

  Worker(const Arguments& arguments, const Division& d, const Division& e)
      : a(arguments), division(d), exact_division(e) {}

  void start(int row_, int head_) {
    row = row_;
    head = head_;
    group = head * a.keys.groups / a.heads;
    value_group = head * a.values.groups / a.heads;
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
      expand(a.keys.width, a.key_channel + (int64_t)group * a.keys.width, weight);
      expansion.start(division, a.frequency, weight.data(), a.keys.width, queries, reference, query);
    }
    expand(a.exact_width, nullptr, exact_weight);
    exact_expansion.start(exact_division, a.frequency, exact_weight.data(), a.exact_width, queries, reference, query);
    sums.assign((size_t)queries * round_up(a.values.width, 16), 0);
    exact_sums.assign((size_t)queries * round_up(a.output_width, 16), 0);
    highest.assign(queries, -INFINITE);
    total.assign(queries, 0);
    scores.resize((size_t)queries * (SPAN + 16));
    span_scores.resize((size_t)queries * (SPAN + 16));
    fast_is_rounded = nodes_are_rounded = false;
  }

  // Weights of this head's expansion, [half][2][width + 1], the last column the bias, for the channels of `channel`, or
  // all of the group if it is null.
  void expand(int width, const int32_t* channel, std::vector<float>& out) {
    const int channels = a.key_count[group];
    std::vector<float> of_dimension(round_up(channels, 16));
    out.assign((size_t)a.half * 2 * (width + 1), 0);
    float* to = out.data();
    for (int f = 0; f < a.half; f++)
      for (int i = 0; i < 2; i++, to += width + 1) {
        const int dimension = i * a.half + a.order[f];
        const int64_t r = (int64_t)head * 2 * a.half + dimension;
        if (a.weight) {
          numbers(a.weight, r * a.weight_stride, channels, a.weight_type, of_dimension.data());
        } else {
          std::fill(of_dimension.begin(), of_dimension.end(), 0.0f);
          of_dimension[dimension] = 1;
        }
        for (int c = 0; c < width; c++) {
          const int from = channel ? channel[c] : c < channels ? c : -1;
          to[c] = from < 0 ? 0 : of_dimension[from];
        }
        to[width] = a.bias ? number(a.bias, r, a.weight_type) : 0;
      }
  }

  static constexpr int STRIDE = SPAN + 64;   // tokens of the buffers
  static constexpr int ROUNDED = SPAN + 32;  // probabilities of a query, and zeros up to the end of the last word
  static constexpr int PACKED = ROUNDED / 4 + 16;

  template <int V>
  void score_tokens(const ExpansionRows& expansion_, const Tokens& tokens, int token, int offset, float* out) {
    const Division& d = *expansion_.division;
    const float* q = &expansion_.fast_query[offset / HALF * (size_t)queries * 2 * expansion_.padded];
    for (int f = 0; f < d.fast; f += 3) {
      vf k[6][V];
      multiply<6, V>(fast, expansion_.fast.data(), columns, tokens, 2 * f, token, k);
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
          const vf q1 = set1(q[(size_t)j * 2 * expansion_.padded + f + p]),
                   q2 = set1(q[((size_t)j * 2 + 1) * expansion_.padded + f + p]);
          each<V>([&](auto v) INLINE { sum[v] = fma(q2, k[2 * p + 1][v], fma(q1, k[2 * p][v], sum[v])); });
        });
        each<V>([&](auto v) INLINE { store(score + 16 * v, sum[v]); });
      }
    }
    const int n_lanes = d.nodes * queries;
    for (int lane = 0; lane < n_lanes; lane += 4) {
      vf y[4][V];
      multiply<4, V>(nodes, expansion_.nodes.data(), columns, tokens, lane, token, y);
      each<4>([&](auto m) INLINE {
        if (lane + m >= n_lanes) return;
        float* score = out + (size_t)((lane + m) % queries) * (SPAN + 16);
        const float* weight = &d.lagrange[(size_t)((lane + m) / queries) * 2 * SPAN + offset];
        each<V>([&](auto v)
                    INLINE { store(score + 16 * v, fma(load(weight + 16 * v), y[m][v], load(score + 16 * v))); });
      });
    }
  }

  // Scores of n tokens of the buffers, whose offsets from the anchor of `expansion_` start at `offset`.
  void score_span(const ExpansionRows& expansion_, int n, int offset, float* out) {
    const Tokens tokens = {codes.data(), column_numbers.data(), STRIDE};
    float* sum = span_scores.data();
    std::fill(span_scores.begin(), span_scores.end(), 0.0f);
    for (int t = 0; t < n;) {
      if (n - t > 32) {
        score_tokens<4>(expansion_, tokens, t, offset + t, sum + t);
        t += 64;
      } else {
        score_tokens<1>(expansion_, tokens, t, offset + t, sum + t);
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

  // Steps and values, as `parameters`, of n tokens from `first` on in a scale group per token.
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
      scale[e] = step;
      zero[e] = (part.zero_point ? z[e] : -s[e] * part.offset) + middle * step;
    }
  }

  // The tokens of a block that are packed together with token `first`.
  struct Run {
    int start, length;
    const int32_t* words;
  };

  Run run_of(const Part& part, int slot, int first) const {
    const int start = first / part.run * part.run;
    const int64_t offset = slot * part.slot_stride + run_words(part, start) * part.token_stride;
    return {start, std::min(part.run, a.block_length - start), (const int32_t*)part.packed + offset};
  }

  // Scales of n tokens of a block from `first` on in a head group.
  void token_scales(const Side& side, int of, int slot, int first, int n, float* to) const {
    const uint8_t* codes_ = side.token_scale + ((int64_t)slot * a.block_length + first) * side.groups + of;
    for (int t = 0; t < n; t++) to[t] = TOKEN_SCALES.of[codes_[(int64_t)t * side.groups]];
  }

  // Fill the buffers with tokens of a block, from buffer token `to` on; `scales_too`: with scales per channel.
  void load_keys(const Chunk& chunk, int first, int n, int to, bool scales_too) {
    const Side& side = a.keys;
    const int s0 = side.first_segment[group], s1 = side.first_segment[group + 1];
    if (side.token_scale) token_scales(side, group, chunk.slot, first, n, &key_scales[to]);
    const float* scale_of = side.token_scale ? &key_scales[to] : nullptr;
    for (int i = s0; i < s1; i++) {
      const Segment& segment = side.segments[i];
      const Part& part = side.parts[segment.part];
      if (part.bits == 16) {
        load_states(part, chunk.slot, first, n, segment, to);
        continue;
      }
      const Run run = run_of(part, chunk.slot, first);
      const bool as_codes = i - s0 < side.integers[group];
      uint8_t* to_codes = codes.data() + ((int64_t)(as_codes ? segment.position / 4 : 0) * STRIDE + to) * 4;
      if (!as_codes) to_codes = codes.data() + (int64_t)code_columns() * STRIDE + 4 * to;
      unpack(part, run.words, run.length, first - run.start, n, segment.channel, segment.count, to_codes, STRIDE);
      if (as_codes && segment.column < 0 && scales_too)
        parameters(part, chunk.slot, first / part.run, segment.channel, segment.count, true,
                   &columns.scale[segment.position], &columns.centre[segment.position]);
      if (as_codes && segment.column >= 0) load_token_scales(part, chunk.slot, first, n, segment, i - s0, to);
      if (!as_codes)
        dequantize(part, chunk.slot, first, n, segment, scale_of, to_codes, [&](int t, int c) -> float& {
          return column_numbers[(size_t)(segment.position - columns.first_float + c) * STRIDE + to + t];
        });
    }
  }

  int code_columns() const { return round_up(a.keys.width, 4); }

  // Scale and centre of n tokens in a scale group, for `Columns::groups`.
  void load_token_scales(const Part& part, int slot, int first, int n, const Segment& segment, int index, int to) {
    float *scale = &scales[(size_t)index * 2 * STRIDE + to], *centre = scale + STRIDE;
    token_parameters(part, slot, first, n, segment.column, true, scale, centre);
  }

  // Numbers of n tokens from `first` on of a block, from their unpacked codes and, if `scale_of` is not null, their own
  // scales; `to(t, c)`: where a channel's goes.
  template <class To>
  void dequantize(const Part& part, int slot, int first, int n, const Segment& segment, const float* scale_of,
                  const uint8_t* from, To to) {
    std::vector<float> scale(round_up(segment.count, 16)), zero(scale.size());
    const float middle = scale_of ? (part.levels - 1) * 0.5f : 0;
    if (segment.column < 0)
      parameters(part, slot, first / part.run, segment.channel, segment.count, scale_of, scale.data(), zero.data());
    for (int t = 0; t < n; t++) {
      if (segment.column >= 0) {
        parameters(part, slot, first + t, segment.column, 1, false, scale.data(), zero.data());
        std::fill(scale.begin(), scale.end(), scale[0]);
        std::fill(zero.begin(), zero.end(), zero[0]);
      }
      for (int c = 0; c < segment.count; c++)
        to(t, c) =
            (from[((int64_t)(c / 4) * STRIDE + t) * 4 + c % 4] - middle) * (scale_of ? scale_of[t] : 1) * scale[c] +
            zero[c];
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
    columns.quads = used / 4;
    columns.first_float = used;
    columns.floats = side.columns[group] - used;
    columns.scale.assign(used, 0);
    columns.centre.assign(used, 0);
    columns.middle.assign(used, 0);
    columns.variance.assign(used, 0);
    scales.assign((size_t)std::max(1, n) * 2 * STRIDE, 0);
    key_scales.assign(STRIDE, 1);
    columns.token_scale = side.token_scale ? key_scales.data() : nullptr;
    for (int i = 0; i < n; i++) {
      const Segment& segment = side.segments[s0 + i];
      const Part& part = side.parts[segment.part];
      const float middle = (part.levels - 1) * 0.5f;
      const float variance = (part.levels * part.levels - 1) / 12.0f;
      for (int c = 0; c < round_up(segment.count, 4); c++) {
        columns.middle[segment.position + c] = middle;
        columns.variance[segment.position + c] = variance;
      }
      columns.all_variance += segment.count * variance;
      columns.code_sum += (int64_t)segment.count * (part.levels - 1);
      const float* scale = &scales[(size_t)i * 2 * STRIDE];
      if (segment.column >= 0)
        columns.groups.push_back(
            {segment.position / 4, (segment.position + round_up(segment.count, 4)) / 4, scale, scale + STRIDE, middle});
    }
    codes.resize((size_t)(2 * code_columns() + 16) * STRIDE);
    column_numbers.assign((size_t)std::max(1, std::max(columns.floats, a.exact_width)) * STRIDE, 0);
  }

  void attend_batch(const std::vector<Chunk>& batch) {
    const int64_t anchor = batch[0].position;
    int n = 0;
    for (const Chunk& chunk : batch) n += chunk.count;
    expansion.move(anchor);
    const bool by_block = a.keys.by_block;
    if (!nodes_are_rounded || rounded_anchor != anchor) nodes_are_rounded = false;
    auto round = [&] {
      if (division.fast && (by_block || !fast_is_rounded))
        round_weights(expansion.fast.data(), expansion.fast_lanes, columns, a.planes, fast);
      if (division.nodes && (by_block || !nodes_are_rounded))
        round_weights(expansion.nodes.data(), expansion.node_lanes, columns, a.planes, nodes);
      fast_is_rounded = nodes_are_rounded = true;
      rounded_anchor = anchor;
    };
    if (by_block) {
      int offset = 0;
      for (const Chunk& chunk : batch)
        for (int first = chunk.first; first < chunk.first + chunk.count;) {
          const int last = std::min(chunk.first + chunk.count, (first / a.keys.run + 1) * a.keys.run);
          load_keys(chunk, first, last - first, 0, true);
          round();
          score_span(expansion, last - first, offset, scores.data());
          offset += last - first;
          first = last;
        }
    } else {
      int to = 0;
      for (const Chunk& chunk : batch) {
        load_keys(chunk, chunk.first, chunk.count, to, !fast_is_rounded);
        to += chunk.count;
      }
      round();
      score_span(expansion, n, 0, scores.data());
    }
    weigh(n, anchor);
    int from = 0;
    for (const Chunk& chunk : batch) {
      add_values(chunk, from);
      from += chunk.count;
    }
  }

  // Scores of n tokens from `position` on become probabilities, relative to the highest score so far.
  void weigh(int n, int64_t position) {
    const int value_stride = round_up(a.values.width, 16), exact_stride = round_up(a.output_width, 16);
    for (int j = 0; j < queries; j++) {
      float* score = &scores[(size_t)j * (SPAN + 16)];
      const int64_t seen = std::min<int64_t>(n, query_position[j] - position + 1);
      for (int t = std::max<int64_t>(0, seen); t < round_up(n, 16); t++) score[t] = -INFINITE;
      vf high = set1(-INFINITE);
      for (int t = 0; t < n; t += 16) high = max(high, load(score + t));
      const float higher = std::max(highest[j], maximum(high));
      if (higher == -INFINITE) {
        std::fill(score, score + round_up(n, 16), 0.0f);
        continue;
      }
      if (higher > highest[j]) {
        const float decay = highest[j] == -INFINITE ? 0 : std::exp(highest[j] - higher);
        for (int c = 0; c < value_stride; c++) sums[(size_t)j * value_stride + c] *= decay;
        for (int c = 0; c < exact_stride; c++) exact_sums[(size_t)j * exact_stride + c] *= decay;
        total[j] *= decay;
        highest[j] = higher;
      }
      vf sum_ = set1(0);
      for (int t = 0; t < n; t += 16) {
        const vf p = exp_negative(sub(load(score + t), set1(higher)));
        store(score + t, p);
        sum_ = add(sum_, p);
      }
      // Unseen tokens have been weighed as e^-87.
      for (int t = std::max<int64_t>(0, seen); t < round_up(n, 16); t++) score[t] = 0;
      total[j] += sum(sum_);
    }
  }

  // Where the zeros behind n rounded probabilities end: not before the end of the last word of any layout.
  static int rounded_end(int n) { return std::min(ROUNDED, round_up(n, 16) + 32); }

  // Round the probabilities times `scale` (null: 1) of tokens [from, from + n) to integers, in `steps` of each query;
  // `plain`: the sum of the probabilities times `zero` (null: 1); `scaled`: that of the probabilities times `scale`.
  void round_probabilities(int from, int n, const float* scale, const float* zero) {
    integers.resize((size_t)queries * ROUNDED);
    steps.resize(queries);
    plain.resize(queries);
    scaled.resize(queries);
    packed_high.resize((size_t)queries * PACKED);
    packed_low.resize((size_t)queries * PACKED);
    const int end = rounded_end(n);
    for (int j = 0; j < queries; j++) {
      const float* p = &scores[(size_t)j * (SPAN + 16) + from];
      alignas(64) float x[ROUNDED], z[ROUNDED];
      std::fill(x + n, x + end, 0.0f);
      std::fill(z + n, z + end, 0.0f);
      for (int t = 0; t < n; t++) x[t] = scale ? p[t] * scale[t] : p[t];
      for (int t = 0; t < n; t++) z[t] = zero ? p[t] * zero[t] : p[t];
      vf high = set1(1e-37f), total_ = set1(0), scaled_ = set1(0);
      for (int t = 0; t < n; t += 16) {
        high = max(high, load(x + t));
        total_ = add(total_, load(z + t));
        scaled_ = add(scaled_, load(x + t));
      }
      scaled[j] = sum(scaled_);
      steps[j] = maximum(high) / 32512;
      plain[j] = sum(total_);
      const vf inverse = set1(1 / steps[j]);
      int32_t* out = &integers[(size_t)j * ROUNDED];
      for (int t = 0; t < end; t += 16) storei(out + t, to_int(mul(load(x + t), inverse)));
    }
  }

  // The rounded probabilities as bytes in the order of a layout: [query][word * fields + i], four to a lane. The first
  // token is the `lead`th of its word.
  void arrange(Layout layout, int lead, int n) {
    const int words = layout.words(lead + n), fields = layout.fields, tokens = 4 * fields, end = rounded_end(n);
    for (int j = 0; j < queries; j++) {
      const int32_t* p = &integers[(size_t)j * ROUNDED];
      alignas(64) uint8_t high[ROUNDED + 32], low[ROUNDED + 32];
      memset(high, 0, lead);
      memset(low, 0, lead);
      for (int t = 0; t < end; t++) {
        high[lead + t] = (p[t] + 128) >> 8;
        low[lead + t] = p[t];
      }
      uint8_t* to_high = (uint8_t*)&packed_high[(size_t)j * PACKED];
      uint8_t* to_low = (uint8_t*)&packed_low[(size_t)j * PACKED];
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
            to_high[to] = high[from];
            to_low[to] = low[from];
          }
    }
  }

  // Sum of rounded probability times code, for 16 channels and J queries from `query` on.
  template <int BITS, int J>
  INLINE inline void sum_codes(const Part& part, const int32_t* words, int n, int channel, int count, int query,
                               vi (&out)[J]) {
    constexpr int fields = BITS == TERNARY ? 5 : 8 / BITS;
    vi high[J], low[J];
    each<J>([&](auto j) INLINE { high[j] = low[j] = seti(0); });
    const int n_words = (n + 4 * fields - 1) / (4 * fields);
    const uint32_t* weights_high = &packed_high[(size_t)query * PACKED];
    const uint32_t* weights_low = &packed_low[(size_t)query * PACKED];
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
  void add_codes(const Part& part, const int32_t* words, int n, int channel, int count, float weight,
                 const float* scale, const float* zero, const float* first_level, float* out, int stride) {
    auto finish = [&](vi total_, int j) INLINE {
      float* to = out + (size_t)j * stride;
      vf y = fma(mul(to_float(total_), set1(steps[j] * weight)), load(scale), load(to));
      if (zero) y = fma(load(zero), set1(plain[j]), y);
      if (first_level) y = fma(load(first_level), set1(scaled[j]), y);
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
      alignas(64) float own_scale[SPAN];
      const float* scale_of = side.token_scale ? own_scale : nullptr;
      if (scale_of) token_scales(side, value_group, chunk.slot, first, n, own_scale);
      bool rounded = false;
      int arranged = 0;
      for (int i = s0; i < s1; i++) {
        const Segment& segment = side.segments[i];
        const Part& part = side.parts[segment.part];
        if (i - s0 >= side.integers[value_group]) {
          add_numbers(part, chunk.slot, first, n, at, segment, scale_of, stride);
          continue;
        }
        const Run run = run_of(part, chunk.slot, first);
        alignas(64) float token_scale[SPAN], token_zero[SPAN];
        if (segment.column >= 0) {
          token_parameters(part, chunk.slot, first, n, segment.column, false, token_scale, token_zero);
          round_probabilities(at, n, token_scale, token_zero);
          rounded = false;
          arranged = 0;
        } else if (!rounded) {
          round_probabilities(at, n, scale_of, nullptr);
          rounded = true;
          arranged = 0;
        }
        Plane planes[2];
        const int n_planes = planes_of(part.bits, run.length, planes);
        for (int p = n_planes - 1; p >= 0; p--) {
          const Layout layout = planes[p].layout;
          const int lead = (first - run.start) % (4 * layout.fields);
          if (arranged != layout.bits) {
            arrange(layout, lead, n);
            arranged = layout.bits;
          }
          const int first_word = planes[p].first_word + (first - run.start) / (4 * layout.fields);
          const int32_t* words = run.words + (int64_t)first_word * part.token_stride;
          for (int c = 0; c < segment.count; c += 16) {
            const int left = std::min(16, segment.count - c);
            alignas(64) float scale[16], zero[16], first_level[16];
            for (int k = 0; k < 16; k++) scale[k] = zero[k] = 1;
            if (segment.column < 0)
              parameters(part, chunk.slot, first / part.run, segment.channel + c, left, scale_of, scale, zero);
            for (int k = left; k < 16; k++) scale[k] = zero[k] = 0;
            // Beside the middles, which have the probabilities themselves, stand the levels relative to them.
            for (int k = 0; k < 16; k++) first_level[k] = -0.5f * (part.levels - 1) * scale[k];
            with_bits(layout.bits, [&](auto bits) {
              add_codes<bits>(part, words, lead + n, segment.channel + c, left, 1 << planes[p].shift, scale,
                              p ? nullptr : zero, p || !scale_of ? nullptr : first_level, &sums[segment.position + c],
                              stride);
            });
          }
        }
      }
      first = last;
    }
  }

  // Values that are not multiplied as codes.
  void add_numbers(const Part& part, int slot, int first, int n, int at, const Segment& segment, const float* scale_of,
                   int stride) {
    const int width = round_up(segment.count, 16);
    value_numbers.resize((size_t)n * width);
    if (part.bits == 16) {
      for (int t = 0; t < n; t++)
        numbers(part.packed, slot * part.slot_stride + (first + t) * part.token_stride + segment.channel, segment.count,
                a.state_type, &value_numbers[(size_t)t * width]);
    } else {
      const Run run = run_of(part, slot, first);
      std::vector<uint8_t> bytes((size_t)width * STRIDE);
      unpack(part, run.words, run.length, first - run.start, n, segment.channel, segment.count, bytes.data(), STRIDE);
      dequantize(part, slot, first, n, segment, scale_of, bytes.data(),
                 [&](int t, int c) -> float& { return value_numbers[(size_t)t * width + c]; });
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

  void attend_exact(const Exact& exact) {
    const int channels = a.key_count[group], value_channels = a.value_count[value_group];
    columns = Columns();
    columns.last = a.exact_width;
    columns.floats = channels;
    column_numbers.assign((size_t)std::max(1, a.exact_width) * STRIDE, 0);
    for (int first = 0; first < exact.count[row]; first += SPAN) {
      const int n = std::min(SPAN, exact.count[row] - first);
      const int64_t position = exact.start[row] + first;
      exact_expansion.move(position);
      fast.lanes = exact_expansion.fast_lanes;
      nodes.lanes = exact_expansion.node_lanes;
      for (int t = 0; t < n; t++) {
        const int64_t at = row * exact.key_row + (first + t) * exact.key_token + a.key_start[group];
        for (int c = 0; c < channels; c++)
          column_numbers[(size_t)c * STRIDE + t] = number(exact.keys, at + c, a.state_type);
      }
      score_span(exact_expansion, n, 0, scores.data());
      weigh(n, position);
      const int width = round_up(value_channels, 16);
      value_numbers.resize((size_t)n * width);
      for (int t = 0; t < n; t++)
        numbers(exact.values, row * exact.value_row + (first + t) * exact.value_token + a.value_start[value_group],
                value_channels, a.state_type, &value_numbers[(size_t)t * width]);
      accumulate(n, 0, width, exact_sums.data(), round_up(a.output_width, 16));
    }
  }

  // Start to read the words of a head group in a block, while the block before it is computed.
  void prefetch_block(const Side& side, int of, int slot) const {
    for (int i = side.first_segment[of]; i < side.first_segment[of + 1]; i++) {
      const Segment& segment = side.segments[i];
      const Part& part = side.parts[segment.part];
      const int size = part.bits == 16 && a.state_type != FLOAT32 ? 2 : 4;
      for (int w = 0; w < part.words; w++) {
        const int64_t first = slot * part.slot_stride + w * part.token_stride + segment.channel;
        prefetch<_MM_HINT_T0>((const char*)part.packed + first * size, (int64_t)segment.count * size);
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
      batch.clear();
      tokens = 0;
    };
    for (int i = first; i < last; i++) {
      const int count = table[2 * plane + i];
      if (i + 1 < last) {
        prefetch_block(a.keys, group, table[i + 1]);
        prefetch_block(a.values, value_group, table[i + 1]);
      }
      for (int t = 0; t < count; t += SPAN) {
        const Chunk chunk = {table[i], t, std::min(SPAN, count - t), (int64_t)table[plane + i] + t};
        // Tokens of a batch are at consecutive positions.
        if (tokens && (tokens + chunk.count > SPAN || batch[0].position + tokens != chunk.position)) flush();
        batch.push_back(chunk);
        tokens += chunk.count;
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
      out[a.output_width] = highest[j];
      out[a.output_width + 1] = total[j];
    }
  }
};

}  // namespace

extern "C" int alrd_attention(const Arguments* arguments) {
  const Arguments& a = *arguments;
  const int shared = a.query_heads / a.heads, queries = shared * a.length;
  // Splits of the sequence, so that few heads keep all threads busy.
  const int heads = a.batch * a.heads;
  int splits = 1;
  if (heads % a.threads) splits = std::min<int>(ceil_div(4 * a.threads, heads), std::max(1, a.blocks / 4));
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
      const int64_t to = ((int64_t)b * a.query_heads + q_head) * a.length + l;
      const float* parts = &partial[(size_t)head * splits * share + j * width];
      float* out = a.output + to * a.output_width;
      a.log_sum[to] = merge_splits(parts, splits, share, a.output_width, [](float x) { return std::exp(x); }, out);
    }
  }
  return 0;
}

// Whether codes of 8 bits can be multiplied as such.
extern "C" int alrd_takes_bytes() { return ALRD_AVX512; }
