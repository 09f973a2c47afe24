// Attention of a few new tokens over packed latents; `modules/kernels/attention.py` is the reference.
//
// Work is divided into items: a row of the batch, key heads that share their latents (at most MOST_HEADS), a share of
// the row's blocks. An item goes over its tokens in batches of at most SPAN, and for each
//   1. unpacks the key codes of TILE tokens to bytes, four channels of a token side by side;
//   2. multiplies them with the expansion rows that the queries of each head ask for, and gets scores; so tile by tile;
//   3. updates the running softmax, and sums up the value codes weighted by the probabilities of all queries.
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
// The arithmetic. Expansion rows are scaled by the block's scales and rounded to 8 bits, or to 16 where `planes` is 2.
// A column of such weight that with it 8 bits would lose more than LIMIT of a row has 16 bits (two products) too. Codes
// are exact, minus their middle level; products are summed up exactly. Probabilities are rounded to 15 bits. Numbers
// that are not codes (16 bits, sinks, window, float32 models) are multiplied in float32.

#include "arguments.h"
#include "expansion.h"
#include "heads.h"

namespace {

// A piece of a block: tokens [first, first + count), at `position`.
struct Chunk {
  int slot, first, count;
  int64_t position;
};

// Tokens [first, first + count) of a run of a block, the first of them token `at` of the batch.
struct Piece {
  int slot, first, count, at;
};

// The words of a piece in a plane, and where the probabilities of their tokens stand.
struct Words {
  const int32_t* first;
  int count, weights;
};

// What is prefetched together, at most READ bytes.
constexpr int READ = 256;
struct Read {
  const char* first;
  int bytes;
};

// Columns whose channels follow each other, which are read together.
struct Stretch {
  int column, channel, count;
};

// First position that a query of a row sees.
int64_t first_seen(const Arguments& a, int row) {
  const int64_t* positions = a.positions + (int64_t)row * a.length;
  return *std::min_element(positions, positions + a.length) - a.window + 1;
}

// Blocks at the start of a row that none of its queries sees.
int unseen_blocks(const Arguments& a, int row) {
  const int32_t *start = a.table + ((int64_t)a.batch + row) * a.blocks, *count = start + (int64_t)a.batch * a.blocks;
  const int64_t seen = first_seen(a, row);
  int n = 0;
  while (n < a.blocks && count[n] && start[n] + count[n] <= seen) n++;
  return n;
}

constexpr float LN2 = 0.693147181f;
constexpr int MOST_HEADS = 8;  // whose expansion rows stay in the cache side by side
constexpr int FEW = 64;        // tokens in full precision

// The scales of tokens by their bytes (`decode_token_scale` of modules/quant_utils.py).
struct TokenScales {
  float of[256];
  TokenScales() {
    for (int i = 0; i < 256; i++) of[i] = (float)std::exp2((i - 128) / 16.0);
  }
};

const TokenScales TOKEN_SCALES;

// A key head of an item.
struct Head {
  Floats weight, exact_weight;  // of its expansion; none where rows are only rounded, or multiplied once
  Floats turned;                // `weight` as `round_rows` takes it, [columns + 1][lanes], for scales of blocks
  ExpansionRows expansion, exact_expansion;
  Rounded fast, nodes;
  std::vector<float> query;  // [half][2][queries], rotated to the reference
};

struct Worker {
  const Arguments& a;
  const Division &division, &exact_division;
  std::vector<Head> heads;
  Bytes codes;  // [quad][code_stride] with four channels each, from `first_code` on
  std::vector<float> column_numbers, scores, tile_scores, scales, key_scales;
  Columns columns;
  std::vector<float> sums, exact_sums, highest, total;  // values [query][column], [query][channel]; softmax
  std::vector<uint8_t> high_bytes, low_bytes;           // of the probabilities, rounded [query][token]
  std::vector<uint32_t> packed_high, packed_low;        // four to a lane, in the order of a layout [query][packed]
  std::vector<Words> piece_words;
  int packed = 0;
  std::vector<float> steps, plain, scaled, value_numbers;
  std::vector<uint8_t> points;  // of a trellis, as `codes`
  // Whether values are the keys' codes, of which all those of a batch are kept; and the first of the tile.
  bool shares_codes = false;
  int code_stride = STRIDE, first_code = 0;
  // Queries of a head, and of all heads of the item: [head][query].
  int row = -1, first_head = -1, group = 0, value_group = 0, queries = 0, all_queries = 0;
  std::vector<Read> next_reads;  // of the next batch, of which so many are prefetched
  size_t prefetched = 0;
  float due = 0, at_a_time = 0;  // how many should be, and how many more each time
  bool fast_is_rounded = false, nodes_are_rounded = false;
  bool exact_is_expanded = false, exact_is_started = false, is_exact = false;
  int64_t rounded_anchor = 0, reference = 0;  // `reference`: position to which the queries are rotated
  std::vector<int64_t> query_position;
  std::vector<Stretch> stretches;
  Floats some_rows;  // of the expansion for tokens in full precision
  // By tile registers: such tokens as pairs of bfloat16 [channels / 2][TILE], and a head's keys [2 half][TILE].
  std::vector<uint32_t> exact_pairs;
  Floats exact_keys;
  Integers products;  // of a tile's codes with 16 expansion rows, [2][16][TILE]

  Worker(const Arguments& arguments, const Division& d, const Division& e)
      : a(arguments), division(d), exact_division(e) {}

  void start(int row_, int first_head_, int n_heads) {
    if (row != row_ || first_head != first_head_) start_heads(row_, first_head_, n_heads);
    for (Head& head : heads) head.expansion.restart();
    nodes_are_rounded = false;
    sums.assign((size_t)all_queries * round_up(a.values.width, 16), 0);
    exact_sums.assign((size_t)all_queries * round_up(a.output_width, 16), 0);
    highest.assign(all_queries, -INFINITE);
    total.assign(all_queries, 0);
  }

  void start_heads(int row_, int first_head_, int n_heads) {
    // What does not depend on the queries is there already if only the row is another one.
    const bool other_heads = first_head != first_head_ || (int)heads.size() != n_heads;
    row = row_;
    first_head = first_head_;
    group = first_head * a.keys.groups / a.heads;
    value_group = first_head * a.values.groups / a.heads;
    const int shared = a.query_heads / a.heads;
    queries = shared * a.length;
    all_queries = n_heads * queries;
    heads.resize(n_heads);
    if (a.blocks && other_heads) {
      set_columns();
      stretches = key_stretches();
    }
    query_position.resize(all_queries);
    reference = 0;
    const int64_t* positions = a.positions + (int64_t)row * a.length;
    for (int l = 0; l < a.length; l++) reference = std::max(reference, positions[l]);
    // All heads turn alike.
    std::vector<double> cosine((size_t)a.length * a.half), sine(cosine.size());
    for (int l = 0; l < a.length; l++)
      for (int f = 0; f < a.half; f++) {
        const double angle = a.frequency[f] * (double)(positions[l] - reference);
        cosine[(size_t)l * a.half + f] = std::cos(angle) * a.scaling;
        sine[(size_t)l * a.half + f] = std::sin(angle) * a.scaling;
      }
    for (int h = 0; h < n_heads; h++) {
      std::vector<float> query((size_t)a.half * 2 * queries);
      for (int j = 0; j < queries; j++) {
        const int l = j % a.length, q_head = (first_head + h) * shared + j / a.length;
        query_position[h * queries + j] = positions[l];
        const float* q = a.query + (((int64_t)row * a.query_heads + q_head) * a.length + l) * 2 * a.half;
        for (int f = 0; f < a.half; f++) {
          const double c = cosine[(size_t)l * a.half + f], s = sine[(size_t)l * a.half + f];
          const float q1 = q[a.order[f]], q2 = q[a.half + a.order[f]];
          query[(size_t)f * 2 * queries + j] = q1 * c - q2 * s;
          query[((size_t)f * 2 + 1) * queries + j] = q2 * c + q1 * s;
        }
      }
      Head& head = heads[h];
      if (other_heads) {
        if (a.blocks) {
          head.weight.clear();
          if (!rounds_once()) {
            expand(first_head + h, a.keys.width, stretches, head.weight);
            if (!a.keys.by_block) scale_weights(head.weight.data());
            if (a.keys.by_block && !has_tiles()) turn_weights(head);
          }
          head.expansion.of(division, a.frequency, head.weight.data(), a.keys.width, queries);
        }
      }
      if (a.blocks) head.expansion.start(reference, query);
      head.query = std::move(query);
    }
    if (other_heads) exact_is_expanded = false;
    exact_is_started = false;
    scores.resize((size_t)all_queries * (SPAN + 16));
    tile_scores.resize((size_t)all_queries * TILE);
    if (other_heads) fast_is_rounded = false;
  }

