// The encoder of modules/trellis.py: codes of least squared error by Viterbi's algorithm, the same bits.
//
// A lane is a token, and a step goes over the 128 windows: 2^(7 - BITS) states, 2^BITS ways into each.

#include <algorithm>
#include <cmath>
#include <vector>

#include "numbers.h"

namespace {

// Tokens side by side.
constexpr int V = 16, WINDOW = 7;
using vf = float __attribute__((vector_size(4 * V)));
using vi = int32_t __attribute__((vector_size(4 * V)));

struct Encoding {
  const float* x;         // [tokens, stride], in units of the points
  const float* points;    // [128]
  uint8_t* codes;         // [tokens, channels]
  const int32_t* widths;  // channels of each chain
  int64_t tokens, channels, stride;
  int32_t chains, bits, threads;
};

// Codes of a chain of `width` channels from `first` on, for the tokens from `token` on; `came` has room for
// [width][states][V].
template <int BITS>
void best_path(const Encoding& call, int64_t token, int64_t first, int width, uint8_t* came) {
  constexpr int branches = 1 << BITS, states = 1 << (WINDOW - BITS);
  const int lanes = std::min<int64_t>(V, call.tokens - token);
  vf cost[states], next[states];
  for (int s = 0; s < states; s++) cost[s] = vf{} + (s ? INFINITY : 0.0f);
  for (int c = 0; c < width; c++) {
    vf x = {};
    for (int i = 0; i < lanes; i++)
      x[i] = std::min(std::max(call.x[(token + i) * call.stride + first + c], -128.0f), 383.0f);
    for (int s = 0; s < states; s++) {
      vf least = vf{} + INFINITY;
      vi from = {};
      for (int b = 0; b < branches; b++) {
        const int window = b * states + s;
        const vf missed = x - call.points[window], reached = cost[window >> BITS] + missed * missed;
        // Of equal costs the first.
        const vi better = reached < least;
        least = better ? reached : least;
        from = better ? vi{} + b : from;
      }
      next[s] = least;
      uint8_t* to = came + ((int64_t)c * states + s) * V;
      for (int i = 0; i < V; i++) to[i] = from[i];
    }
    std::copy(next, next + states, cost);
  }
  for (int i = 0; i < lanes; i++) {
    int state = 0;
    for (int s = 1; s < states; s++)
      if (cost[s][i] < cost[state][i]) state = s;
    for (int c = width - 1; c >= 0; c--) {
      const int window = came[((int64_t)c * states + state) * V + i] * states + state;
      call.codes[(token + i) * call.channels + first + c] = window & (branches - 1);
      state = window >> BITS;
    }
  }
}

template <int BITS>
void encode(const Encoding& call) {
  int widest = 0;
  for (int k = 0; k < call.chains; k++) widest = std::max(widest, call.widths[k]);
#pragma omp parallel num_threads(call.threads)
  {
    std::vector<uint8_t> came((size_t)widest * V << (WINDOW - BITS));
#pragma omp for schedule(static)
    for (int64_t token = 0; token < call.tokens; token += V)
      for (int64_t first = 0, k = 0; k < call.chains; first += call.widths[k++])
        best_path<BITS>(call, token, first, call.widths[k], came.data());
  }
}

}  // namespace

extern "C" void alrd_trellis_encode(const Encoding* call) {
  switch (call->bits) {
    case 1: return encode<1>(*call);
    case 2: return encode<2>(*call);
    case 3: return encode<3>(*call);
    case 4: return encode<4>(*call);
    case 5: return encode<5>(*call);
    case 6: return encode<6>(*call);
  }
}
