// Parts of the latents of a few tokens: products with weights that are read as they are stored (svd_linear.py).

#include "vectors.h"

// latents.py has the same structure.
struct Parts {
  const void *outputs, *weight, *bias;  // [tokens, groups * width]; [rows, width]; [rows]
  float* latents;                       // [tokens, rows], to which the parts are added
  const int32_t* group_of;              // [rows]
  int64_t token_stride;                 // of the outputs
  int32_t tokens, rows, groups, width;
  int32_t output_type, weight_type;
};

extern "C" int alrd_add_latents(const Parts* parts, int count, int threads) {
  int longest = 0;
  size_t size = 0;
  for (int i = 0; i < count; i++) {
    longest = std::max(longest, round_up(parts[i].width, 16));
    size += (size_t)parts[i].tokens * parts[i].groups * round_up(parts[i].width, 16);
  }
  Floats outputs(size);
  float* to = outputs.data();
  for (int i = 0; i < count; i++) {
    const Parts& p = parts[i];
    for (int t = 0; t < p.tokens; t++)
      for (int g = 0; g < p.groups; g++, to += round_up(p.width, 16))
        numbers(p.outputs, t * p.token_stride + (int64_t)g * p.width, p.width, p.output_type, to);
  }
#pragma omp parallel num_threads(threads)
  {
    Floats row(longest);
    const float* of_part = outputs.data();
    // A thread has the same rows of each part, so that no two add to one latent.
    for (int i = 0; i < count; i++) {
      const Parts& p = parts[i];
      const int padded = round_up(p.width, 16);
      std::fill(row.begin(), row.end(), 0.f);
#pragma omp for schedule(static) nowait
      for (int r = 0; r < p.rows; r++) {
        numbers(p.weight, (int64_t)r * p.width, p.width, p.weight_type, row.data());
        const float bias = number(p.bias, r, p.weight_type);
        for (int t = 0; t < p.tokens; t++) {
          const float* x = of_part + ((size_t)t * p.groups + p.group_of[r]) * padded;
          vf total = set1(0);
          for (int c = 0; c < padded; c += 16) total = fma(load(&row[c]), load(x + c), total);
          p.latents[(int64_t)t * p.rows + r] += sum(total) + bias;
        }
      }
      of_part += (size_t)p.tokens * p.groups * padded;
    }
  }
  return 0;
}
