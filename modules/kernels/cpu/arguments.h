// The arguments of the attention over latents (attention.cpp).

#pragma once

#include "packed_codes.h"

// attention.py has the same structures.
extern "C" {

// Consecutive channels of a head group in a part, with one scale group if scales are per token (column >= 0).
struct Segment {
  int32_t part, channel, count, column;
  int32_t position;  // where they stand among the columns of the group
};

struct Side {
  const Part* parts;
  const Segment* segments;       // segments multiplied as codes come first
  const int32_t* first_segment;  // [groups + 1]
  const int32_t* integers;       // [groups] segments that are multiplied as codes
  const int32_t* columns;        // [groups] columns in use
  const uint8_t* token_scale;    // [slots][block_length, groups], powers of 2^(1/16) from 128 on; null: 1
  int64_t token_scale_stride;    // from slot to slot
  int32_t groups, width;         // columns of the widest group
  int32_t run;                   // tokens of a block that share scales per channel
  int32_t by_block;              // whether scales per channel belong to blocks
};

struct Arguments {
  const float* query;          // [B, H_q, L, 2 half]
  const int64_t* positions;    // [B, L]
  const double* frequency;     // [half], falling; 0: no rotation
  const int32_t* order;        // [half], the pair of each frequency
  const void *weight, *bias;   // of the expansion, [H_kv * 2 half, weight_stride], [H_kv * 2 half]; may be null
  const int32_t* key_channel;  // [groups, keys.width] channel of the group in a column, -1: none
  const int32_t* table;        // [3, B, blocks]
  const Exact *exact, *plain;  // latents in full precision; tokens beside the latents, keys and values by head
  const int32_t *key_start, *key_count, *value_start, *value_count;  // channels of each head group
  const int32_t* value_channel;  // [groups, values.width] channel of the group in a column, -1: none
  const void *value_weight,
      *value_bias;  // of the values' expansion, [H_kv * head_width, value_stride], [H_kv * head_width]
  float* output;    // [B, H_q, L, head_width], of sums that are not expanded [B, H_q, L, output_width]
  float* log_sum;   // [B, H_q, L]
  int64_t window;   // positions that a query sees at most, its own included
  Side keys, values;
  int32_t batch, query_heads, heads, length, half, blocks, block_length, exact_width, output_width, n_exact;
  int32_t n_plain, head_width;  // channels of a head's value
  int32_t hidden;               // packed tokens at positions below it are not seen
  int32_t state_type, weight_type, weight_stride, value_type, value_stride, planes, threads;
  float scaling, tolerance;
};

}  // extern "C"
