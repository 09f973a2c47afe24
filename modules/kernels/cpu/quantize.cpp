// Kernels of modules/quant_utils.py for CPUs; the same bits come out. Format and formulas are explained there, the
// interface in quantize.py.
//
// What makes the bits equal: float32 throughout, IEEE divisions, no contraction of a product and a sum
// (-ffp-contract=off), and sums over integers, whose order does not matter.
//
// Vectors go along channels, where the states and the packed words lie side by side. Only the search of a range turns
// groups of a token around, so that a lane is a group there in either orientation.

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

namespace {

// ---- vectors

#ifdef __AVX512F__
constexpr int V = 16;
#else
constexpr int V = 8;
#endif
using F = float __attribute__((vector_size(4 * V)));
using I = int32_t __attribute__((vector_size(4 * V)));
using U = uint32_t __attribute__((vector_size(4 * V)));
using S = uint16_t __attribute__((vector_size(2 * V)));
using L = int64_t __attribute__((vector_size(8 * V)));

// Vectors of channels that are packed together.
constexpr int NV = 4, BLOCK = NV * V;

constexpr float INFINITE = std::numeric_limits<float>::infinity();

struct Half {
  uint16_t bits;
};
struct BFloat {
  uint16_t bits;
};

template <class X>
X read(const void* p) {
  X x;
  std::memcpy(&x, p, sizeof x);
  return x;
}

template <class X>
void write(void* p, X x) {
  std::memcpy(p, &x, sizeof x);
}

F all(float x) { return F{} + x; }

#ifdef __AVX512F__
// Of two values of which one is NaN the second.
F minimum(F a, F b) { return (F)_mm512_min_ps((__m512)a, (__m512)b); }
F maximum(F a, F b) { return (F)_mm512_max_ps((__m512)a, (__m512)b); }
F fused(F a, F b, F c) { return (F)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
F floor_of(F x) { return (F)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }
F from_half(S x) { return (F)_mm512_cvtph_ps((__m256i)x); }
S to_half(F x) { return (S)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
bool any(I mask) { return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask); }
#else
F minimum(F a, F b) { return (F)_mm256_min_ps((__m256)a, (__m256)b); }
F maximum(F a, F b) { return (F)_mm256_max_ps((__m256)a, (__m256)b); }
F fused(F a, F b, F c) { return (F)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
F floor_of(F x) { return (F)_mm256_floor_ps((__m256)x); }
F from_half(S x) { return (F)_mm256_cvtph_ps((__m128i)x); }
S to_half(F x) { return (S)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT); }
bool any(I mask) { return _mm256_movemask_ps((__m256)mask); }
#endif

I lanes_in_order() {
  I lanes;
  for (int i = 0; i < V; i++) lanes[i] = i;
  return lanes;
}

F select(I mask, F a, F b) { return mask ? a : b; }
L wide(I x) { return __builtin_convertvector(x, L); }
I mask_of(L x) { return __builtin_convertvector(x, I); }
I truncated(F x) { return __builtin_convertvector(x, I); }
F to_float(I x) { return __builtin_convertvector(x, F); }
F to_float(L x) { return __builtin_convertvector(x, F); }
template <class T>
F widen(S bits);
template <>
F widen<Half>(S bits) {
  return from_half(bits);
}
template <>
F widen<BFloat>(S bits) {
  return (F)(__builtin_convertvector(bits, U) << 16);
}

template <class T>
S narrow(F x);
template <>
S narrow<Half>(F x) {
  return to_half(x);
}
template <>
S narrow<BFloat>(F x) {
  U bits = (U)x;
  return __builtin_convertvector((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16, S);
}

template <class T>
F load(const T* p) {
  if constexpr (sizeof(T) == 4)
    return read<F>(p);
  else
    return widen<T>(read<S>(p));
}

template <class T>
void store(T* p, F x) {
  if constexpr (sizeof(T) == 4)
    write(p, x);
  else
    write(p, narrow<T>(x));
}

// The first n lanes of what starts at p, the others filled with the first.
template <class T>
F load(const T* p, int n) {
  if (n >= V) return load(p);
  T lanes[V];
  for (int i = 0; i < V; i++) lanes[i] = p[i < n ? i : 0];
  return load(lanes);
}

template <class T>
void store(T* p, F x, int n) {
  if (n >= V) return store(p, x);
  T lanes[V];
  store(lanes, x);
  for (int i = 0; i < n; i++) p[i] = lanes[i];
}

// Float32 rounded to a two-byte type, towards +inf (`up`) or -inf.
template <class P>
F round_directed(F x, bool up) {
  using Signed = int16_t __attribute__((vector_size(2 * V)));
  S bits = narrow<P>(x);
  F y = widen<P>(bits);
  // One step in the wanted direction: the bit patterns of floats of one sign are ordered like their magnitudes.
  Signed away = ((Signed)bits >= 0) == (up ? Signed{} - 1 : Signed{});
  F stepped = widen<P>(away ? bits + 1 : bits - 1);
  return select(up ? y < x : y > x, stepped, y);
}

// ---- grids

struct Grid {
  int bits;  // 0: ternary
  int levels;
  float spacing, offset;
  bool symmetric;

  Grid(int64_t bits, bool symmetric)
      : bits(bits),
        levels(bits ? 1 << bits : 3),
        spacing(bits == 1 ? 2 : 1),
        offset(bits <= 1 ? 1 : 1 << (bits - 1)),
        symmetric(symmetric) {}

  F step(F scale) const { return scale * spacing; }
  F zero(F scale, F zero_point) const { return symmetric ? scale * -offset : zero_point; }
};

// What codes are divided by: beyond any value where the step is not positive, so that the codes are 0.
F divisor(F step) { return select(step > 0, step, all(INFINITE)); }

// Codes before they are rounded: their floor is the nearest level, halves rounded up.
F level(F quotient, float last) { return minimum(maximum(quotient, F{}), all(last)) + 0.5f; }
F codes_of(F quotient, float last) { return floor_of(level(quotient, last)); }

// ---- the range of least squared error

constexpr int RATIOS = 16, REFITS = 3;
constexpr float UNIT = 1 << 20, ERROR_UNIT = 1 << 30, ERROR_LIMIT = 1 << 20;

// Sum of squared errors on a grid that is the same for all lanes, in units of the range; of a part of the values, if
// all lanes exceed `limit` already.
L candidate_error(const F* u, int64_t count, float step, float zero, float last, L limit) {
  const float inverse = 1 / step;
  auto square = [&](F x) {
    F difference = x - zero, quotient = difference * inverse;
    // This gives the quotient as IEEE 754 rounds it, for these steps: tests/test_quantize.py.
    quotient = fused(fused(-quotient, all(step), difference), all(inverse), quotient);
    F error = x - (codes_of(quotient, last) * step + zero);
    return (U)truncated(error * error * ERROR_UNIT);
  };
  L sum = {};
  for (int64_t i = 0; i < count;) {
    U low = {}, high = {};
    const int64_t end = std::min<int64_t>(count, i + 32);
    for (; i + 4 <= end; i += 4) {
      // An error is at most 0.83, where a range of 2^-2.5 clips the end of a symmetric one: four fit.
      U four = (square(u[i]) + square(u[i + 1])) + (square(u[i + 2]) + square(u[i + 3]));
      low += four & 0xFFFF;
      high += four >> 16;
    }
    for (; i < end; i++) low += square(u[i]) & 0xFFFF, high += square(u[i]) >> 16;
    sum += (wide((I)high) << 16) + wide((I)low);
    if (!any(mask_of(sum <= limit))) break;
  }
  return sum;
}

// Sum of squared errors of the values on stored grids, in units of the range.
L stored_error(const F* x, int64_t count, F step, F zero, F unit, float last) {
  L sum = {};
  const F by = divisor(step);
  constexpr float SPLIT = 1 << 25;
  for (int64_t start = 0; start < count; start += 32) {
    I low = {}, high = {};
    for (int64_t i = start; i < std::min(count, start + 32); i++) {
      F error = (x[i] - (codes_of((x[i] - zero) / by, last) * step + zero)) / unit;
      F square = minimum(error * error, all(ERROR_LIMIT)) * ERROR_UNIT;
      I above = truncated(square * (1 / SPLIT));
      high += above;
      low += truncated(square - to_float(above) * SPLIT);
    }
    sum += (wide(high) << 25) + wide(low);
  }
  return sum;
}

// Step and zero point of least squared error of groups in units of their ranges.
void least_error_range(const F* u, int64_t count, const Grid& grid, const float* candidates, F& step, F& zero) {
  const float last = grid.levels - 1, middle = grid.offset / grid.spacing;
  const bool signs = grid.levels == 2 && grid.symmetric;  // one round of least squares gives mean|x|
  // From where the best of normally distributed values is, outwards: then the sums soon exceed the least.
  const int start = grid.bits == 0 ? 6 : grid.bits == 1 ? 10 : grid.bits == 2 ? 5 : grid.bits == 3 ? 2 : 0;
  L best = L{} + std::numeric_limits<int64_t>::max();
  step = all(candidates[0]), zero = all(candidates[RATIOS]);
  for (int k = 0; k < 2 * RATIOS && !signs; k++) {
    const int i = start + (k % 2 ? (k + 1) / 2 : -k / 2);
    if (i < 0 || i >= RATIOS) continue;
    const float new_step = candidates[i], new_zero = candidates[RATIOS + i];
    L error = candidate_error(u, count, new_step, new_zero, last, best);
    // Of equals the first candidate, which has the widest step.
    I better = mask_of(error < best) | (mask_of(error == best) & (all(new_step) > step));
    best = error < best ? error : best;
    step = select(better, all(new_step), step);
    zero = select(better, all(new_zero), zero);
  }
  for (int round = 0; round < (signs ? 1 : REFITS); round++) {
    L sum_c = {}, sum_cc = {}, sum_x = {}, sum_cx = {};
    for (int64_t start = 0; start < count; start += 512) {
      I c = {}, cc = {}, x = {}, low = {}, high = {};
      for (int64_t i = start; i < std::min(count, start + 512); i++) {
        I code = truncated(level((u[i] - zero) / step, last));
        // Twice the signed code, so that one bit is an integer too.
        if (grid.symmetric) code = 2 * code - (int)(2 * middle);
        I fixed = truncated(floor_of(u[i] * UNIT + 0.5f));
        I product = code * fixed;
        c += code;
        cc += code * code;
        x += fixed;
        low += product & 0xFFFF;
        high += product >> 16;
      }
      sum_c += wide(c);
      sum_cc += wide(cc);
      sum_x += wide(x);
      sum_cx += (wide(high) << 16) + wide(low);
    }
    L square = grid.symmetric ? sum_cc : count * sum_cc - sum_c * sum_c;
    L product = grid.symmetric ? 2 * sum_cx : count * sum_cx - sum_c * sum_x;
    F new_step = to_float(product) / to_float(square < 1 ? L{} + 1 : square) / UNIT;
    F new_zero =
        grid.symmetric ? new_step * -middle : (to_float(sum_x) / UNIT - new_step * to_float(sum_c)) / (float)count;
    I fits = mask_of(square > 0) & (new_step > 0);
    step = select(fits, new_step, step);
    zero = select(fits, new_zero, zero);
  }
}

struct Range {
  F low = all(INFINITE), high = all(-INFINITE);
  I bad = {};

  void extend(F x) {
    low = minimum(x, low);
    high = maximum(x, high);
    bad |= x != x;
  }
};

// Scale and zero point of V groups, whose values `x` `[count]` are looked at for a search only; the scale is NaN where
// a group does not fit. `u` is room for as many.
template <class P>
void choose(const Range& range, const Grid& grid, const float* candidates, float limit, const F* x, F* u, int64_t count,
            F& scale, F& zero_point) {
  const F low = range.low, high = range.high;
  const float last = grid.levels - 1;
  const bool has_minmax = grid.levels > 3 || !grid.symmetric;
  I fits = ~range.bad & (low >= -limit) & (high <= limit);
  scale = zero_point = F{};
  if (has_minmax) {
    F needed;
    if (grid.symmetric) {
      F above = -low / grid.offset, below = high / (last - grid.offset);
      needed = maximum(above, below);
    } else {
      zero_point = round_directed<P>(low, false);
      needed = (high - zero_point) / (last * grid.spacing);
    }
    scale = round_directed<P>(needed, true);
    fits &= scale < INFINITE;
  }
  if (x) {
    F base = grid.symmetric ? F{} : low, unit = grid.symmetric ? maximum(-low, high) : high - low;
    unit = select(fits & (unit > 0), unit, all(1));
    for (int64_t i = 0; i < count; i++) u[i] = select(fits, (x[i] - base) / unit, F{});
    F step, zero;
    least_error_range(u, count, grid, candidates, step, zero);
    F new_scale = minimum(step / grid.spacing * unit, all(limit));
    F new_zero = minimum(maximum(base + zero * unit, all(-limit)), all(limit));
    new_scale = select(grid.symmetric ? maximum(-low, high) > 0 : high > low, new_scale, F{});
    new_scale = widen<P>(narrow<P>(new_scale)), new_zero = widen<P>(narrow<P>(new_zero));
    I better = I{} - 1;
    if (has_minmax) {
      auto error = [&](F s, F z) { return stored_error(x, count, grid.step(s), grid.zero(s, z), unit, last); };
      better = mask_of(error(new_scale, new_zero) < error(scale, zero_point));
    }
    scale = select(better, new_scale, scale);
    zero_point = select(better, new_zero, zero_point);
  }
  F whole = grid.step(scale) * last, zero = grid.zero(scale, zero_point);
  fits &= (whole < INFINITE) & (zero < INFINITE) & (zero > -INFINITE);
  scale = select(fits, scale, all(NAN));
}

// ---- packing

// v, five ternary digits, to ceil(v * 256 / 243).
template <class X>
constexpr X ternary_byte(X v) {
  return (v * 8631 + 8100) >> 13;
}
constexpr bool ternary_bytes_are_right() {
  for (uint32_t v = 0; v < 243; v++)
    if (ternary_byte(v) != (v * 256 + 242) / 243) return false;
  return true;
}
static_assert(ternary_bytes_are_right());

// Tokens that fill whole words of every plane.
constexpr int tokens_of(int bits) { return bits == 0 ? 20 : bits == 3 ? 32 : 32 / bits; }

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Everything that a call of `alrd_quantize` is about.
struct Quantizing {
  const void* x;
  int32_t* packed;
  void *scale, *zero_point;
  int64_t parameter_type;
  const float *static_scale, *static_zero, *candidates;
  const int64_t* table;  // first channels and widths of the groups; null: per channel
  int64_t n, length, channels, groups, words, stride_n, stride_t;
  Grid grid;
  bool search;
  float limit;

  // What `choose` finds, with the parameters stored at `at`, `at + stride`, ... ; whether all `lanes` groups fit.
  bool find(const Range& range, const F* x, F* u, int64_t count, int64_t at, int64_t stride, int lanes, float* by,
            float* zero) const {
    F scale_found, zero_found;
    auto find = [&](auto* scales, auto* zeros) {
      using P = std::remove_pointer_t<decltype(scales)>;
      choose<P>(range, grid, candidates, limit, x, u, count, scale_found, zero_found);
      P stored[2][V];
      store(stored[0], scale_found), store(stored[1], zero_found);
      for (int i = 0; i < lanes; i++) {
        scales[at + i * stride] = stored[0][i];
        if (!grid.symmetric) zeros[at + i * stride] = stored[1][i];
      }
    };
    if (parameter_type == 1)
      find((Half*)scale, (Half*)zero_point);
    else
      find((BFloat*)scale, (BFloat*)zero_point);
    write(by, divisor(grid.step(scale_found)));
    write(zero, grid.zero(scale_found, zero_found));
    return !any(scale_found != scale_found);
  }
};

// Pack `columns` channels from `column` on of tokens [first, end) of block `n`. `by` and `zero` are of these channels,
// or of these tokens. Returns whether, per channel, all values are finite.
template <class T, int BITS, bool PER_CHANNEL>
bool pack(const Quantizing& call, int64_t n, int64_t first, int64_t end, int64_t column, int columns, const float* by,
          const float* zero) {
  constexpr int N = tokens_of(BITS), PART = BITS == 0 ? 5 : BITS == 3 ? 16 : N;
  const float last = call.grid.levels - 1;
  const T* x = (const T*)call.x + n * call.stride_n + column;
  int32_t* packed = call.packed + n * call.words * call.channels + column;
  T padded[BLOCK] = {};
  F bys[NV], zeros[NV], finite = {};
  if constexpr (PER_CHANNEL)
    for (int v = 0; v < NV; v++) bys[v] = load(by + v * V), zeros[v] = load(zero + v * V);
  auto store_words = [&](int64_t word, const U* row) __attribute__((always_inline)) {
    std::memcpy(packed + word * call.channels, row, columns == BLOCK ? 4 * BLOCK : 4 * columns);
  };

  for (int64_t run = first; run < end; run += N) {
    U words[NV] = {}, high[NV] = {};
    for (int start = 0; start < N && run + start < end; start += PART) {
      U part[NV] = {};
      const int count = std::min<int64_t>(PART, end - run - start);
      for (int k = 0; k < count; k++) {
        const int64_t t = run + start + k;
        const T* row = x + t * call.stride_t;
        if (columns < BLOCK) row = (const T*)std::memcpy(padded, row, columns * sizeof(T));
#pragma GCC unroll 4
        for (int v = 0; v < NV; v++) {
          F values = load(row + v * V);
          if constexpr (PER_CHANNEL) finite += values - values;
          F quotient = PER_CHANNEL ? (values - zeros[v]) / bys[v] : (values - zero[t - first]) / by[t - first];
          U code = (U)truncated(level(quotient, last));
          if constexpr (BITS == 0)
            part[v] = part[v] * 3 + code;
          else if constexpr (BITS == 3) {
            part[v] |= (code & 3) << (2 * k);
            high[v] |= (code >> 2) << (start + k);
          } else
            part[v] |= code << (BITS * k);
        }
      }
      if constexpr (BITS == 0)
        for (int v = 0; v < NV; v++) {
          for (int k = count; k < PART; k++) part[v] *= 3;
          words[v] |= ternary_byte(part[v]) << (start / 5 * 8);
        }
      else
        store_words((run + start) / PART, part);
    }
    if constexpr (BITS == 0) store_words(run / N, words);
    if constexpr (BITS == 3) store_words(ceil_div(call.length, 16) + run / N, high);
  }
  return !any(finite != 0);
}

// Ranges of up to `BLOCK` channels.
template <class T>
void range_of_channels(const T* x, int64_t stride, int64_t length, int columns, Range* ranges) {
  if (columns == BLOCK)
    for (int64_t t = 0; t < length; t++)
#pragma GCC unroll 4
      for (int v = 0; v < NV; v++) ranges[v].extend(load(x + t * stride + v * V));
  else
    for (int64_t t = 0; t < length; t++)
      for (int v = 0; v * V < columns; v++) ranges[v].extend(load(x + t * stride + v * V, columns - v * V));
}

// Range of `width` channels of a token, the same in all lanes.
template <class T>
Range range_of_token(const T* x, int64_t width) {
  Range range;
  int64_t c = 0;
  for (; c + V <= width; c += V) range.extend(load(x + c));
  if (c < width) range.extend(load(x + c, width - c));
  const I lanes = lanes_in_order();
#pragma GCC unroll 4
  for (int across = V / 2; across; across /= 2) {
    range.low = minimum(range.low, __builtin_shuffle(range.low, lanes ^ across));
    range.high = maximum(range.high, __builtin_shuffle(range.high, lanes ^ across));
    range.bad |= __builtin_shuffle(range.bad, lanes ^ across);
  }
  return range;
}

template <class T>
bool quantize_channels(const Quantizing& call, int64_t n, int64_t column, std::vector<F>& room, float* by,
                       float* zero) {
  const T* x = (const T*)call.x + n * call.stride_n + column;
  const int columns = std::min<int64_t>(call.channels - column, BLOCK);
  Range ranges[NV];
  if (!call.static_scale) range_of_channels(x, call.stride_t, call.length, columns, ranges);
  bool good = true;
  for (int v = 0; v * V < columns; v++) {
    const int lanes = std::min(columns - v * V, V);
    const int64_t c = column + v * V;
    if (call.static_scale) {
      F scale = load(call.static_scale + c, lanes);
      F zero_point = call.grid.symmetric ? F{} : load(call.static_zero + c, lanes);
      write(by + v * V, divisor(call.grid.step(scale)));
      write(zero + v * V, call.grid.zero(scale, zero_point));
      continue;
    }
    F *values = nullptr, *u = nullptr;
    if (call.search) {
      room.resize(2 * call.length);
      values = room.data(), u = values + call.length;
      for (int64_t t = 0; t < call.length; t++) values[t] = load(x + t * call.stride_t + v * V, lanes);
    }
    const int64_t at = n * call.channels + c;
    good &= call.find(ranges[v], values, u, call.length, at, 1, lanes, by + v * V, zero + v * V);
  }
  return good;
}

template <class T>
bool quantize_tokens(const Quantizing& call, int64_t n, int64_t first, int64_t end, int64_t group, std::vector<F>& room,
                     float* by, float* zero) {
  const int64_t width = call.table[call.groups + group];
  const T* x = (const T*)call.x + n * call.stride_n + call.table[group];
  bool good = true;
  for (int64_t t = first; t < end; t += V) {
    const int lanes = std::min<int64_t>(end - t, V);
    auto row = [&](int i) { return x + (t + std::min(i, lanes - 1)) * call.stride_t; };
    Range range;
    const I lane = lanes_in_order();
    for (int i = 0; i < V; i++) {
      const Range token = range_of_token(row(i), width);
      const I here = lane == i;
      range.low = select(here, token.low, range.low);
      range.high = select(here, token.high, range.high);
      range.bad |= here & token.bad;
    }
    F *values = nullptr, *u = nullptr;
    if (call.search) {
      room.resize(2 * width);
      values = room.data(), u = values + width;
      for (int i = 0; i < V; i++)
        for (int64_t c = 0; c < width; c += V) {
          const int count = std::min<int64_t>(width - c, V);
          F part = load(row(i) + c, count);
          for (int k = 0; k < count; k++) values[c + k][i] = part[k];
        }
    }
    const int64_t at = (n * call.length + t) * call.groups + group;
    good &= call.find(range, values, u, width, at, call.groups, lanes, by + t - first, zero + t - first);
  }
  return good;
}

template <class T, int BITS>
bool quantize(const Quantizing& call, int64_t threads) {
  // Tokens of which groups are quantized together; a whole number of words.
  constexpr int TOKENS = BITS == 0 ? 80 : 32;
  static_assert(TOKENS % V == 0 && TOKENS % tokens_of(BITS) == 0);
  const int64_t blocks = call.table ? call.groups : ceil_div(call.channels, BLOCK);
  const int64_t parts = call.table ? ceil_div(call.length, TOKENS) : 1;
  bool good = true;
#pragma omp parallel num_threads(threads) reduction(&& : good)
  {
    std::vector<F> room;
    alignas(64) float by[std::max(TOKENS, BLOCK)] = {}, zero[std::max(TOKENS, BLOCK)] = {};
#pragma omp for
    for (int64_t task = 0; task < call.n * blocks * parts; task++) {
      const int64_t n = task / blocks / parts, first = task / blocks % parts * TOKENS, block = task % blocks;
      if (call.table) {
        const int64_t end = std::min(first + TOKENS, call.length);
        good &= quantize_tokens<T>(call, n, first, end, block, room, by, zero);
        int64_t c = call.table[block];
        for (int64_t width = call.table[call.groups + block]; width > 0; width -= BLOCK, c += BLOCK)
          pack<T, BITS, false>(call, n, first, end, c, std::min<int64_t>(width, BLOCK), by, zero);
      } else {
        const int64_t c = block * BLOCK;
        const int columns = std::min<int64_t>(call.channels - c, BLOCK);
        good &= quantize_channels<T>(call, n, c, room, by, zero);
        good &= pack<T, BITS, true>(call, n, 0, call.length, c, columns, by, zero);
      }
    }
  }
  return good;
}

// `run` with the type `bits` as a constant.
template <class Run>
auto with_bits(int bits, Run run) {
  switch (bits) {
    case 0: return run(std::integral_constant<int, 0>());
    case 1: return run(std::integral_constant<int, 1>());
    case 2: return run(std::integral_constant<int, 2>());
    case 3: return run(std::integral_constant<int, 3>());
    case 4: return run(std::integral_constant<int, 4>());
    default: return run(std::integral_constant<int, 8>());
  }
}

// `run` with a pointer of the type that has this number.
template <class Run>
auto with_type(int64_t type, const void* p, Run run) {
  if (type == 0) return run((const float*)p);
  return type == 1 ? run((const Half*)p) : run((const BFloat*)p);
}

// ---- unpacking

// Everything that a call of `alrd_dequantize` is about.
struct Dequantizing {
  const int32_t* packed;
  const void *scale, *zero_point;
  int64_t parameter_type;
  void* states;
  const int64_t* table;
  int64_t n, length, channels, groups, stride_n, stride_w, stride_scale;
  Grid grid;
  float limit;

  // Steps and zero points of `count` parameters that stand at `at`, `at + stride`, ...
  void read_grids(int64_t at, int64_t stride, int count, float* step, float* zero) const {
    with_type(parameter_type, scale, [&](auto* scales) {
      auto* zeros = (decltype(scales))zero_point;
      std::remove_const_t<std::remove_pointer_t<decltype(scales)>> lanes[2][BLOCK] = {};
      for (int i = 0; i < count; i++) {
        lanes[0][i] = scales[at + i * stride];
        if (!grid.symmetric) lanes[1][i] = zeros[at + i * stride];
      }
      for (int i = 0; i < count; i += V) {
        F scale = load(lanes[0] + i), zero_point = load(lanes[1] + i);
        write(step + i, grid.step(scale));
        write(zero + i, grid.zero(scale, zero_point));
      }
    });
  }
};

// States of up to `tokens_of(BITS)` tokens from `first` on, of `columns` channels from `column` on. `step` and `zero`
// are of these channels, or of these tokens.
template <class T, int BITS, bool PER_CHANNEL>
void unpack(const Dequantizing& call, int64_t n, int64_t first, int64_t column, int columns, const float* step,
            const float* zero) {
  constexpr int N = tokens_of(BITS), PART = BITS == 0 ? 5 : BITS == 3 ? 16 : N;
  const int64_t end = std::min(first + N, call.length);
  const int32_t* packed = call.packed + n * call.stride_n + column;
  T *states = (T*)call.states + n * call.length * call.channels + column, padded[BLOCK];
  F steps[NV], zeros[NV];
  if constexpr (PER_CHANNEL)
    for (int v = 0; v < NV; v++) steps[v] = load(step + v * V), zeros[v] = load(zero + v * V);
  auto load_words = [&](int64_t word, U* row) __attribute__((always_inline)) {
    std::memcpy(row, packed + word * call.stride_w, columns == BLOCK ? 4 * BLOCK : 4 * columns);
  };

  U words[NV] = {}, high[NV] = {};
  if constexpr (BITS == 0) load_words(first / N, words);
  if constexpr (BITS == 3) load_words(ceil_div(call.length, 16) + first / N, high);
  for (int64_t start = first; start < end; start += PART) {
    if constexpr (BITS != 0) load_words(start / PART, words);
    U digits[NV];
    if constexpr (BITS == 0)
      for (int v = 0; v < NV; v++) digits[v] = (words[v] >> ((start - first) / 5 * 8)) & 255;
    const int count = std::min<int64_t>(PART, end - start);
    for (int k = 0; k < count; k++) {
      const int64_t t = start + k;
      T* row = states + t * call.channels;
      T* to = columns == BLOCK ? row : padded;
#pragma GCC unroll 4
      for (int v = 0; v < NV; v++) {
        U code;
        if constexpr (BITS == 0) {
          code = (digits[v] * 3) >> 8;
          digits[v] = (digits[v] * 3) & 255;
        } else if constexpr (BITS == 3)
          code = ((words[v] >> (2 * k)) & 3) | ((high[v] >> (t - first)) & 1) << 2;
        else
          code = (words[v] >> (BITS * k)) & ((1 << BITS) - 1);
        F x = to_float((I)code);
        x = PER_CHANNEL ? x * steps[v] + zeros[v] : x * step[t - first] + zero[t - first];
        store(to + v * V, minimum(maximum(x, all(-call.limit)), all(call.limit)));
      }
      if (columns < BLOCK) std::memcpy(row, padded, columns * sizeof(T));
    }
  }
}

template <class T, int BITS>
void dequantize(const Dequantizing& call, int64_t threads) {
  constexpr int N = tokens_of(BITS);
  const int64_t runs = ceil_div(call.length, N);
  static_assert(N <= BLOCK);
#pragma omp parallel for num_threads(threads)
  for (int64_t task = 0; task < call.n * runs; task++) {
    const int64_t n = task / runs, first = task % runs * N;
    alignas(64) float step[BLOCK] = {}, zero[BLOCK] = {};
    if (!call.table)
      for (int64_t c = 0; c < call.channels; c += BLOCK) {
        const int columns = std::min<int64_t>(call.channels - c, BLOCK);
        call.read_grids(n * call.stride_scale + c, 1, columns, step, zero);
        unpack<T, BITS, true>(call, n, first, c, columns, step, zero);
      }
    for (int64_t group = 0; group < call.groups; group++) {
      const int count = std::min<int64_t>(call.length - first, N);
      call.read_grids((n * call.length + first) * call.groups + group, call.groups, count, step, zero);
      int64_t c = call.table[group];
      for (int64_t width = call.table[call.groups + group]; width > 0; width -= BLOCK, c += BLOCK)
        unpack<T, BITS, false>(call, n, first, c, std::min<int64_t>(width, BLOCK), step, zero);
    }
  }
}

}  // namespace

// ---- interface: types are 0 float32, 1 float16, 2 bfloat16; `bits` is 0 for ternary codes

// Returns whether every group could be quantized; with static scales, whether all values are finite.
extern "C" int64_t alrd_quantize(const void* x, int64_t type, int32_t* packed, void* scale, void* zero_point,
                                 int64_t parameter_type, const float* static_scale, const float* static_zero,
                                 const float* candidates, const int64_t* table, int64_t n, int64_t length,
                                 int64_t channels, int64_t groups, int64_t words, int64_t stride_n, int64_t stride_t,
                                 int64_t bits, int64_t symmetric, int64_t search, float limit, int64_t threads) {
  const Quantizing call = {x,
                           packed,
                           scale,
                           zero_point,
                           parameter_type,
                           static_scale,
                           static_zero,
                           candidates,
                           table,
                           n,
                           length,
                           channels,
                           groups,
                           words,
                           stride_n,
                           stride_t,
                           {bits, symmetric != 0},
                           search != 0,
                           limit};
  return with_type(type, x, [&](auto* typed) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(typed)>>;
    return with_bits(bits, [&](auto width) { return quantize<T, width>(call, threads); });
  });
}

extern "C" int64_t alrd_dequantize(const int32_t* packed, const void* scale, const void* zero_point,
                                   int64_t parameter_type, void* states, int64_t type, const int64_t* table, int64_t n,
                                   int64_t length, int64_t channels, int64_t groups, int64_t stride_n, int64_t stride_w,
                                   int64_t stride_scale, int64_t bits, int64_t symmetric, float limit,
                                   int64_t threads) {
  const Dequantizing call = {
      packed,   scale,    zero_point,   parameter_type,         states, table, n, length, channels, groups,
      stride_n, stride_w, stride_scale, {bits, symmetric != 0}, limit};
  with_type(type, states, [&](auto* typed) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(typed)>>;
    with_bits(bits, [&](auto width) { dequantize<T, width>(call, threads); });
  });
  return 0;
}
