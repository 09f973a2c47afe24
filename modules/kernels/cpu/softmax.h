// Exponentials, and the merge of a sequence's splits.

#pragma once

#include <cmath>

#include "vectors.h"

namespace {

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

// The same of one number, by another polynomial: relative error below 1e-7. Loops over it become vectors.
inline float exp_negative(float x) {
  x = std::max(x, -87.0f);
  const float n = std::nearbyint(x * 1.44269504f);
  const float r = std::fma(n, 2.12194440e-4f, std::fma(n, -0.693359375f, x));
  float y = 1.9875691500e-4f;
  y = std::fma(y, r, 1.3981999507e-3f);
  y = std::fma(y, r, 8.3334519073e-3f);
  y = std::fma(y, r, 4.1665795894e-2f);
  y = std::fma(y, r, 1.6666665459e-1f);
  y = std::fma(y, r, 5.0000001201e-1f);
  const int32_t power_of_two = ((int32_t)n + 127) << 23;
  float scale;
  memcpy(&scale, &power_of_two, 4);
  return std::fma(y, r * r, r + 1.0f) * scale;
}

// The attention of a query to its sequence, from the records of the sequence's splits, `stride` apart: `width` sums of
// weighted values, the highest score, the sum of the weights relative to it. A query that sees nothing gets zeros.
// Returns the logarithm of the sum of all exp(score); -inf for a query that sees nothing.
template <class Exp>
inline float merge_splits(const float* records, int64_t splits, int64_t stride, int64_t width, Exp exp, float* out) {
  float highest = -INFINITE;
  float total = 0;
  for (int64_t s = 0; s < splits; s++) highest = std::max(highest, records[s * stride + width]);
  std::fill_n(out, width, 0.0f);
  for (int64_t s = 0; s < splits; s++) {
    const float* record = records + s * stride;
    if (record[width + 1] == 0) continue;
    const float weight = exp(record[width] - highest);
    total += weight * record[width + 1];
    for (int64_t c = 0; c < width; c++) out[c] += weight * record[c];
  }
  for (int64_t c = 0; c < width && total > 0; c++) out[c] /= total;
  return highest + std::log(total);
}

}  // namespace
