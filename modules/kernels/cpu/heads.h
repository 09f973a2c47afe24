// The outputs of the heads: from their sums of latents, and from tokens beside the latents as they are.

#pragma once

#include "arguments.h"
#include "softmax.h"

namespace {

// The queries of a key head in a row, [query head][token].
class HeadOutput {
  const Arguments& a;
  const int queries, padded, width;  // `padded`: pairs; `width`: of an output
  int row = 0, head = 0;
  std::vector<double> frequency;                   // [half], in the order of the pairs
  std::vector<float> query;                        // [query][2][padded]
  std::vector<float> outputs, log_sums;            // [query][width], [query]
  std::vector<float> summed, expansion, numbers_;  // latents [query][columns]; a row of the expansion; a key or a value
  std::vector<float> scores, record;
  std::vector<double> cosine, sine;  // [token][half], by which a key turns to the query

 public:
  explicit HeadOutput(const Arguments& arguments)
      : a(arguments),
        queries(a.query_heads / a.heads * a.length),
        padded(round_up(a.half, 16)),
        width(a.value_weight || a.n_plain ? a.head_width : a.output_width) {
    frequency.resize(a.half);
    for (int f = 0; f < a.half; f++) frequency[a.order[f]] = a.frequency[f];
  }

  void start(int row_, int head_) {
    row = row_, head = head_;
    outputs.assign((size_t)queries * width, 0);
    log_sums.assign(queries, -INFINITE);
  }

  // The merged sums of the splits, whose records are `stride` apart, and the expansion of their values.
  void add_latents(const float* records, int splits, int64_t stride) {
    const int columns = round_up(a.output_width, 16);
    summed.assign((size_t)queries * columns, 0);
    for (int j = 0; j < queries; j++)
      log_sums[j] = merge_splits(
          records + (size_t)j * (a.output_width + 2), splits, stride, a.output_width,
          [](float x) { return std::exp(x); }, &summed[(size_t)j * columns]);
    if (!a.value_weight) {
      for (int j = 0; j < queries; j++) std::copy_n(&summed[(size_t)j * columns], width, &outputs[(size_t)j * width]);
      return;
    }
    expansion.resize(columns);
    for (int i = 0; i < width; i++) {
      const int64_t r = (int64_t)head * width + i;
      numbers(a.value_weight, r * a.value_stride, a.output_width, a.value_type, expansion.data());
      const float bias = a.value_bias ? number(a.value_bias, r, a.value_type) : 0;
      for (int j = 0; j < queries; j++) {
        vf total = set1(0);
        for (int c = 0; c < columns; c += 16)
          total = fma(load(&expansion[c]), load(&summed[(size_t)j * columns + c]), total);
        outputs[(size_t)j * width + i] = sum(total) + bias;
      }
    }
  }

  // Add the tokens beside the latents, and store.
  void finish() {
    if (a.n_plain) add_plain();
    for (int j = 0; j < queries; j++) {
      const int q_head = head * (a.query_heads / a.heads) + j / a.length, l = j % a.length;
      const int64_t to = ((int64_t)row * a.query_heads + q_head) * a.length + l;
      std::copy_n(&outputs[(size_t)j * width], width, a.output + to * width);
      a.log_sum[to] = log_sums[j];
    }
  }