  // The heads' expansion for tokens in full precision, which only an item's first split has.
  void start_exact() {
    for (size_t h = 0; h < heads.size(); h++) {
      Head& head = heads[h];
      if (!exact_is_expanded) {
        head.exact_weight.clear();
        if (exact_division.nodes) expand(first_head + h, a.exact_width, exact_stretch(), head.exact_weight);
        head.exact_expansion.of(exact_division, a.frequency, head.exact_weight.data(), a.exact_width, queries);
      }
      if (!exact_is_started) head.exact_expansion.start(reference, head.query);
    }
    exact_is_expanded = exact_is_started = true;
  }

  // The stretches of the packed keys' columns.
  std::vector<Stretch> key_stretches() const {
    std::vector<Stretch> found;
    const int32_t* channel = a.key_channel + (int64_t)group * a.keys.width;
    for (int c = 0; c < a.keys.width; c++) {
      if (channel[c] < 0) continue;
      if (!found.empty() && found.back().column + found.back().count == c &&
          found.back().channel + found.back().count == channel[c])
        found.back().count++;
      else
        found.push_back({c, channel[c], 1});
    }
    return found;
  }

  // Row 2 f + i of a head's expansion, whose last column is the bias. What is written goes on to a whole vector.
  void expand_row(int head, int row, int width, const std::vector<Stretch>& stretches, float* to) const {
    const int dimension = row % 2 * a.half + a.order[row / 2];
    const int64_t r = (int64_t)head * 2 * a.half + dimension;
    int next = 0;
    for (const Stretch& stretch : stretches) {
      std::fill(to + next, to + stretch.column, 0.0f);
      next = stretch.column + stretch.count;
      if (a.weight)
        numbers(a.weight, r * a.weight_stride + stretch.channel, stretch.count, a.weight_type, to + stretch.column);
      else
        for (int c = 0; c < stretch.count; c++) to[stretch.column + c] = stretch.channel + c == dimension;
    }
    std::fill(to + next, to + width, 0.0f);
    to[width] = a.bias ? number(a.bias, r, a.weight_type) : 0;
  }

  // Weights of a head's expansion, [half][2][width + 1], then rows of zeros.
  void expand(int head, int width, const std::vector<Stretch>& stretches, Floats& out) const {
    const size_t rows = round_up(2 * round_up(a.half, 3), 16);  // what is read goes on to whole vectors
    out.resize(rows * (width + 1) + 16);
    for (int row = 0; row < 2 * a.half; row++)
      expand_row(head, row, width, stretches, out.data() + (size_t)row * (width + 1));
    std::fill(out.begin() + (size_t)2 * a.half * (width + 1), out.end(), 0.0f);
  }

  // Rows are rounded for every block: 16 of them side by side are faster than one after the other, but for tiles.
  void turn_weights(Head& head) const {
    const int width = a.keys.width + 1, lanes = round_up(2 * round_up(division.fast, division.together), 16);
    head.turned.resize((size_t)round_up(width, 16) * lanes);
    for (int c = 0; c < width; c += 16)
      for (int lane = 0; lane < lanes; lane += 16)
        transpose_words(&head.weight[(size_t)lane * width + c], width, &head.turned[(size_t)c * lanes + lane], lanes);
  }

  // The columns of tokens in full precision.
  std::vector<Stretch> exact_stretch() const { return {{0, 0, std::min<int>(a.key_count[group], a.exact_width)}}; }

  // Whether expansion rows are only rounded, once, and need not be kept as they are.
  bool rounds_once() const {
    return !a.keys.by_block && !division.nodes && columns.groups.empty() && columns.quads && !columns.floats;
  }

  // Calibrated scales go into the expansion rows, centres into their bias, once.
  void scale_weights(float* weight) const {
    const int width = a.keys.width, n = 4 * columns.quads;
    const float *scale = columns.scale.data(), *centre = columns.centre.data();
    for (int r = 0; r < 2 * a.half; r++, weight += width + 1) {
      vf of_centres = set1(0);
      int c = 0;
      for (; c + 16 <= n; c += 16) {
        const vf x = load(weight + c);
        of_centres = fma(x, load(centre + c), of_centres);
        store(weight + c, mul(x, load(scale + c)));
      }
      for (; c < n; c++) {
        weight[width] += weight[c] * centre[c];
        weight[c] *= scale[c];
      }
      weight[width] += sum(of_centres);
    }
  }

  static constexpr int STRIDE = TILE + 32;  // tokens of the buffers, and what is unpacked behind them

  // Rows [row, row + n) of the expansion of a head of the item for tokens in full precision.
  Lanes exact_rows(int head, int row, int n) {
    const std::vector<Stretch> all = exact_stretch();
    const int width = a.exact_width + 1;
    some_rows.resize((size_t)n * width + 16);
    for (int i = 0; i < n; i++) {
      if (row + i < 2 * a.half)
        expand_row(first_head + head, row + i, a.exact_width, all, &some_rows[(size_t)i * width]);
      else
        std::fill_n(&some_rows[(size_t)i * width], width, 0.0f);
    }
    return {some_rows.data(), width, 1};
  }

  // Whether keys of tokens in full precision are products of tile registers.
  bool exact_by_tiles() const {
    return ALRD_TILES && has_tiles() && !exact_division.nodes && a.weight && 2 * a.half % 16 == 0 &&
           a.weight_type == BFLOAT16 && a.state_type == BFLOAT16;
  }

#if ALRD_TILES
  // n tokens of an exact tile, at most TILE, from `first` on, as pairs.
  void load_pairs(const Exact& exact, int first, int n) {
    const int channels = a.key_count[group];
    exact_pairs.resize((size_t)round_up(channels, 32) / 2 * TILE);
    for (int t = 0; t < n; t += 16) {
      const uint16_t* tokens = (const uint16_t*)exact.keys + row * exact.key_row + a.key_start[group];
      for (int c = 0; c < channels; c += 32) {
        const __mmask32 held = channels - c < 32 ? (1u << (channels - c)) - 1 : ~0u;
        alignas(64) uint32_t words[16 * 16];
        for (int i = 0; i < 16; i++) {
          const int64_t token = first + std::min(t + i, n - 1);
          storei(words + 16 * i, _mm512_maskz_loadu_epi16(held, tokens + token * exact.key_token + c));
        }
        transpose_words(words, 16, &exact_pairs[(size_t)c / 2 * TILE + t], TILE);
      }
    }
  }

  // The keys of n tokens of the pairs for a head of the item, without their bias.
  void multiply_exact(int head, int n) {
    exact_keys.resize((size_t)2 * a.half * TILE);
    const uint16_t* rows = (const uint16_t*)a.weight + (int64_t)(first_head + head) * 2 * a.half * a.weight_stride;
    for (int r = 0; r < 2 * a.half; r += 16)
      (n > 32 ? multiply_pairs<4> : multiply_pairs<2>)(rows + r * a.weight_stride, a.weight_stride, a.key_count[group],
                                                       exact_pairs.data(), &exact_keys[(size_t)r * TILE]);
  }
#endif

