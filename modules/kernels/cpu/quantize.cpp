// Kernels of modules/quant_utils.py for CPUs; the same bits come out. Format and formulas are explained there, the
// interface in quantize.py. The scales of tokens are those of `TokenScaledCodec` in modules/cache/codecs.py.
//
// What makes the bits equal: float32 throughout, IEEE divisions, no contraction of a product and a sum
// (-ffp-contract=off), and sums over integers, whose order does not matter.
//
// A vector is one register, of 8 or 16 lanes, with GCC's operators: the formulas read as the reference's. vf: float32,
// vi: int32, vu: uint32, vs: uint16, vl: int64, vd: float64. Vectors go along channels, where the states and the packed
// words lie side by side. Only the search of a range turns groups of a token around, so that a lane is a group there in
// either orientation.

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "numbers.h"

namespace {

#ifdef __AVX512F__
constexpr int V = 16;
#else
constexpr int V = 8;
#endif
using vf = float __attribute__((vector_size(4 * V)));
using vi = int32_t __attribute__((vector_size(4 * V)));
using vu = uint32_t __attribute__((vector_size(4 * V)));
using vs = uint16_t __attribute__((vector_size(2 * V)));
using vl = int64_t __attribute__((vector_size(8 * V)));
using vd = double __attribute__((vector_size(4 * V)));  // half as many lanes

// Vectors of channels that are packed together.
constexpr int NV = 4, BLOCK = NV * V;

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

vf set1(float x) { return vf{} + x; }

#ifdef __AVX512F__
// If either is NaN, the second operand.
vf min(vf a, vf b) { return (vf)_mm512_min_ps((__m512)a, (__m512)b); }
vf max(vf a, vf b) { return (vf)_mm512_max_ps((__m512)a, (__m512)b); }
vf fma(vf a, vf b, vf c) { return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
vf floor(vf x) { return (vf)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }
vf from_half(vs x) { return (vf)_mm512_cvtph_ps((__m256i)x); }
vs to_half(vf x) { return (vs)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
bool any(vi mask) { return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask); }
vd lower_half(vf x) { return (vd)_mm512_cvtps_pd(_mm512_castps512_ps256((__m512)x)); }
vd upper_half(vf x) { return (vd)_mm512_cvtps_pd((__m256)_mm512_extractf64x4_pd((__m512d)x, 1)); }
#else
vf min(vf a, vf b) { return (vf)_mm256_min_ps((__m256)a, (__m256)b); }
vf max(vf a, vf b) { return (vf)_mm256_max_ps((__m256)a, (__m256)b); }
vf fma(vf a, vf b, vf c) { return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
vf floor(vf x) { return (vf)_mm256_floor_ps((__m256)x); }
vf from_half(vs x) { return (vf)_mm256_cvtph_ps((__m128i)x); }
vs to_half(vf x) { return (vs)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT); }
bool any(vi mask) { return _mm256_movemask_ps((__m256)mask); }
vd lower_half(vf x) { return (vd)_mm256_cvtps_pd(_mm256_castps256_ps128((__m256)x)); }
vd upper_half(vf x) { return (vd)_mm256_cvtps_pd(_mm256_extractf128_ps((__m256)x, 1)); }
#endif

vi lanes_in_order() {
  vi lanes;
  for (int i = 0; i < V; i++) lanes[i] = i;
  return lanes;
}

vf select(vi mask, vf a, vf b) { return mask ? a : b; }
vl wide(vi x) { return __builtin_convertvector(x, vl); }
vi mask_of(vl x) { return __builtin_convertvector(x, vi); }
vi truncated(vf x) { return __builtin_convertvector(x, vi); }
vf to_float(vi x) { return __builtin_convertvector(x, vf); }
vf to_float(vl x) { return __builtin_convertvector(x, vf); }
template <class T>
vf widen(vs bits);
template <>
vf widen<Half>(vs bits) {
  return from_half(bits);
}
template <>
vf widen<BFloat>(vs bits) {
  return (vf)(__builtin_convertvector(bits, vu) << 16);
}

template <class T>
vs narrow(vf x);
template <>
vs narrow<Half>(vf x) {
  return to_half(x);
}
template <>
vs narrow<BFloat>(vf x) {
  vu bits = (vu)x;
  return __builtin_convertvector((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16, vs);
}

template <class T>
vf load(const T* p) {
  if constexpr (sizeof(T) == 4)
    return read<vf>(p);
  else
    return widen<T>(read<vs>(p));
}

template <class T>
void store(T* p, vf x) {
  if constexpr (sizeof(T) == 4)
    write(p, x);
  else
    write(p, narrow<T>(x));
}

// The first n lanes of what starts at p, the others filled with the first.
template <class T>
vf load(const T* p, int n) {
  if (n >= V) return load(p);
  T lanes[V];
  for (int i = 0; i < V; i++) lanes[i] = p[i < n ? i : 0];
  return load(lanes);
}

template <class T>
void store(T* p, vf x, int n) {
  if (n >= V) return store(p, x);
  T lanes[V];
  store(lanes, x);
  for (int i = 0; i < n; i++) p[i] = lanes[i];
}

// Float32 rounded to a two-byte type, towards +inf (`up`) or -inf.
template <class P>
vf round_directed(vf x, bool up) {
  using Signed = int16_t __attribute__((vector_size(2 * V)));
  vs bits = narrow<P>(x);
  vf y = widen<P>(bits);
  // One step in the wanted direction: the bit patterns of floats of one sign are ordered like their magnitudes.
  Signed away = ((Signed)bits >= 0) == (up ? Signed{} - 1 : Signed{});
  vf stepped = widen<P>(away ? bits + 1 : bits - 1);
  return select(up ? y < x : y > x, stepped, y);
}

// Levels of a width, as `grid` in modules/quant_utils.py has them.
struct Grid {
  int32_t bits, levels;
  float spacing, offset;
  int32_t symmetric;

  vf step(vf scale) const { return scale * spacing; }
  vf zero(vf scale, vf zero_point) const { return symmetric ? scale * -offset : zero_point; }
};

// Divisor of a group's values: beyond any value where the step is not positive, so that the codes are 0.
vf divisor(vf step) { return select(step > 0, step, set1(INFINITE)); }

// Codes before they are rounded: their floor is the nearest level, halves rounded up.
vf level(vf quotient, float last) { return min(max(quotient, vf{}), set1(last)) + 0.5f; }
vf codes_of(vf quotient, float last) { return floor(level(quotient, last)); }

constexpr int RATIOS = 16, REFITS = 3;
constexpr float UNIT = 1 << 20, ERROR_UNIT = 1 << 30, ERROR_LIMIT = 1 << 20;

// Sum of squared errors on a grid that is the same for all lanes, in units of the range. It stops early once all lanes
// exceed `limit`.
vl candidate_error(const vf* u, int64_t count, float step, float zero, float last, vl limit) {
  const float inverse = 1 / step;
  auto square = [&](vf x) {
    vf difference = x - zero, quotient = difference * inverse;
    // This gives the quotient as IEEE 754 rounds it, for these steps: tests/test_quantize_cpu.py.
    quotient = fma(fma(-quotient, set1(step), difference), set1(inverse), quotient);
    vf error = x - (codes_of(quotient, last) * step + zero);
    return (vu)truncated(error * error * ERROR_UNIT);
  };
  vl sum = {};
  for (int64_t i = 0; i < count;) {
    vu low = {}, high = {};
    const int64_t end = std::min<int64_t>(count, i + 32);
    for (; i + 4 <= end; i += 4) {
      // An error is at most 0.83, where a range of 2^-2.5 clips the end of a symmetric one: four fit.
      vu four = (square(u[i]) + square(u[i + 1])) + (square(u[i + 2]) + square(u[i + 3]));
      low += four & 0xFFFF;
      high += four >> 16;
    }
    for (; i < end; i++) {
      low += square(u[i]) & 0xFFFF;
      high += square(u[i]) >> 16;
    }
    sum += (wide((vi)high) << 16) + wide((vi)low);
    if (!any(mask_of(sum <= limit))) break;
  }
  return sum;
}

// Sum of squared errors of the values on stored grids, in units of the range.
vl stored_error(const vf* x, int64_t count, vf step, vf zero, vf unit, float last) {
  vl sum = {};
  const vf by = divisor(step);
  constexpr float SPLIT = 1 << 25;
  for (int64_t start = 0; start < count; start += 32) {
    vi low = {}, high = {};
    for (int64_t i = start; i < std::min(count, start + 32); i++) {
      vf error = (x[i] - (codes_of((x[i] - zero) / by, last) * step + zero)) / unit;
      vf square = min(error * error, set1(ERROR_LIMIT)) * ERROR_UNIT;
      vi above = truncated(square * (1 / SPLIT));
      high += above;
      low += truncated(square - to_float(above) * SPLIT);
    }
    sum += (wide(high) << 25) + wide(low);
  }
  return sum;
}

// Step and zero point of least squared error of groups in units of their ranges.
void least_error_range(const vf* u, int64_t count, const Grid& grid, const float* candidates, vf& step, vf& zero) {
  const float last = grid.levels - 1, middle = grid.offset / grid.spacing;
  const bool signs = grid.levels == 2 && grid.symmetric;  // one round of least squares gives mean|x|
  // The best candidate of normally distributed values comes first, then its neighbours: the sums soon exceed the least.
  const int start = grid.bits == TERNARY ? 6 : grid.bits == 1 ? 10 : grid.bits == 2 ? 5 : grid.bits == 3 ? 2 : 0;
  vl best = vl{} + std::numeric_limits<int64_t>::max();
  step = set1(candidates[0]);
  zero = set1(candidates[RATIOS]);
  for (int k = 0; k < 2 * RATIOS && !signs; k++) {
    const int i = start + (k % 2 ? (k + 1) / 2 : -k / 2);
    if (i < 0 || i >= RATIOS) continue;
    const float new_step = candidates[i], new_zero = candidates[RATIOS + i];
    vl error = candidate_error(u, count, new_step, new_zero, last, best);
    // Equal errors go to the first candidate, which has the widest step.
    vi better = mask_of(error < best) | (mask_of(error == best) & (set1(new_step) > step));
    best = error < best ? error : best;
    step = select(better, set1(new_step), step);
    zero = select(better, set1(new_zero), zero);
  }
  for (int round = 0; round < (signs ? 1 : REFITS); round++) {
    vl sum_c = {}, sum_cc = {}, sum_x = {}, sum_cx = {};
    for (int64_t start = 0; start < count; start += 512) {
      vi c = {}, cc = {}, x = {}, low = {}, high = {};
      for (int64_t i = start; i < std::min(count, start + 512); i++) {
        vi code = truncated(level((u[i] - zero) / step, last));
        // Twice the signed code, so that one bit is an integer too.
        if (grid.symmetric) code = 2 * code - (int)(2 * middle);
        vi fixed = truncated(floor(u[i] * UNIT + 0.5f));
        vi product = code * fixed;
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
    vl square = grid.symmetric ? sum_cc : count * sum_cc - sum_c * sum_c;
    vl product = grid.symmetric ? 2 * sum_cx : count * sum_cx - sum_c * sum_x;
    vf new_step = to_float(product) / to_float(square < 1 ? vl{} + 1 : square) / UNIT;
    vf new_zero =
        grid.symmetric ? new_step * -middle : (to_float(sum_x) / UNIT - new_step * to_float(sum_c)) / (float)count;
    vi fits = mask_of(square > 0) & (new_step > 0);
    step = select(fits, new_step, step);
    zero = select(fits, new_zero, zero);
  }
}

struct Range {
  vf low = set1(INFINITE), high = set1(-INFINITE);
  vi bad = {};

  void extend(vf x) {
    low = min(x, low);
    high = max(x, high);
    bad |= x != x;
  }
};

// Scale and zero point of V groups, whose values `x` `[count]` are looked at for a search only; the scale is NaN where
// a group does not fit. `u` is room for as many.
template <class P>
void choose(const Range& range, const Grid& grid, const float* candidates, float limit, const vf* x, vf* u,
            int64_t count, vf& scale, vf& zero_point) {
  const vf low = range.low, high = range.high;
  const float last = grid.levels - 1;
  const bool has_minmax = grid.levels > 3 || !grid.symmetric;
  vi fits = ~range.bad & (low >= -limit) & (high <= limit);
  scale = zero_point = vf{};
  if (has_minmax) {
    vf needed;
    if (grid.symmetric) {
      vf above = -low / grid.offset, below = high / (last - grid.offset);
      needed = max(above, below);
    } else {
      zero_point = round_directed<P>(low, false);
      needed = (high - zero_point) / (last * grid.spacing);
    }
    scale = round_directed<P>(needed, true);
    fits &= scale < INFINITE;
  }
  if (x) {
    vf base = grid.symmetric ? vf{} : low, unit = grid.symmetric ? max(-low, high) : high - low;
    unit = select(fits & (unit > 0), unit, set1(1));
    for (int64_t i = 0; i < count; i++) u[i] = select(fits, (x[i] - base) / unit, vf{});
    vf step, zero;
    least_error_range(u, count, grid, candidates, step, zero);
    vf new_scale = min(step / grid.spacing * unit, set1(limit));
    vf new_zero = min(max(base + zero * unit, set1(-limit)), set1(limit));
    new_scale = select(grid.symmetric ? max(-low, high) > 0 : high > low, new_scale, vf{});
    new_scale = widen<P>(narrow<P>(new_scale));
    new_zero = widen<P>(narrow<P>(new_zero));
    vi better = vi{} - 1;
    if (has_minmax) {
      auto error = [&](vf s, vf z) { return stored_error(x, count, grid.step(s), grid.zero(s, z), unit, last); };
      better = mask_of(error(new_scale, new_zero) < error(scale, zero_point));
    }
    scale = select(better, new_scale, scale);
    zero_point = select(better, new_zero, zero_point);
  }
  vf whole = grid.step(scale) * last, zero = grid.zero(scale, zero_point);
  fits &= (whole < INFINITE) & (zero < INFINITE) & (zero > -INFINITE);
  scale = select(fits, scale, set1(NAN));
}

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
constexpr int tokens_of(int bits) {
  return bits == TERNARY ? 20 : 32 / (low_bits(bits) < bits ? bits - low_bits(bits) : bits);
}

// Tokens of a word of the low plane; of a byte of ternary codes.
constexpr int part_of(int bits) { return bits == TERNARY ? 5 : 32 / low_bits(bits); }

// Arguments of `alrd_quantize` (quantize.py has the same structure); strides in elements.
struct Quantizing {
  const void* x;                            // [n, length, channels]
  int32_t* packed;                          // [n, words, channels]
  void *scale, *zero_point;                 // zero_point: null if symmetric
  const float *static_scale, *static_zero;  // [channels], or null
  const float* candidates;                  // [2, RATIOS] steps and zero points that a search tries
  const int64_t* table;                     // [2, groups] first channels and widths of the groups; null: per channel
  int64_t n, length, channels, groups, words, stride_n, stride_t;
  Grid grid;
  int32_t type, parameter_type, search, threads;
  float limit;

  // Choose the parameters of `lanes` groups and store them at `at`, `at + stride`, …; returns whether all groups fit.
  bool find(const Range& range, const vf* x, vf* u, int64_t count, int64_t at, int64_t stride, int lanes, float* by,
            float* zero) const {
    vf scale_found, zero_found;
    auto find = [&](auto* scales, auto* zeros) {
      using P = std::remove_pointer_t<decltype(scales)>;
      choose<P>(range, grid, candidates, limit, x, u, count, scale_found, zero_found);
      P stored[2][V];
      store(stored[0], scale_found);
      store(stored[1], zero_found);
      for (int i = 0; i < lanes; i++) {
        scales[at + i * stride] = stored[0][i];
        if (!grid.symmetric) zeros[at + i * stride] = stored[1][i];
      }
    };
    if (parameter_type == FLOAT16)
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
  constexpr int N = tokens_of(BITS), PART = part_of(BITS), LOW = low_bits(BITS), HIGH = BITS - LOW;
  const float last = call.grid.levels - 1;
  const T* x = (const T*)call.x + n * call.stride_n + column;
  int32_t* packed = call.packed + n * call.words * call.channels + column;
  T padded[BLOCK] = {};
  vf bys[NV], zeros[NV], finite = {};
  if constexpr (PER_CHANNEL)
    for (int v = 0; v < NV; v++) {
      bys[v] = load(by + v * V);
      zeros[v] = load(zero + v * V);
    }
  auto store_words = [&](int64_t word, const vu* row) INLINE {
    std::memcpy(packed + word * call.channels, row, columns == BLOCK ? 4 * BLOCK : 4 * columns);
  };

  for (int64_t run = first; run < end; run += N) {
    vu words[NV] = {}, high[NV] = {};
    for (int start = 0; start < N && run + start < end; start += PART) {
      vu part[NV] = {};
      const int count = std::min<int64_t>(PART, end - run - start);
      for (int k = 0; k < count; k++) {
        const int64_t t = run + start + k;
        const T* row = x + t * call.stride_t;
        if (columns < BLOCK) row = (const T*)std::memcpy(padded, row, columns * sizeof(T));
#pragma GCC unroll 4
        for (int v = 0; v < NV; v++) {
          vf values = load(row + v * V);
          if constexpr (PER_CHANNEL) finite += values - values;
          vf quotient = PER_CHANNEL ? (values - zeros[v]) / bys[v] : (values - zero[t - first]) / by[t - first];
          vu code = (vu)truncated(level(quotient, last));
          if constexpr (BITS == TERNARY)
            part[v] = part[v] * 3 + code;
          else {
            part[v] |= (code & ((1 << LOW) - 1)) << (LOW * k);
            if constexpr (HIGH) high[v] |= (code >> LOW) << (HIGH * (start + k));
          }
        }
      }
      if constexpr (BITS == TERNARY)
        for (int v = 0; v < NV; v++) {
          for (int k = count; k < PART; k++) part[v] *= 3;
          words[v] |= ternary_byte(part[v]) << (start / 5 * 8);
        }
      else
        store_words((run + start) / PART, part);
    }
    if constexpr (BITS == TERNARY) store_words(run / N, words);
    if constexpr (HIGH) store_words(ceil_div(call.length, PART) + run / N, high);
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
  const vi lanes = lanes_in_order();
#pragma GCC unroll 4
  for (int across = V / 2; across; across /= 2) {
    range.low = min(range.low, __builtin_shuffle(range.low, lanes ^ across));
    range.high = max(range.high, __builtin_shuffle(range.high, lanes ^ across));
    range.bad |= __builtin_shuffle(range.bad, lanes ^ across);
  }
  return range;
}

template <class T>
bool quantize_channels(const Quantizing& call, int64_t n, int64_t column, std::vector<vf>& room, float* by,
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
      vf scale = load(call.static_scale + c, lanes);
      vf zero_point = call.grid.symmetric ? vf{} : load(call.static_zero + c, lanes);
      write(by + v * V, divisor(call.grid.step(scale)));
      write(zero + v * V, call.grid.zero(scale, zero_point));
      continue;
    }
    vf *values = nullptr, *u = nullptr;
    if (call.search) {
      room.resize(2 * call.length);
      values = room.data();
      u = values + call.length;
      for (int64_t t = 0; t < call.length; t++) values[t] = load(x + t * call.stride_t + v * V, lanes);
    }
    const int64_t at = n * call.channels + c;
    good &= call.find(ranges[v], values, u, call.length, at, 1, lanes, by + v * V, zero + v * V);
  }
  return good;
}

template <class T>
bool quantize_tokens(const Quantizing& call, int64_t n, int64_t first, int64_t end, int64_t group,
                     std::vector<vf>& room, float* by, float* zero) {
  const int64_t width = call.table[call.groups + group];
  const T* x = (const T*)call.x + n * call.stride_n + call.table[group];
  bool good = true;
  for (int64_t t = first; t < end; t += V) {
    const int lanes = std::min<int64_t>(end - t, V);
    auto row = [&](int i) { return x + (t + std::min(i, lanes - 1)) * call.stride_t; };
    Range range;
    const vi lane = lanes_in_order();
    for (int i = 0; i < V; i++) {
      const Range token = range_of_token(row(i), width);
      const vi here = lane == i;
      range.low = select(here, token.low, range.low);
      range.high = select(here, token.high, range.high);
      range.bad |= here & token.bad;
    }
    vf *values = nullptr, *u = nullptr;
    if (call.search) {
      room.resize(2 * width);
      values = room.data();
      u = values + width;
      for (int i = 0; i < V; i++)
        for (int64_t c = 0; c < width; c += V) {
          const int count = std::min<int64_t>(width - c, V);
          vf part = load(row(i) + c, count);
          for (int k = 0; k < count; k++) values[c + k][i] = part[k];
        }
    }
    const int64_t at = (n * call.length + t) * call.groups + group;
    good &= call.find(range, values, u, width, at, call.groups, lanes, by + t - first, zero + t - first);
  }
  return good;
}

template <class T, int BITS>
bool quantize(const Quantizing& call) {
  // Tokens whose groups are quantized together; a whole number of words.
  constexpr int TOKENS = BITS == TERNARY ? 80 : 32;
  static_assert(TOKENS % V == 0 && TOKENS % tokens_of(BITS) == 0);
  const int64_t blocks = call.table ? call.groups : ceil_div(call.channels, BLOCK);
  const int64_t parts = call.table ? ceil_div(call.length, TOKENS) : 1;
  bool good = true;
#pragma omp parallel num_threads(call.threads) reduction(&& : good)
  {
    std::vector<vf> room;
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

// `run` with a pointer of the type that has this code.
template <class Run>
auto with_type(int64_t type, const void* p, Run run) {
  if (type == FLOAT32) return run((const float*)p);
  return type == FLOAT16 ? run((const Half*)p) : run((const BFloat*)p);
}

// Arguments of `alrd_dequantize` (quantize.py has the same structure); strides in elements.
struct Dequantizing {
  const int32_t* packed;           // [n, words, channels]
  const void *scale, *zero_point;  // zero_point: null if symmetric
  void* states;                    // [n, length, channels]
  const int64_t* table;            // as for `Quantizing`
  int64_t n, length, channels, groups, stride_n, stride_w, stride_scale;
  Grid grid;
  int32_t type, parameter_type, threads;
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
        vf scale = load(lanes[0] + i), zero_point = load(lanes[1] + i);
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
  constexpr int N = tokens_of(BITS), PART = part_of(BITS), LOW = low_bits(BITS), HIGH = BITS - LOW;
  const int64_t end = std::min(first + N, call.length);
  const int32_t* packed = call.packed + n * call.stride_n + column;
  T *states = (T*)call.states + n * call.length * call.channels + column, padded[BLOCK];
  vf steps[NV], zeros[NV];
  if constexpr (PER_CHANNEL)
    for (int v = 0; v < NV; v++) {
      steps[v] = load(step + v * V);
      zeros[v] = load(zero + v * V);
    }
  auto load_words = [&](int64_t word, vu* row) INLINE {
    std::memcpy(row, packed + word * call.stride_w, columns == BLOCK ? 4 * BLOCK : 4 * columns);
  };

  vu words[NV] = {}, high[NV] = {};
  if constexpr (BITS == TERNARY) load_words(first / N, words);
  if constexpr (HIGH) load_words(ceil_div(call.length, PART) + first / N, high);
  for (int64_t start = first; start < end; start += PART) {
    if constexpr (BITS != TERNARY) load_words(start / PART, words);
    vu digits[NV];
    if constexpr (BITS == TERNARY)
      for (int v = 0; v < NV; v++) digits[v] = (words[v] >> ((start - first) / 5 * 8)) & 255;
    const int count = std::min<int64_t>(PART, end - start);
    for (int k = 0; k < count; k++) {
      const int64_t t = start + k;
      T* row = states + t * call.channels;
      T* to = columns == BLOCK ? row : padded;
#pragma GCC unroll 4
      for (int v = 0; v < NV; v++) {
        vu code;
        if constexpr (BITS == TERNARY) {
          code = (digits[v] * 3) >> 8;
          digits[v] = (digits[v] * 3) & 255;
        } else {
          code = (words[v] >> (LOW * k)) & ((1 << LOW) - 1);
          if constexpr (HIGH) code |= ((high[v] >> (HIGH * (t - first))) & ((1 << HIGH) - 1)) << LOW;
        }
        vf x = to_float((vi)code);
        x = PER_CHANNEL ? x * steps[v] + zeros[v] : x * step[t - first] + zero[t - first];
        store(to + v * V, min(max(x, set1(-call.limit)), set1(call.limit)));
      }
      if (columns < BLOCK) std::memcpy(row, padded, columns * sizeof(T));
    }
  }
}

template <class T, int BITS>
void dequantize(const Dequantizing& call) {
  constexpr int N = tokens_of(BITS);
  const int64_t runs = ceil_div(call.length, N);
  static_assert(N <= BLOCK);
#pragma omp parallel for num_threads(call.threads)
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

// Sum in float64, whose rounding no choice depends on but by a rare chance, in whatever order it is taken.
struct Sum {
  vd low = {}, high = {};

  void add(vf x) {
    low += lower_half(x);
    high += upper_half(x);
  }
  double total() const {
    const vd both = low + high;
    double sum = 0;
    for (int i = 0; i < V / 2; i++) sum += both[i];
    return sum;
  }
};

// A vector of channels of `TokenScaledCodec`; lanes beyond the end of a head group are zeros, which count nothing.
struct Channels {
  vf middle, step, last, weight, error_weight;
};

// Squared error of a head group whose token has this scale.
double scaled_error(const Channels* channels, const vf* centred, int64_t count, float scale) {
  Sum sum;
  for (int64_t i = 0; i < count; i++) {
    const Channels& c = channels[i];
    const vf step = c.step * scale, half = c.last * 0.5f, x = centred[i];
    // Levels count from the middle of the range; a constant channel has its middle alone.
    vf nearest = floor(select(step > 0, x / step, vf{}) + (half + 0.5f));
    nearest = min(c.last, max(vf{}, nearest)) - half;
    const vf error = nearest * step - x;
    sum.add(error * error * c.error_weight);
  }
  return sum.total();
}

// Arguments of `alrd_scale_tokens` (quantize.py has the same structure); strides in elements.
struct TokenScaling {
  const void* x;                                                // [n, length, channels]
  uint8_t* codes;                                               // [n, length, groups] bytes of the scales
  float* scaled;                                                // [n, length, channels]
  const float *middle, *step, *levels, *weight, *error_weight;  // [channels]
  const double* energy;                                         // [groups]
  const float* scale_of;                                        // [256] by byte
  const int32_t* offsets;                                       // [coarse + fine] beside the best so far
  const int64_t* table;                                         // [2, groups] as for `Quantizing`
  int64_t n, length, channels, groups, stride_n, stride_t;
  int32_t type, coarse, fine, threads;

  // The byte of a token of a head group: the guess by its size, or one beside it of less error.
  int choose(const Channels* channels, const vf* centred, int64_t count, double energy) const {
    Sum sum;
    for (int64_t i = 0; i < count; i++) sum.add(centred[i] * centred[i] * channels[i].weight);
    const double guess = std::floor(std::log2(std::sqrt(sum.total() / energy)) * 16 + (128 + 0.5));
    int byte = guess != guess ? 0 : std::min(std::max(guess, 0.0), 255.0);
    double best = scaled_error(channels, centred, count, scale_of[byte]);
    for (int i = 0, around = byte; i < coarse + fine; i++) {
      if (i == coarse) around = byte;
      const int tried = std::min(std::max(around + offsets[i], 0), 255);
      if (tried == byte) continue;
      const double error = scaled_error(channels, centred, count, scale_of[tried]);
      if (error < best) {
        byte = tried;
        best = error;
      }
    }
    return byte;
  }
};

// Vectors of channels of all head groups, each group from a vector of its own on.
std::vector<Channels> channels_of(const TokenScaling& call) {
  std::vector<Channels> channels;
  for (int64_t group = 0; group < call.groups; group++) {
    const int64_t first = call.table[group], width = call.table[call.groups + group];
    for (int64_t c = 0; c < width; c += V) {
      const vi valid = lanes_in_order() < (int)(width - c);
      const int lanes = std::min<int64_t>(width - c, V);
      auto read = [&](const float* p) { return select(valid, load(p + first + c, lanes), vf{}); };
      const vf last = read(call.levels) - 1;
      channels.push_back({read(call.middle), read(call.step), last, read(call.weight), read(call.error_weight)});
    }
  }
  return channels;
}

template <class T>
void scale_tokens(const TokenScaling& call) {
  const std::vector<Channels> all = channels_of(call);
#pragma omp parallel num_threads(call.threads)
  {
    std::vector<vf> centred(all.size());
#pragma omp for
    for (int64_t token = 0; token < call.n * call.length; token++) {
      const T* x = (const T*)call.x + token / call.length * call.stride_n + token % call.length * call.stride_t;
      float* scaled = call.scaled + token * call.channels;
      const Channels* channels = all.data();
      for (int64_t group = 0; group < call.groups; group++) {
        const int64_t first = call.table[group], width = call.table[call.groups + group], count = ceil_div(width, V);
        for (int64_t i = 0, c = 0; c < width; i++, c += V) {
          centred[i] = load(x + first + c, std::min<int64_t>(width - c, V)) - channels[i].middle;
          if (width - c < V) centred[i] = select(lanes_in_order() < (int)(width - c), centred[i], vf{});
        }
        const int byte = call.choose(channels, centred.data(), count, call.energy[group]);
        call.codes[token * call.groups + group] = byte;
        const vf scale = set1(call.scale_of[byte]);
        for (int64_t i = 0, c = 0; c < width; i++, c += V)
          store(scaled + first + c, centred[i] / scale + channels[i].middle, std::min<int64_t>(width - c, V));
        channels += count;
      }
    }
  }
}

}  // namespace

// Returns whether every group could be quantized; with static scales, whether all values are finite.
extern "C" int32_t alrd_quantize(const Quantizing* call) {
  return with_type(call->type, call->x, [&](auto* typed) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(typed)>>;
    return with_width(call->grid.bits, [&](auto bits) { return quantize<T, bits>(*call); });
  });
}

extern "C" void alrd_dequantize(const Dequantizing* call) {
  with_type(call->type, call->states, [&](auto* typed) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(typed)>>;
    with_width(call->grid.bits, [&](auto bits) { dequantize<T, bits>(*call); });
  });
}

extern "C" void alrd_scale_tokens(const TokenScaling* call) {
  with_type(call->type, call->x,
            [&](auto* typed) { scale_tokens<std::remove_const_t<std::remove_pointer_t<decltype(typed)>>>(*call); });
}
