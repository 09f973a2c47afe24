// Products of bytes, and of pairs of bfloat16, by the tile registers of AMX, where the processor has them and the
// system lends them.

#pragma once

#include "vectors.h"

#if ALRD_AVX512 && defined(__AMX_INT8__) && defined(__AMX_BF16__)
#define ALRD_TILES 1
#include <sys/syscall.h>
#include <unistd.h>
#else
#define ALRD_TILES 0
#endif

namespace {

constexpr int TILE = 64;  // tokens that are unpacked together

#if ALRD_TILES

// Whether the process may use tiles; Linux wants to be asked (arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA).
inline bool has_tiles() {
  static const bool lent = syscall(SYS_arch_prctl, 0x1023, 18) == 0;
  return lent;
}

// The thread's tiles as 16 rows of 64 bytes each while it lives; then as they were, which others keep account of.
class Tiles {
  struct alignas(64) Config {
    uint8_t palette = 0, first_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  } before;

 public:
  Tiles() {
    if (!has_tiles()) return;
    asm volatile("sttilecfg %0" : "=m"(before));
    Config ours;
    ours.palette = 1;
    for (int i = 0; i < 8; i++) ours.row_bytes[i] = 64, ours.rows[i] = 16;
    load_config(ours);
  }
  ~Tiles() {
    if (!has_tiles()) return;
    if (before.palette)
      load_config(before);
    else
      _tile_release();
  }
  Tiles(const Tiles&) = delete;

 private:
  // With the intrinsics GCC 12 takes a configuration to have eight bytes.
  static void load_config(const Config& config) { asm volatile("ldtilecfg %0" : : "m"(config)); }
};

// Before tiles are loaded: what was stored is in memory. With the intrinsics GCC 12 does not know that they read it.
inline void finish_stores() { asm volatile("" : : : "memory"); }

// The products of 16 rows of signed bytes, in tiles [steps][16][64], with 16 V tokens of codes, [quad][token][4]:
// [16][TILE].
template <int V>
inline void multiply_rows(const int8_t* rows, int steps, const uint8_t* codes, int64_t quad_bytes, int32_t* products) {
  finish_stores();
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int step = 0; step < steps; step++, rows += 1024, codes += 16 * quad_bytes) {
    _tile_loadd(4, rows, 64);
    _tile_loadd(5, codes, quad_bytes);
    _tile_dpbsud(0, 4, 5);
    _tile_loadd(6, codes + 64, quad_bytes);
    _tile_dpbsud(1, 4, 6);
    if (V == 2) continue;
    _tile_loadd(7, codes + 128, quad_bytes);
    _tile_dpbsud(2, 4, 7);
    _tile_loadd(5, codes + 192, quad_bytes);
    _tile_dpbsud(3, 4, 5);
  }
  _tile_stored(0, products, 4 * TILE);
  _tile_stored(1, products + 16, 4 * TILE);
  if (V == 2) return;
  _tile_stored(2, products + 32, 4 * TILE);
  _tile_stored(3, products + 48, 4 * TILE);
}

// Bytes [quad][token][4] of 16 channels and 64 tokens as a tile, [token / 4][channel][4].
inline void turn_codes(const uint8_t* from, int64_t quad_bytes, uint8_t* to) {
  for (int t = 0; t < 64; t += 16) {
    vi x[4];  // lane 4 i + c: channel c of tokens 4 i to 4 i + 3
    each<4>([&](auto q) INLINE { x[q] = transpose_bytes(loadi(from + q * quad_bytes + 4 * t)); });
    const vi a = _mm512_shuffle_i32x4(x[0], x[1], 0x44), b = _mm512_shuffle_i32x4(x[2], x[3], 0x44),
             c = _mm512_shuffle_i32x4(x[0], x[1], 0xEE), d = _mm512_shuffle_i32x4(x[2], x[3], 0xEE);
    storei(to + 16 * t, _mm512_shuffle_i32x4(a, b, 0x88));
    storei(to + 16 * t + 64, _mm512_shuffle_i32x4(a, b, 0xDD));
    storei(to + 16 * t + 128, _mm512_shuffle_i32x4(c, d, 0x88));
    storei(to + 16 * t + 192, _mm512_shuffle_i32x4(c, d, 0xDD));
  }
}

// Rows [16][32], and tokens [16 pairs][tokens], of pairs of bfloat16, to whose products with 16 V tokens a step is
// added.
template <int V>
INLINE inline void add_pairs(const void* rows, int64_t row_bytes, const uint32_t* tokens, int64_t token_bytes) {
  _tile_loadd(4, rows, row_bytes);
  _tile_loadd(5, tokens, token_bytes);
  _tile_loadd(6, tokens + 16, token_bytes);
  _tile_dpbf16ps(0, 4, 5);
  _tile_dpbf16ps(1, 4, 6);
  if (V == 2) return;
  _tile_loadd(5, tokens + 32, token_bytes);
  _tile_loadd(6, tokens + 48, token_bytes);
  _tile_dpbf16ps(2, 4, 5);
  _tile_dpbf16ps(3, 4, 6);
}

// The products of 16 rows of n numbers in bfloat16, `stride` apart, with 16 V tokens of TILE, [pairs][TILE]:
// [16][TILE]. Pairs behind the last number are zeros.
template <int V>
inline void multiply_pairs(const uint16_t* rows, int64_t stride, int n, const uint32_t* tokens, float* products) {
  alignas(64) uint16_t last[16 * 32];
  for (int i = 0; i < 16 && n % 32; i++)
    storei(last + 32 * i, _mm512_maskz_loadu_epi16((1u << n % 32) - 1, rows + i * stride + n / 32 * 32));
  finish_stores();
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int c = 0; c + 32 <= n; c += 32) add_pairs<V>(rows + c, 2 * stride, tokens + c / 2 * TILE, 4 * TILE);
  if (n % 32) add_pairs<V>(last, 64, tokens + n / 32 * 16 * TILE, 4 * TILE);
  _tile_stored(0, products, 4 * TILE);
  _tile_stored(1, products + 16, 4 * TILE);
  if (V == 2) return;
  _tile_stored(2, products + 32, 4 * TILE);
  _tile_stored(3, products + 48, 4 * TILE);
}

// Sums over `steps` times 64 tokens of 16 rows' weights, high and low bytes [16][row_bytes], times turned codes
// [step][16][64]: [16 rows][16 channels] for each of both.
inline void sum_tiles(const uint8_t* high, const uint8_t* low, int row_bytes, const uint8_t* codes, int steps,
                      int32_t* high_sums, int32_t* low_sums) {
  finish_stores();
  _tile_zero(0);
  _tile_zero(1);
  for (int step = 0; step < steps; step++) {
    _tile_loadd(4, high + 64 * step, row_bytes);
    _tile_loadd(5, low + 64 * step, row_bytes);
    _tile_loadd(6, codes + 1024 * step, 64);
    _tile_dpbsud(0, 4, 6);
    _tile_dpbsud(1, 5, 6);
  }
  _tile_stored(0, high_sums, 64);
  _tile_stored(1, low_sums, 64);
}

#else

inline bool has_tiles() { return false; }
struct Tiles {
  Tiles() {}  // not a trivial type, so that an unused one is no warning
};

#endif

}  // namespace