  // Their rows for pairs from f on, and 16 V tokens.
  template <int M, int V>
  void load_exact(int head, int f, int token, vf (&k)[M][V]) const {
    each<M>([&](auto m) INLINE {
      const bool exists = 2 * f + m < 2 * a.half;
      const int dimension = exists ? m % 2 * a.half + a.order[f + m / 2] : 0;
      const float* keys = &exact_keys[(size_t)dimension * TILE + token];
      const vf bias =
          set1(a.bias ? number(a.bias, (int64_t)(first_head + head) * 2 * a.half + dimension, a.weight_type) : 0);
      each<V>([&](auto v) INLINE { k[m][v] = exists ? add(load(keys + 16 * v), bias) : set1(0); });
    });
  }

  // Whether the scores of a tile stay in registers while pair after pair is added to them: those of a few queries do,
  // where rows are multiplied by tiles.
  bool keeps_scores() const { return queries <= 4 && (is_exact ? exact_by_tiles() : takes_tiles()); }

  // Pairs that are rebuilt together for a tile of tokens.
  int pairs_together(const Division& d) const { return keeps_scores() ? 1 : d.together; }

  // Add to the scores of 16 V tokens what pairs [first, last) of a head give; KEPT: the queries, 0: any number.
  template <int V, int PAIRS, int KEPT>
  void score_pairs(int head, const ExpansionRows& rows, const Rounded& fast, const Tokens& tokens, int first, int last,
                   int token, int offset, float* out) {
    const Division& d = *rows.division;
    const float* q = &rows.fast_query[offset / TURN * (size_t)queries * 2 * rows.padded];
    vf kept[std::max(1, KEPT)][V];
    each<KEPT>([&](auto j) INLINE { each<V>([&](auto v) INLINE { kept[j][v] = load(out + j * TILE + 16 * v); }); });
    for (int f = first; f < last; f += PAIRS) {
      prefetch_next();
      vf k[2 * PAIRS][V];
      if (is_exact && exact_by_tiles()) {
        load_exact<2 * PAIRS, V>(head, f, token, k);
      } else {
        const bool is_kept = !is_exact || exact_division.nodes;
        const Lanes lanes = is_kept ? rows.fast().from(2 * f) : exact_rows(head, 2 * f, 2 * PAIRS);
        multiply<2 * PAIRS, V>(fast, lanes, columns, tokens, 2 * f, token, k);
      }
      each<PAIRS>([&](auto p) INLINE {
        const float* cosine = &d.cosine[(size_t)(f + p) * 2 * TURN + offset % TURN];
        const float* sine = &d.sine[(size_t)(f + p) * 2 * TURN + offset % TURN];
        each<V>([&](auto v) INLINE {
          const vf c = load(cosine + 16 * v), s = load(sine + 16 * v), x = k[2 * p][v];
          k[2 * p][v] = fnma(k[2 * p + 1][v], s, mul(x, c));
          k[2 * p + 1][v] = fma(x, s, mul(k[2 * p + 1][v], c));
        });
      });
      const auto add_query = [&](int j, vf(&sum)[V]) INLINE {
        each<PAIRS>([&](auto p) INLINE {
          const vf q1 = set1(q[(size_t)j * 2 * rows.padded + f + p]),
                   q2 = set1(q[((size_t)j * 2 + 1) * rows.padded + f + p]);
          each<V>([&](auto v) INLINE { sum[v] = fma(q2, k[2 * p + 1][v], fma(q1, k[2 * p][v], sum[v])); });
        });
      };
      each<KEPT>([&](auto j) INLINE { add_query(j, kept[j]); });
      for (int j = 0; j < queries && !KEPT; j++) {
        float* score = out + (size_t)j * TILE;
        vf sum[V];
        each<V>([&](auto v) INLINE { sum[v] = load(score + 16 * v); });
        add_query(j, sum);
        each<V>([&](auto v) INLINE { store(score + 16 * v, sum[v]); });
      }
    }
    each<KEPT>([&](auto j) INLINE { each<V>([&](auto v) INLINE { store(out + j * TILE + 16 * v, kept[j][v]); }); });
  }

  // The same of lanes [first, last) of the nodes.
  template <int V>
  void score_nodes(const ExpansionRows& rows, const Rounded& nodes, const Tokens& tokens, int first, int last,
                   int token, int offset, float* out) {
    for (int lane = first; lane < last; lane += 4) {
      prefetch_next();
      vf y[4][V];
      multiply<4, V>(nodes, rows.node_rows().from(lane), columns, tokens, lane, token, y);
      each<4>([&](auto m) INLINE {
        if (lane + m >= last) return;
        float* score = out + (size_t)((lane + m) % queries) * TILE;
        const float* weight = &rows.division->lagrange[(size_t)((lane + m) / queries) * 2 * SPAN + offset];
        each<V>([&](auto v)
                    INLINE { store(score + 16 * v, fma(load(weight + 16 * v), y[m][v], load(score + 16 * v))); });
      });
    }
  }

  // Which `score_pairs` it is.
  template <int V>
  auto scorer(const Division& d) const {
    if constexpr (V == 4) {
      if (keeps_scores() && queries == 1) return &Worker::score_pairs<V, 1, 1>;
      if (keeps_scores() && queries == 2) return &Worker::score_pairs<V, 1, 2>;
      if (keeps_scores() && queries == 3) return &Worker::score_pairs<V, 1, 3>;
      if (keeps_scores()) return &Worker::score_pairs<V, 1, 4>;
    }
    return d.together == 2 ? &Worker::score_pairs<V, 2, 0> : &Worker::score_pairs<V, 3, 0>;
  }

  // Whether the products of the codes are those of tile registers.
  bool takes_tiles() const { return has_tiles() && columns.groups.empty() && columns.quads; }

  // Scores of the n tokens of the buffers, at most TILE, whose offsets from the anchor of the heads' `rows` start at
  // `offset`.
  void score_tile(ExpansionRows Head::* member, int n, int offset) {
    const bool by_tiles = takes_tiles();
    products.resize(2 * 16 * TILE);
    const Tokens tokens = {first_code_of(0), column_numbers.data(), code_stride, STRIDE,
                           by_tiles ? products.data() : nullptr};
    std::fill(tile_scores.begin(), tile_scores.end(), 0.0f);
    float* out = tile_scores.data();
    for (size_t h = 0; h < heads.size(); h++, out += (size_t)queries * TILE) {
      const Head& head = heads[h];
      const ExpansionRows& rows = head.*member;
      const Division& d = *rows.division;
#if ALRD_TILES
      if (is_exact && exact_by_tiles()) multiply_exact(h, n);
#endif
      const int n_lanes = d.nodes * queries, step = n > 32 ? TILE : 16;
      const auto score_pairs_ = n > 32 ? scorer<4>(d) : scorer<1>(d);
      const auto score_nodes_ = n > 32 ? &Worker::score_nodes<4> : &Worker::score_nodes<1>;
      // All lanes, or 16 at a time, whose products stay in the first cache.
      const int lanes = by_tiles ? 16 : std::max(2 * d.half, n_lanes);
      for (int f = 0; f < d.fast; f += lanes / 2) {
        if (by_tiles) multiply_lanes(head.fast, f / 8, n);
        for (int t = 0; t < n; t += step)
          (this->*score_pairs_)(h, rows, head.fast, tokens, f, std::min(f + lanes / 2, d.fast), t, offset + t, out + t);
      }
      for (int lane = 0; lane < n_lanes; lane += lanes) {
        if (by_tiles) multiply_lanes(head.nodes, lane / 16, n);
        for (int t = 0; t < n; t += step)
          (this->*score_nodes_)(rows, head.nodes, tokens, lane, std::min(lane + lanes, n_lanes), t, offset + t,
                                out + t);
      }
    }
    for (int j = 0; j < all_queries; j++)
      memcpy(&scores[(size_t)j * (SPAN + 16) + offset], &tile_scores[(size_t)j * TILE], 4 * n);
  }