 private:
  // What the tokens beside the latents give is merged by the log-sums (arXiv:2205.14135, section 3.1).
  void add_plain() {
    int tokens = 0;
    for (int e = 0; e < a.n_plain; e++) tokens += a.plain[e].count[row];
    if (!tokens) return;
    const int columns = round_up(width, 16);
    load_queries();
    scores.assign((size_t)queries * round_up(tokens, 16), -INFINITE);
    numbers_.resize(std::max(columns, 4 * padded));
    for (int e = 0, first = 0; e < a.n_plain; first += a.plain[e++].count[row])
      score(a.plain[e], round_up(tokens, 16), first);
    // Two records: what is known so far, and what these tokens give.
    const int stride = columns + 2;
    record.assign((size_t)queries * 2 * stride, 0);
    for (int j = 0; j < queries; j++) {
      float* of = &record[(size_t)j * 2 * stride];
      std::copy_n(&outputs[(size_t)j * width], width, of);
      of[width] = log_sums[j];
      of[width + 1] = log_sums[j] > -INFINITE;
      float* score = &scores[(size_t)j * round_up(tokens, 16)];
      const float highest = *std::max_element(score, score + tokens);
      of[stride + width] = highest;
      for (int t = 0; t < tokens; t++) {
        score[t] = score[t] == -INFINITE ? 0 : std::exp(score[t] - highest);
        of[stride + width + 1] += score[t];
      }
    }
    int token = 0;
    for (int e = 0; e < a.n_plain; e++) {
      const Exact& tile = a.plain[e];
      for (int t = 0; t < tile.count[row]; t++, token++) {
        numbers(tile.values, row * tile.value_row + t * tile.value_token + (int64_t)head * width, width, a.state_type,
                numbers_.data());
        for (int j = 0; j < queries; j++) {
          float* of = &record[((size_t)j * 2 + 1) * stride];
          const float weight = scores[(size_t)j * round_up(tokens, 16) + token];
          for (int c = 0; c < width; c++) of[c] += weight * numbers_[c];
        }
      }
    }
    for (int j = 0; j < queries; j++)
      log_sums[j] = merge_splits(
          &record[(size_t)j * 2 * stride], 2, stride, width, [](float x) { return std::exp(x); },
          &outputs[(size_t)j * width]);
  }

  void load_queries() {
    query.assign((size_t)queries * 2 * padded, 0);
    for (int j = 0; j < queries; j++) {
      const int q_head = head * (a.query_heads / a.heads) + j / a.length, l = j % a.length;
      const float* from = a.query + (((int64_t)row * a.query_heads + q_head) * a.length + l) * 2 * a.half;
      for (int i = 0; i < 2; i++)
        for (int f = 0; f < a.half; f++) query[((size_t)j * 2 + i) * padded + f] = from[i * a.half + f] * a.scaling;
    }
  }

  // Scores of the tokens of a tile, the first of them token `first` of all.
  void score(const Exact& tile, int stride, int first) {
    const int64_t* positions = a.positions + (int64_t)row * a.length;
    cosine.resize((size_t)a.length * a.half);
    sine.resize(cosine.size());
    std::vector<double> step_cosine(a.half), step_sine(a.half);
    for (int f = 0; f < a.half; f++) {
      step_cosine[f] = std::cos(frequency[f]);
      step_sine[f] = std::sin(frequency[f]);
      for (int l = 0; l < a.length; l++) {
        const double angle = frequency[f] * (double)(positions[l] - tile.start[row]);
        cosine[(size_t)l * a.half + f] = std::cos(angle);
        sine[(size_t)l * a.half + f] = std::sin(angle);
      }
    }
    float *low = numbers_.data(), *high = low + padded, *turned_low = high + padded, *turned_high = turned_low + padded;
    std::fill(low, low + 4 * padded, 0.0f);
    for (int t = 0; t < tile.count[row]; t++) {
      const int64_t at = row * tile.key_row + t * tile.key_token + (int64_t)head * 2 * a.half;
      numbers(tile.keys, at, a.half, a.state_type, low);
      numbers(tile.keys, at + a.half, a.half, a.state_type, high);
      for (int l = 0; l < a.length; l++) {
        double *c = &cosine[(size_t)l * a.half], *s = &sine[(size_t)l * a.half];
        // A query turned by an angle meets a key as the query meets the key turned back.
#pragma GCC ivdep
        for (int f = 0; f < a.half; f++) {
          const float x = c[f], y = s[f];
          turned_low[f] = low[f] * x + high[f] * y;
          turned_high[f] = high[f] * x - low[f] * y;
          // The next token is nearer by one.
          const double next = c[f] * step_cosine[f] + s[f] * step_sine[f];
          s[f] = s[f] * step_cosine[f] - c[f] * step_sine[f];
          c[f] = next;
        }
        const int64_t distance = positions[l] - tile.start[row] - t;
        if (distance < 0 || distance >= a.window) continue;
        for (int j = l; j < queries; j += a.length) {
          const float* of = &query[(size_t)j * 2 * padded];
          vf total = set1(0);
          for (int f = 0; f < padded; f += 16)
            total = fma(load(of + f), load(turned_low + f), fma(load(of + padded + f), load(turned_high + f), total));
          scores[(size_t)j * stride + first + t] = sum(total);
        }
      }
    }
  }
};

}  // namespace
