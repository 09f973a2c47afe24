// Parts of the latents of a few tokens: products with weights that are read as they are stored (svd_linear.py).

#include "vectors.h"

// latents.py has the same structure.
struct Parts {
  const void *outputs, *weight, *bias;  // [tokens, groups * width]; [rows, width]; [rows]
  float* latents;                       // [tokens, rows], to which the parts are added
  const int32_t* group_of;              // [rows]
  int64_t token_stride;                 // of the outputs
  int32_t tokens, rows, groups, width;
  int32_t output_type, weight_type, threads;
};

extern "C" int alrd_add_latents(const Parts* parts) {
  const Parts& p = *parts;
  const int padded = round_up(p.width, 16);
  Floats outputs((size_t)p.tokens * p.groups * padded);
  for (int t = 0; t < p.tokens; t++)
    for (int g = 0; g < p.groups; g++)
      numbers(p.outputs, t * p.token_stride + (int64_t)g * p.width, p.width, p.output_type,
              &outputs[((size_t)t * p.groups + g) * padded]);
#pragma omp parallel num_threads(p.threads)
  {
    Floats row(padded);
#pragma omp for
    for (int r = 0; r < p.rows; r++) {
      numbers(p.weight, (int64_t)r * p.width, p.width, p.weight_type, row.data());
      const float bias = number(p.bias, r, p.weight_type);
      for (int t = 0; t < p.tokens; t++) {
        const float* x = &outputs[((size_t)t * p.groups + p.group_of[r]) * padded];
        vf total = set1(0);
        for (int c = 0; c < padded; c += 16) total = fma(load(&row[c]), load(x + c), total);
        p.latents[(int64_t)t * p.rows + r] += sum(total) + bias;
      }
    }
  }
  return 0;
}