  // The products of 16 lanes with the codes of n tokens of the buffers.
  void multiply_lanes(const Rounded& rounded, int lanes, int n) {
#if ALRD_TILES
    const auto multiply = n > 32 ? multiply_rows<4> : multiply_rows<2>;
    const int8_t *low = (const int8_t*)rounded.tiles.data(), *high = (const int8_t*)rounded.high_tiles.data();
    const size_t first = (size_t)lanes * rounded.steps * 1024;
    multiply(low + first, rounded.steps, first_code_of(0), 4 * code_stride, products.data());
    if (rounded.high_steps[lanes])
      multiply(high + first, rounded.high_steps[lanes], first_code_of(0), 4 * code_stride, &products[16 * TILE]);
#endif
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
    const uint8_t* codes_ = side.token_scale + slot * side.token_scale_stride + (int64_t)first * side.groups + of;
    for (int t = 0; t < n; t++) to[t] = TOKEN_SCALES.of[codes_[(int64_t)t * side.groups]];
  }

  // Scales and centres of a segment's columns, in the run of token `first` of a block.
  void load_scales(const Segment& segment, int slot, int first) {
    const Part& part = a.keys.parts[segment.part];
    float* scale = &columns.scale[segment.position];
    parameters(part, slot, first / part.run, segment.channel, segment.count, true, scale,
               &columns.centre[segment.position]);
    for (int c = 0; c < segment.count; c++) scale[c] /= 1 << code_shift(part.levels);
  }

  // Fill the buffers with tokens of a block, from buffer token `to` on.
  void load_keys(int slot, int first, int n, int to) {
    const Side& side = a.keys;
    const int s0 = side.first_segment[group], s1 = side.first_segment[group + 1];
    if (side.token_scale) token_scales(side, group, slot, first, n, &key_scales[to]);
    const float* scale_of = side.token_scale ? &key_scales[to] : nullptr;
    for (int i = s0; i < s1; i++) {
      const Segment& segment = side.segments[i];
      const Part& part = side.parts[segment.part];
      if (part.bits == 16) {
        load_states(part, slot, first, n, segment, to);
        continue;
      }
      const Run run = run_of(part, slot, first);
      const bool as_codes = i - s0 < side.integers[group];
      uint8_t* to_codes = first_code_of(as_codes ? segment.position : code_columns()) + 4 * to;
      const int shift = as_codes ? code_shift(part.levels) : 0;
      unpack(part, run.words, run.length, first - run.start, n, segment.channel, segment.count, to_codes, code_stride,
             shift);
      if (as_codes && segment.column < 0 && side.by_block) load_scales(segment, slot, first);
      if (as_codes && segment.column >= 0) load_token_scales(part, slot, first, n, segment, i - s0, to);
      if (!as_codes)
        dequantize(part, slot, first, n, segment, scale_of, to_codes, code_stride, [&](int t, int c) -> float& {
          return column_numbers[(size_t)(segment.position - columns.first_float + c) * STRIDE + to + t];
        });
    }
  }

  int code_columns() const { return round_up(a.keys.width, 4); }

  // The tile's codes of the four columns from `column` on.
  uint8_t* first_code_of(int column) { return codes.data() + ((int64_t)(column / 4) * code_stride + first_code) * 4; }

  // Whether the values are stored as the keys, all as codes with calibrated scales.
  bool values_are_keys() const {
    const Side &keys = a.keys, &values = a.values;
    const int k0 = keys.first_segment[group], v0 = values.first_segment[value_group], n = keys.integers[group];
    if (!ALRD_AVX512 || keys.by_block || values.by_block || values.token_scale != keys.token_scale) return false;
    if (keys.first_segment[group + 1] - k0 != n || values.first_segment[value_group + 1] - v0 != n) return false;
    for (int i = 0; i < n; i++) {
      const Segment &key = keys.segments[k0 + i], &value = values.segments[v0 + i];
      if (keys.parts[key.part].packed != values.parts[value.part].packed || key.channel != value.channel ||
          key.count != value.count || key.column >= 0)
        return false;
    }
    return true;
  }

  // Scale and centre of n tokens in a scale group, for `Columns::groups`.
  void load_token_scales(const Part& part, int slot, int first, int n, const Segment& segment, int index, int to) {
    float *scale = &scales[(size_t)index * 2 * STRIDE + to], *centre = scale + STRIDE;
    token_parameters(part, slot, first, n, segment.column, true, scale, centre);
    for (int t = 0; t < n; t++) scale[t] /= 1 << code_shift(part.levels);
  }

  // Numbers of n tokens from `first` on of a block, from their unpacked codes and, if `scale_of` is not null, their own
  // scales; `to(t, c)`: where a channel's goes.
  template <class To>
  void dequantize(const Part& part, int slot, int first, int n, const Segment& segment, const float* scale_of,
                  const uint8_t* from, int stride, To to) {
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
            (from[((int64_t)(c / 4) * stride + t) * 4 + c % 4] - middle) * (scale_of ? scale_of[t] : 1) * scale[c] +
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

  // The columns of the item's packed keys.
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
    columns.scaled = side.by_block;
    columns.scale.assign(round_up(used, 64), 1);
    columns.centre.assign(round_up(used, 64), 0);
    columns.twice_middle.assign(round_up(used, 64), 0);
    columns.variance.assign(round_up(used, 64), 0);
    scales.assign((size_t)std::max(1, n) * 2 * STRIDE, 0);
    key_scales.assign(STRIDE, 1);
    columns.token_scale = side.token_scale ? key_scales.data() : nullptr;
    for (int i = 0; i < n; i++) {
      const Segment& segment = side.segments[s0 + i];
      const Part& part = side.parts[segment.part];
      const int shift = code_shift(part.levels), largest = (part.levels - 1) << shift;
      const float variance = (part.levels * part.levels - 1) / 12.0f * (1 << 2 * shift);
      for (int c = 0; c < round_up(segment.count, 4); c++) {
        columns.twice_middle[segment.position + c] = largest;
        columns.variance[segment.position + c] = variance;
      }
      columns.all_variance += segment.count * variance;
      columns.code_sum += (int64_t)segment.count * largest;
      const float* scale = &scales[(size_t)i * 2 * STRIDE];
      if (segment.column < 0 && !side.by_block) load_scales(segment, 0, 0);
      if (segment.column >= 0)
        columns.groups.push_back({segment.position / 4, (segment.position + round_up(segment.count, 4)) / 4, scale,
                                  scale + STRIDE, largest * 0.5f});
    }
    shares_codes = values_are_keys();
    code_stride = shares_codes ? SPAN + 32 : STRIDE;
    codes.resize((size_t)(2 * code_columns() + 64) * code_stride);  // tiles are multiplied whole
    column_numbers.resize((size_t)round_up(std::max(1, std::max(columns.floats, a.exact_width)), 16) * STRIDE);
  }

  // Round the expansion rows of a head's fast pairs.
  void round_fast(Head& head) {
    const int rows = 2 * division.fast, together = 2 * division.together, width = a.keys.width + 1;
    const int lanes = head.expansion.fast_lanes;
    if (head.weight.empty()) {
      const int number = first_head + (&head - heads.data());
      round_lanes<true>([&](int row, float* to) { expand_row(number, row, a.keys.width, stretches, to); }, rows, lanes,
                        together, columns, a.planes, head.fast);
      return;
    }
    if (a.keys.by_block && !has_tiles()) {
      round_rows<true>(head.turned.data(), lanes, together, columns, a.planes, head.fast);
      return;
    }
    const auto copy = [&](int row, float* to) { std::copy_n(&head.weight[(size_t)row * width], width, to); };
    if (columns.scaled)
      round_lanes<true>(copy, rows, lanes, together, columns, a.planes, head.fast);
    else
      round_lanes<false>(copy, rows, lanes, together, columns, a.planes, head.fast);
  }

