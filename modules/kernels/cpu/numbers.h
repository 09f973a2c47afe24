// Shared by all kernels: integers, unrolled loops, types of numbers in memory, prefetching.

#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>

#define INLINE __attribute__((always_inline))

namespace {

constexpr float INFINITE = std::numeric_limits<float>::infinity();

// `bits` of ternary codes, five of which share a byte (`width_code` in structures.py).
constexpr int TERNARY = 158;

// Types of numbers in memory (`TYPES` in structures.py).
enum Type : int32_t { FLOAT32, FLOAT16, BFLOAT16 };

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int round_up(int x, int to) { return (x + to - 1) / to * to; }

template <class F, int... I>
INLINE inline void each(F f, std::integer_sequence<int, I...>) {
  (f(std::integral_constant<int, I>{}), ...);
}

// f(0) … f(N - 1), unrolled before the compiler decides what to keep in registers.
template <int N, class F>
INLINE inline void each(F f) {
  each(f, std::make_integer_sequence<int, N>{});
}

// Bits of a code in its low plane; those above are in a second one.
constexpr int low_bits(int bits) { return bits == 3 ? 2 : bits == 5 || bits == 6 ? 4 : bits; }

// `run` with a width of a plane as a constant.
template <class Run>
inline auto with_bits(int bits, Run run) {
  switch (bits) {
    case 1: return run(std::integral_constant<int, 1>());
    case 2: return run(std::integral_constant<int, 2>());
    case 4: return run(std::integral_constant<int, 4>());
    case 8: return run(std::integral_constant<int, 8>());
    default: return run(std::integral_constant<int, TERNARY>());
  }
}

// `run` with a width of codes as a constant.
template <class Run>
inline auto with_width(int bits, Run run) {
  switch (bits) {
    case 3: return run(std::integral_constant<int, 3>());
    case 5: return run(std::integral_constant<int, 5>());
    case 6: return run(std::integral_constant<int, 6>());
    default: return with_bits(bits, run);
  }
}

inline float number(const void* p, int64_t i, int32_t type) {
  if (type == FLOAT32) return ((const float*)p)[i];
  const uint16_t x = ((const uint16_t*)p)[i];
  if (type == FLOAT16) return _cvtsh_ss(x);
  const uint32_t bits = (uint32_t)x << 16;
  float y;
  memcpy(&y, &bits, 4);
  return y;
}

// Start to read the cache lines of `bytes` bytes.
template <_mm_hint HINT>
inline void prefetch(const void* p, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) _mm_prefetch((const char*)p + i, HINT);
}

}  // namespace