  void attend_batch(const std::vector<Chunk>& batch) {
    const int64_t anchor = batch[0].position;
    int n = 0;
    for (const Chunk& chunk : batch) n += chunk.count;
    for (Head& head : heads) head.expansion.move(anchor);
    const bool by_block = a.keys.by_block;
    if (rounded_anchor != anchor) nodes_are_rounded = false;
    auto round = [&] {
      for (Head& head : heads) {
        const ExpansionRows& rows = head.expansion;
        if (division.fast && (by_block || !fast_is_rounded)) round_fast(head);
        if (division.nodes && (by_block || !nodes_are_rounded))
          (columns.scaled ? round_rows<true> : round_rows<false>)(rows.nodes.data(), rows.node_lanes, 4, columns,
                                                                  a.planes, head.nodes);
      }
      fast_is_rounded = nodes_are_rounded = true;
      rounded_anchor = anchor;
    };
    if (by_block) {
      for (const Piece& piece : pieces_of(batch, a.keys.run))
        for (int done = 0; done < piece.count; done += TILE) {
          const int count = std::min(TILE, piece.count - done);
          load_keys(piece.slot, piece.first + done, count, 0);
          if (!done) round();
          score_tile(&Head::expansion, count, piece.at + done);
        }
    } else {
      round();
      int in_tile = 0, first = 0;
      for (const Piece& piece : pieces_of(batch, TILE)) {
        if (in_tile + piece.count > TILE) {
          score_tile(&Head::expansion, in_tile, first);
          first += in_tile;
          in_tile = 0;
          if (shares_codes) first_code = first;
        }
        load_keys(piece.slot, piece.first, piece.count, in_tile);
        in_tile += piece.count;
      }
      score_tile(&Head::expansion, in_tile, first);
      first_code = 0;
    }
    weigh(n, anchor);
    const std::vector<Piece> pieces = pieces_of(batch, a.values.run);
    // Pieces with the same scales are summed up together.
    const size_t together = a.values.by_block ? 1 : pieces.size();
    for (size_t i = 0; i < pieces.size(); i += together) add_values(&pieces[i], together);
  }

  // The pieces of a batch by runs of `run` tokens.
  static std::vector<Piece> pieces_of(const std::vector<Chunk>& batch, int run) {
    std::vector<Piece> pieces;
    int at = 0;
    for (const Chunk& chunk : batch)
      for (int first = chunk.first; first < chunk.first + chunk.count;) {
        const int last = std::min(chunk.first + chunk.count, (first / run + 1) * run);
        pieces.push_back({chunk.slot, first, last - first, at});
        at += last - first;
        first = last;
      }
    return pieces;
  }

  // Scores of n tokens from `position` on become probabilities, relative to the highest score so far.
  void weigh(int n, int64_t position) {
    const int value_stride = round_up(a.values.width, 16), exact_stride = round_up(a.output_width, 16);
    for (int j = 0; j < all_queries; j++) {
      float* score = &scores[(size_t)j * (SPAN + 16)];
      // The query sees tokens [first, seen).
      const int64_t after = query_position[j] - position + 1, seen = std::clamp<int64_t>(after, 0, n);
      const int64_t first = std::clamp<int64_t>(after - a.window, 0, seen);
      auto fill_unseen = [&](float value) {
        std::fill(score, score + first, value);
        std::fill(score + seen, score + round_up(n, 16), value);
      };
      fill_unseen(-INFINITE);
      vf high = set1(-INFINITE);
      for (int t = 0; t < n; t += 16) high = max(high, load(score + t));
      // Probabilities relative to two such references differ by a power of two and are rounded alike, so that results
      // depend little on where a sequence is split.
      const float top = a.blocks ? std::ceil(maximum(high) / LN2) * LN2 : maximum(high);
      const float higher = std::max(highest[j], top);
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
      fill_unseen(0);
      total[j] += sum(sum_);
    }
  }

  // Round the probabilities times `scale` (null: 1) of tokens [from, from + n) to integers, in `steps` of each query;
  // `plain`: the sum of the probabilities times `zero` (null: 1); `scaled`: that of the probabilities times `scale`.
  void round_probabilities(int from, int n, const float* scale, const float* zero) {
    high_bytes.resize((size_t)round_up(all_queries, 16) * SPAN);  // tiles are read whole
    low_bytes.resize(high_bytes.size());
    steps.resize(all_queries);
    plain.resize(all_queries);
    scaled.resize(all_queries);
    for (int j = 0; j < all_queries; j++) {
      const float* p = &scores[(size_t)j * (SPAN + 16) + from];
      alignas(64) float x[SPAN + 16], z[SPAN + 16];
      alignas(64) int32_t integers[SPAN + 16];
      std::fill(x + n, x + round_up(n, 16), 0.0f);
      std::fill(z + n, z + round_up(n, 16), 0.0f);
      for (int t = 0; t < n; t++) x[t] = scale ? p[t] * scale[t] : p[t];
      for (int t = 0; t < n; t++) z[t] = zero ? p[t] * zero[t] : p[t];
      vf high = set1(1e-37f), total_ = set1(0);
      for (int t = 0; t < n; t += 16) {
        high = max(high, load(x + t));
        total_ = add(total_, load(z + t));
      }
      steps[j] = maximum(high) / 32512;
      plain[j] = sum(total_);
      const vf inverse = set1(1 / steps[j]);
      // Of the rounded ones, so that what rounding adds to the codes it takes from their middle.
      int rounded_sum = 0;
      for (int t = 0; t < n; t += 16) storei(integers + t, to_int(mul(load(x + t), inverse)));
      for (int t = 0; t < n; t++) rounded_sum += integers[t];
      scaled[j] = rounded_sum * steps[j];
      uint8_t *to_high = &high_bytes[(size_t)j * SPAN], *to_low = &low_bytes[(size_t)j * SPAN];
      for (int t = 0; t < round_up(n, 16); t++) {
        to_high[t] = (integers[t] + 128) >> 8;
        to_low[t] = integers[t];
      }
      std::fill(to_high + round_up(n, 16), to_high + round_up(n, TILE), 0);
      std::fill(to_low + round_up(n, 16), to_low + round_up(n, TILE), 0);
    }
  }

  // Put the rounded probabilities of n tokens in the order of `codes`: those of four tokens in four lanes.
  void spread_probabilities(int n) {
    packed = round_up(n, 16);
    packed_high.resize((size_t)all_queries * packed);
    packed_low.resize((size_t)all_queries * packed);
    for (int j = 0; j < all_queries; j++)
      for (int t = 0; t < packed; t += 4) {
        uint32_t high, low;
        memcpy(&high, &high_bytes[(size_t)j * SPAN + t], 4);
        memcpy(&low, &low_bytes[(size_t)j * SPAN + t], 4);
        std::fill_n(&packed_high[(size_t)j * packed + t], 4, high);
        std::fill_n(&packed_low[(size_t)j * packed + t], 4, low);
      }
  }

  // Put the rounded probabilities of pieces of a batch, its tokens from `from` on, in the order of a layout: of each
  // piece its words, [word * fields + i], four probabilities to a lane.
  void arrange(Layout layout, const Piece* pieces, size_t n_pieces, int from) {
    const int fields = layout.fields, tokens = 4 * fields;
    piece_words.resize(n_pieces);
    packed = 0;
    for (size_t i = 0; i < n_pieces; i++) {
      // The first token need not be the first of its word.
      const int lead = pieces[i].first % a.values.run % tokens;
      piece_words[i] = {nullptr, layout.words(lead + pieces[i].count), packed};
      packed += piece_words[i].count * fields;
    }
    packed_high.resize((size_t)all_queries * packed);
    packed_low.resize((size_t)all_queries * packed);
    for (int j = 0; j < all_queries; j++)
      for (size_t i = 0; i < n_pieces; i++) {
        const size_t bytes = (size_t)j * SPAN + pieces[i].at - from;
        const size_t to = (size_t)j * packed + piece_words[i].weights;
        const int lead = pieces[i].first % a.values.run % tokens;
        arrange_words(layout, &high_bytes[bytes], lead, pieces[i].count, piece_words[i].count, &packed_high[to]);
        arrange_words(layout, &low_bytes[bytes], lead, pieces[i].count, piece_words[i].count, &packed_low[to]);
      }
  }

  static void arrange_words(Layout layout, const uint8_t* bytes, int lead, int n, int words, uint32_t* to) {
    const int fields = layout.fields, tokens = 4 * fields;
    alignas(64) uint8_t from[SPAN + 64];
    memset(from, 0, lead);
    memcpy(from + lead, bytes, n);
    memset(from + lead + n, 0, words * tokens - lead - n);
    if (fields == 1) memcpy(to, from, 4 * words);
    if (fields == 2 || fields == 4) {
      const __m128i order = fields == 4 ? _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15)
                                        : _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15);
      alignas(16) uint8_t ordered[SPAN + 64];
      for (int t = 0; t < words * tokens; t += 16)
        _mm_store_si128((__m128i*)(ordered + t), _mm_shuffle_epi8(_mm_load_si128((__m128i*)(from + t)), order));
      memcpy(to, ordered, words * tokens);
    }
    if (fields == 8)
      for (int w = 0; w < words; w++) {
        const __m128i first = _mm_load_si128((__m128i*)(from + 32 * w)),
                      second = _mm_load_si128((__m128i*)(from + 32 * w + 16));
        // Pairs of tokens 8 apart, then fours.
        const __m128i low = _mm_unpacklo_epi8(first, _mm_srli_si128(first, 8)),
                      high = _mm_unpacklo_epi8(second, _mm_srli_si128(second, 8));
        _mm_storeu_si128((__m128i*)(to + 8 * w), _mm_unpacklo_epi16(low, high));
        _mm_storeu_si128((__m128i*)(to + 8 * w + 4), _mm_unpackhi_epi16(low, high));
      }
    if (fields == 5)
      for (int w = 0; w < words; w++)
        for (int i = 0; i < fields; i++)
          for (int k = 0; k < 4; k++) ((uint8_t*)to)[w * tokens + 4 * i + k] = from[w * tokens + k * fields + i];
  }

  // Sum of rounded probability times code over `piece_words`, for 16 channels and J queries from `query` on.
  template <int BITS, int J>
  INLINE inline void sum_codes(const Part& part, int channel, int count, int query, vi (&out)[J]) {
    constexpr int fields = BITS == TERNARY ? 5 : 8 / BITS;
    vi high[J], low[J];
    each<J>([&](auto j) INLINE { high[j] = low[j] = seti(0); });
    for (const Words& words : piece_words) {
      const uint32_t* weights_high = &packed_high[(size_t)query * packed + words.weights];
      const uint32_t* weights_low = &packed_low[(size_t)query * packed + words.weights];
      const int32_t* from = words.first + channel;
      for (int w = 0; w < words.count; w++, from += part.token_stride) {
        const vi word = loadi(from, count);
        each<fields>([&](auto i) INLINE {
          const vi code = field(word, {BITS, fields}, i);
          each<J>([&](auto j) INLINE {
            high[j] = dot4(high[j], code, seti(weights_high[(size_t)j * packed + w * fields + i]));
            low[j] = dot4(low[j], code, seti(weights_low[(size_t)j * packed + w * fields + i]));
          });
        });
      }
    }
    each<J>([&](auto j) INLINE { out[j] = addi(shl(high[j], 8), low[j]); });
  }

  // Add sums over codes of 16 channels, as numbers, to those of J queries from `query` on.
  template <int J>
  INLINE inline void add_totals(const vi (&totals)[J], int query, float weight, const float* scale, const float* zero,
                                const float* first_level, float* out, int stride) {
    each<J>([&](auto j) INLINE {
      float* to = out + (size_t)(query + j) * stride;
      vf y = fma(mul(to_float(totals[j]), set1(steps[query + j] * weight)), load(scale), load(to));
      if (zero) y = fma(load(zero), set1(plain[query + j]), y);
      if (first_level) y = fma(load(first_level), set1(scaled[query + j]), y);
      store(to, y);
    });
  }

  template <int BITS>
  void add_codes(const Part& part, int channel, int count, float weight, const float* scale, const float* zero,
                 const float* first_level, float* out, int stride) {
    int j = 0;
    // As many queries at a time as registers hold the sums of.
    auto add_some = [&](auto some) INLINE {
      for (; j + some <= all_queries; j += some) {
        vi totals[some];
        sum_codes<BITS, some>(part, channel, count, j, totals);
        add_totals(totals, j, weight, scale, zero, first_level, out, stride);
      }
    };
    add_some(std::integral_constant<int, ALRD_AVX512 ? 9 : 4>());
    add_some(std::integral_constant<int, 4>());
    add_some(std::integral_constant<int, 1>());
  }

  // Add to the sums the values of pieces of a batch, side by side, whose scales per channel are the same.
  void add_values(const Piece* pieces, size_t n_pieces) {
    const Side& side = a.values;
    const int s0 = side.first_segment[value_group], s1 = side.first_segment[value_group + 1];
    const int stride = round_up(side.width, 16), from = pieces[0].at;
    const int n = pieces[n_pieces - 1].at + pieces[n_pieces - 1].count - from;
    alignas(64) float own_scale[SPAN];
    const float* scale_of = side.token_scale ? own_scale : nullptr;
    if (scale_of)
      for (size_t i = 0; i < n_pieces; i++)
        token_scales(side, value_group, pieces[i].slot, pieces[i].first, pieces[i].count,
                     own_scale + pieces[i].at - from);
    if (shares_codes) {
      round_probabilities(from, n, scale_of, nullptr);
      if (!has_tiles()) spread_probabilities(n);
      for (int s = s0; s < s1; s++) {
        const Segment& segment = side.segments[s];
        const uint8_t* of_segment = first_code_of(a.keys.segments[a.keys.first_segment[group] + s - s0].position);
        add_unpacked(side.parts[segment.part], pieces[0].slot, segment, of_segment, code_stride, n,
                     code_shift(side.parts[segment.part].levels), scale_of, stride);
      }
      return;
    }
    bool rounded = false;
    int arranged = 0;
    for (int s = s0; s < s1; s++) {
      const Segment& segment = side.segments[s];
      const Part& part = side.parts[segment.part];
      if (s - s0 >= side.integers[value_group]) {
        for (size_t i = 0; i < n_pieces; i++)
          add_numbers(part, pieces[i].slot, pieces[i].first, pieces[i].count, pieces[i].at, segment,
                      scale_of ? scale_of + pieces[i].at - from : nullptr, stride);
        continue;
      }
      if (segment.column >= 0) {
        alignas(64) float token_scale[SPAN], token_zero[SPAN];
        for (size_t i = 0; i < n_pieces; i++)
          token_parameters(part, pieces[i].slot, pieces[i].first, pieces[i].count, segment.column, false,
                           token_scale + pieces[i].at - from, token_zero + pieces[i].at - from);
        round_probabilities(from, n, token_scale, token_zero);
        rounded = false;
        arranged = 0;
      } else if (!rounded) {
        round_probabilities(from, n, scale_of, nullptr);
        rounded = true;
        arranged = 0;
      }
      if (part.points) {
        constexpr int room = SPAN + 32;  // tokens, and what is unpacked behind them
        points.resize((size_t)round_up(segment.count, 16) * room);
        for (size_t i = 0; i < n_pieces; i++) {
          const Run run = run_of(part, pieces[i].slot, pieces[i].first);
          unpack(part, run.words, run.length, pieces[i].first - run.start, pieces[i].count, segment.channel,
                 segment.count, &points[4 * (pieces[i].at - from)], room);
        }
        if (arranged >= 0 && !has_tiles()) spread_probabilities(n);
        arranged = -1;  // in the order of unpacked codes
        add_unpacked(part, pieces[0].slot, segment, points.data(), room, n, 0, scale_of, stride);
        continue;
      }
      Plane planes[2];
      const int n_planes = planes_of(part.bits, run_of(part, pieces[0].slot, pieces[0].first).length, planes);
      for (int p = n_planes - 1; p >= 0; p--) {
        const Layout layout = planes[p].layout;
        if (arranged != layout.bits) {
          arrange(layout, pieces, n_pieces, from);
          arranged = layout.bits;
        }
        for (size_t i = 0; i < n_pieces; i++) {
          const Run run = run_of(part, pieces[i].slot, pieces[i].first);
          const int first_word = planes[p].first_word + (pieces[i].first - run.start) / (4 * layout.fields);
          piece_words[i].first = run.words + (int64_t)first_word * part.token_stride;
        }
        for (int c = 0; c < segment.count; c += 16) {
          const int left = std::min(16, segment.count - c);
          alignas(64) float scale[16], zero[16], first_level[16];
          for (int k = 0; k < 16; k++) scale[k] = zero[k] = 1;
          if (segment.column < 0)
            parameters(part, pieces[0].slot, pieces[0].first / part.run, segment.channel + c, left, scale_of, scale,
                       zero);
          for (int k = left; k < 16; k++) scale[k] = zero[k] = 0;
          // Beside the middles, which have the probabilities themselves, stand the levels relative to them.
          for (int k = 0; k < 16; k++) first_level[k] = -0.5f * (part.levels - 1) * scale[k];
          with_bits(layout.bits, [&](auto bits) {
            add_codes<bits>(part, segment.channel + c, left, 1 << planes[p].shift, scale, p ? nullptr : zero,
                            p || !scale_of ? nullptr : first_level, &sums[segment.position + c], stride);
          });
        }
      }
    }
  }

  // Sums of rounded probability times unpacked code, for 16 channels and J queries from `query` on.
  template <int J>
  INLINE inline void sum_unpacked(const uint8_t* from, int tokens, int query, vi (&out)[J]) {
    vi high[J][4], low[J][4];
    each<J>([&](auto j) INLINE { each<4>([&](auto q) INLINE { high[j][q] = low[j][q] = seti(0); }); });
    for (int t = 0; t < packed; t += 16) {
      vi code[4];  // lane 4 i + c: channel c of tokens 4 i to 4 i + 3
      each<4>([&](auto q) INLINE { code[q] = transpose_bytes(loadi(from + ((int64_t)q * tokens + t) * 4)); });
      each<J>([&](auto j) INLINE {
        const vi weights_high = loadi(&packed_high[(size_t)(query + j) * packed + t]),
                 weights_low = loadi(&packed_low[(size_t)(query + j) * packed + t]);
        each<4>([&](auto q) INLINE {
          high[j][q] = dot4(high[j][q], code[q], weights_high);
          low[j][q] = dot4(low[j][q], code[q], weights_low);
        });
      });
    }
    each<J>([&](auto j) INLINE {
      vi total[4];
      each<4>([&](auto q) INLINE { total[q] = addi(shl(high[j][q], 8), low[j][q]); });
      out[j] = sum_fours(total);
    });
  }

#if ALRD_TILES
  // As `sum_unpacked`, over n tokens for all queries; `use(query, totals)` takes the sums of one.
  template <class Use>
  void sum_by_tiles(const uint8_t* from, int tokens, int n, Use use) {
    const int steps = ceil_div(n, TILE);
    alignas(64) uint8_t turned[SPAN * 16];
    for (int step = 0; step < steps; step++)
      turn_codes(from + (int64_t)step * TILE * 4, (int64_t)4 * tokens, turned + step * TILE * 16);
    alignas(64) int32_t high[256], low[256];
    for (int first = 0; first < all_queries; first += 16) {
      sum_tiles(&high_bytes[(size_t)first * SPAN], &low_bytes[(size_t)first * SPAN], SPAN, turned, steps, high, low);
      for (int j = first; j < std::min(all_queries, first + 16); j++)
        use(j, addi(shl(loadi(high + 16 * (j - first)), 8), loadi(low + 16 * (j - first))));
    }
  }
#endif

  // Add to the sums the values of a segment's unpacked codes, [quad][tokens][4], which were moved up by `shift`.
  void add_unpacked(const Part& part, int slot, const Segment& segment, const uint8_t* from, int tokens, int n,
                    int shift, const float* scale_of, int stride) {
    for (int c = 0; c < segment.count; c += 16, from += (int64_t)16 * tokens) {
      const int left = std::min(16, segment.count - c);
      alignas(64) float scale[16], zero[16], first_level[16];
      parameters(part, slot, 0, segment.channel + c, left, scale_of, scale, zero);
      for (int k = left; k < 16; k++) scale[k] = zero[k] = 0;
      for (int k = 0; k < 16; k++) first_level[k] = -0.5f * (part.levels - 1) * scale[k];
      const auto add = [&](const auto& totals, int query) INLINE {
        add_totals(totals, query, 1.0f / (1 << shift), scale, zero, scale_of ? first_level : nullptr,
                   &sums[segment.position + c], stride);
      };
#if ALRD_TILES
      if (has_tiles()) {
        sum_by_tiles(from, tokens, n, [&](int query, vi total) {
          const vi totals[1] = {total};
          add(totals, query);
        });
        continue;
      }
#endif
      int j = 0;
      auto add_some = [&](auto some) INLINE {
        for (; j + some <= all_queries; j += some) {
          vi totals[some];
          sum_unpacked<some>(from, tokens, j, totals);
          add(totals, j);
        }
      };
      add_some(std::integral_constant<int, 3>());
      add_some(std::integral_constant<int, 2>());
      add_some(std::integral_constant<int, 1>());
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
      const int room = n + 32;  // what is unpacked goes on behind the tokens
      std::vector<uint8_t> bytes((size_t)width * room);
      unpack(part, run.words, run.length, first - run.start, n, segment.channel, segment.count, bytes.data(), room);
      dequantize(part, slot, first, n, segment, scale_of, bytes.data(), room,
                 [&](int t, int c) -> float& { return value_numbers[(size_t)t * width + c]; });
    }
    accumulate(n, at, width, &sums[segment.position], stride);
  }

  // Add to each query's sums the probabilities times `value_numbers` [n][width].
  void accumulate(int n, int at, int width, float* out, int stride) {
    for (int j = 0; j < all_queries; j++)
      for (int c = 0; c < width; c += 16) {
        vf y = load(out + (size_t)j * stride + c);
        for (int t = 0; t < n; t++)
          y = fma(set1(scores[(size_t)j * (SPAN + 16) + at + t]), load(&value_numbers[(size_t)t * width + c]), y);
        store(out + (size_t)j * stride + c, y);
      }
  }

  void attend_exact(const Exact& exact) {
    const int channels = a.key_count[group], value_channels = a.value_count[value_group];
    start_exact();
    // The columns of the packed keys come back when it is done.
    Columns packed_columns = std::move(columns);
    columns = Columns();
    columns.last = a.exact_width;
    columns.floats = channels;
    is_exact = true;
    column_numbers.resize((size_t)round_up(std::max(1, a.exact_width), 16) * STRIDE);
    for (int first = 0; first < exact.count[row]; first += SPAN) {
      const int n = std::min(SPAN, exact.count[row] - first);
      const int64_t position = exact.start[row] + first;
      if (position + n <= first_seen(a, row)) continue;
      for (Head& head : heads) head.exact_expansion.move(position);
      for (int tile = 0; tile < n; tile += TILE) {
        const int in_tile = std::min(TILE, n - tile);
#if ALRD_TILES
        if (exact_by_tiles()) load_pairs(exact, first + tile, in_tile);
#endif
        for (int t = 0; t < in_tile && !exact_by_tiles(); t += 16) {
          const int64_t at = row * exact.key_row + (first + tile + t) * exact.key_token + a.key_start[group];
          for (int c = 0; c < channels; c += 16) {
            alignas(64) float states[16 * 16];
            for (int i = 0; i < 16; i++)
              numbers(exact.keys, at + std::min(i, in_tile - t - 1) * exact.key_token + c, std::min(16, channels - c),
                      a.state_type, states + 16 * i);
            transpose_words(states, 16, &column_numbers[(size_t)c * STRIDE + t], STRIDE);
          }
        }
        score_tile(&Head::exact_expansion, in_tile, tile);
      }
      weigh(n, position);
      const int width = round_up(value_channels, 16);
      value_numbers.resize((size_t)n * width);
      for (int t = 0; t < n; t++)
        numbers(exact.values, row * exact.value_row + (first + t) * exact.value_token + a.value_start[value_group],
                value_channels, a.state_type, &value_numbers[(size_t)t * width]);
      accumulate(n, 0, width, exact_sums.data(), round_up(a.output_width, 16));
    }
    columns = std::move(packed_columns);
    is_exact = false;
  }

  // Start to read a part of the next batch; called again and again while this one is computed, so that the reads are
  // spread over it: a burst of them would be waited for.
  void prefetch_next() {
    due += at_a_time;
    for (const size_t end = std::min(next_reads.size(), (size_t)due); prefetched < end; prefetched++)
      prefetch<_MM_HINT_T0>(next_reads[prefetched].first, next_reads[prefetched].bytes);
  }

  // The words of a head group in a block.
  void list_words(const Side& side, int of, int slot) {
    for (int i = side.first_segment[of]; i < side.first_segment[of + 1]; i++) {
      const Segment& segment = side.segments[i];
      const Part& part = side.parts[segment.part];
      const int size = part.bits == 16 && a.state_type != FLOAT32 ? 2 : 4;
      for (int w = 0; w < part.words; w++) {
        const int64_t first = slot * part.slot_stride + w * part.token_stride + segment.channel;
        const char* word = (const char*)part.packed + first * size;
        for (int at = 0; at < segment.count * size; at += READ)
          next_reads.push_back({word + at, std::min(READ, segment.count * size - at)});
      }
    }
  }

  // Blocks [first, last) of the row are the next batch.
  void expect(int first, int last) {
    next_reads.clear();
    due = prefetched = 0;
    for (int i = first; i < last; i++) {
      const int slot = a.table[(int64_t)row * a.blocks + i];
      list_words(a.keys, group, slot);
      if (a.values.parts[0].packed != a.keys.parts[0].packed) list_words(a.values, value_group, slot);
    }
    const int calls =
        (ceil_div(division.fast, pairs_together(division)) + ceil_div(division.nodes * queries, 4)) * heads.size();
    at_a_time = 1.01f * next_reads.size() / std::max(1, calls * (SPAN / TILE));
  }

  // Blocks [first, last) of the row.
  void attend_blocks(int first, int last) {
    const int64_t plane = (int64_t)a.batch * a.blocks;
    const int32_t* table = a.table + (int64_t)row * a.blocks;
    std::vector<Chunk> batch;
    int tokens = 0;
    // `next`: the first block that is not in the batch.
    auto flush = [&](int next) {
      expect(next, std::min(last, next + std::max(1, SPAN / a.block_length)));
      if (!batch.empty()) attend_batch(batch);
      batch.clear();
      tokens = 0;
    };
    for (int i = std::max(first, unseen_blocks(a, row)); i < last; i++) {
      const int count = table[2 * plane + i];
      for (int t = std::max(0, a.hidden - table[plane + i]); t < count; t += SPAN) {
        const Chunk chunk = {table[i], t, std::min(SPAN, count - t), (int64_t)table[plane + i] + t};
        // Tokens of a batch are at consecutive positions.
        if (tokens && (tokens + chunk.count > SPAN || batch[0].position + tokens != chunk.position))
          flush(i + (t >= SPAN));
        batch.push_back(chunk);
        tokens += chunk.count;
      }
    }
    flush(last);
  }

  // [query][output_width + 2]: sums of values by channel, highest score, sum of weights.
  void finish(float* out) {
    const int stride = round_up(a.values.width, 16), exact_stride = round_up(a.output_width, 16);
    const int32_t* channel = a.value_channel + (int64_t)value_group * a.values.width;
    for (int j = 0; j < all_queries; j++, out += a.output_width + 2) {
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
  // Splits of the sequence, so that few heads keep all threads busy, of whole batches.
  const int blocks_of_batch = std::max(1, SPAN / std::max(1, a.block_length));
  int unseen = a.blocks;
  for (int row = 0; row < a.batch && unseen; row++) unseen = std::min(unseen, unseen_blocks(a, row));
  const int batches = std::max<int>(1, ceil_div(a.blocks - unseen, blocks_of_batch));
  // Heads that share their latents are an item, fewer of them where threads would have nothing to do.
  const int sharing = a.keys.groups == a.values.groups ? a.heads / a.keys.groups : 1;
  const int most_splits = batches + (a.blocks && a.n_exact);
  int of_item = std::min(sharing, MOST_HEADS);
  while (sharing % of_item || (of_item > 1 && a.batch * a.heads / of_item * most_splits < a.threads)) of_item--;
  const int items = a.blocks || a.n_exact ? a.batch * a.heads / of_item : 0;
  int splits = 1, of_exact = 0;  // the first ones are those of tokens in full precision
  if (items % a.threads) {
    splits = std::min<int>(ceil_div(4 * a.threads, items), most_splits);
    of_exact = splits > 1 && a.n_exact;
  }
  bool by_tiles = has_tiles() && !a.keys.by_block;
  for (int i = 0; a.blocks && i < a.keys.first_segment[a.keys.groups]; i++) by_tiles &= a.keys.segments[i].column < 0;
  const Division& division = division_of(a.frequency, a.half, a.tolerance, a.keys.width, queries, by_tiles);
  // Of few exact tokens all pairs are rebuilt: sums at nodes would be for more.
  int exact_tokens = 0;
  for (int e = 0; e < a.n_exact; e++) exact_tokens += *std::max_element(a.exact[e].count, a.exact[e].count + a.batch);
  const bool few = exact_tokens <= FEW && a.frequency[0] != 0;
  const Division& exact_division =
      division_of(a.frequency, a.half, few ? -1 : a.tolerance, 8 * a.exact_width, queries, false);
  // [item][split][query of the item]
  const int64_t width = a.output_width + 2, share = of_item * queries * width;
  std::vector<float> partial((size_t)items * splits * share);
#pragma omp parallel num_threads(a.threads)
  {
    const Tiles tiles;
    Worker worker(a, division, exact_division);
#pragma omp for schedule(dynamic)
    for (int i = 0; i < items * splits; i++) {
      // Rows one after the other, so that the expansion of their heads stays as it is.
      const int split = i % splits, item = i / splits;
      worker.start(item % a.batch, item / a.batch * of_item, of_item);
      if (split == 0)
        for (int e = 0; e < a.n_exact; e++) worker.attend_exact(a.exact[e]);
      const int part = split - of_exact, parts = splits - of_exact;
      const int first = unseen + (int64_t)batches * part / parts * blocks_of_batch,
                last = unseen + (int64_t)batches * (part + 1) / parts * blocks_of_batch;
      if (a.blocks && part >= 0) worker.attend_blocks(first, std::min(last, a.blocks));
      worker.finish(&partial[(size_t)i * share]);
    }
    HeadOutput output(a);
#pragma omp for
    for (int head = 0; head < a.batch * a.heads; head++) {
      const int b = head / a.heads, h = head % a.heads;
      output.start(b, h);
      if (items)
        output.add_latents(
            &partial[((size_t)(h / of_item * a.batch + b) * splits * of_item + h % of_item) * queries * width], splits,
            share);
      output.finish();
    }
  }
  return 0;
}

// Whether codes of 8 bits can be multiplied as such.
extern "C" int alrd_takes_bytes() { return ALRD_AVX512; }

// Whether codes are multiplied by tile registers.
extern "C" int alrd_has_tiles() { return has_tiles(); }
