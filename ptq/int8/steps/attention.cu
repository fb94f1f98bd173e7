// Attention of one query a row and head over a cache of codes; `attention.py` has the formula.
//
// One warp serves one (row, head), and reads its keys and values once:
//
//   lane d (32 channels at a time)   norms of q and k, codes of q, k and v, the last two to the cache
//   lane j (32 keys at a time)       the score of key j, by dp4a over the channels; softmax; code of
//                                    its weight, to shared memory
//   lane (group of keys, chunk)      codes of weights times codes of values, four keys a dp4a
//   lane d                           the average, its code, and the sum of the codes
//
// Scores stay in registers, one a lane and round of 32 keys: a row of 257 keys takes nine.
//
// The compiler is given, as macros:
//   CHANNELS      of a head, D, a multiple of 8
//   HEADS         H
//   ROUNDS        of 32 keys, as many as reach the last visible slot
//   HALF_INPUT    q, k and v are bfloat16; otherwise float
//   NUMERATORS    weights are rounded before they are normalised (`numerators.py`), and keys have
//                 parameters by position; otherwise after it (`attention.py`)
//   QUERY_BITS, KEY_BITS, WEIGHT_BITS, VALUE_BITS, OUT_BITS   of the codes
//   EARLY_NEXT    the next kernel may be launched before this one has ended

constexpr int WARPS = 4;  // of a block; each works for itself
constexpr unsigned ALL_LANES = 0xffffffffu;
constexpr float LOG2_E = 1.4426950408889634f;
constexpr float NORM_EPS = 1e-6f;
#define ABSENT __int_as_float(0xff800000)  // minus infinity, the score of keys that are not there

#if HALF_INPUT
typedef unsigned short Input;
__device__ float as_float(Input bits) { return __int_as_float((unsigned)bits << 16); }
#else
typedef float Input;
__device__ float as_float(Input value) { return value; }
#endif

// rows of codes are read in chunks, the widest that their alignment allows
#if CHANNELS % 16 == 0
typedef uint4 Chunk;
#else
typedef uint2 Chunk;
#endif
constexpr int CHUNK_CODES = sizeof(Chunk);
constexpr int CHUNK_WORDS = CHUNK_CODES / 4;
constexpr int CHUNKS = CHANNELS / CHUNK_CODES;        // of a row
constexpr int LANE_CHANNELS = (CHANNELS + 31) / 32;   // channels a lane has at most
constexpr int KEY_GROUPS = 32 / CHUNKS;               // of four keys, that a warp averages at once
// weights are read by fours, up to four a group behind the last key
constexpr int WEIGHT_PLACES = ROUNDS * 32 + 4 * KEY_GROUPS;

__device__ float warp_sum(float value) {
#pragma unroll
  for (int lanes = 16; lanes; lanes /= 2) value += __shfl_xor_sync(ALL_LANES, value, lanes);
  return value;
}

__device__ float2 warp_sum(float2 pair) {
#pragma unroll
  for (int lanes = 16; lanes; lanes /= 2) {
    pair.x += __shfl_xor_sync(ALL_LANES, pair.x, lanes);
    pair.y += __shfl_xor_sync(ALL_LANES, pair.y, lanes);
  }
  return pair;
}

__device__ int warp_sum(int value) {
#pragma unroll
  for (int lanes = 16; lanes; lanes /= 2) value += __shfl_xor_sync(ALL_LANES, value, lanes);
  return value;
}

__device__ float warp_max(float value) {
#pragma unroll
  for (int lanes = 16; lanes; lanes /= 2)
    value = fmaxf(value, __shfl_xor_sync(ALL_LANES, value, lanes));
  return value;
}

// four unsigned bytes times four signed ones, added to `total`
__device__ int dot_unsigned(unsigned weights, unsigned codes, int total) {
  int result;
  asm("dp4a.u32.s32 %0, %1, %2, %3;" : "=r"(result) : "r"(weights), "r"(codes), "r"(total));
  return result;
}

// the signed code of x: round(x / scale) + zero, within what the bits hold
template <int BITS>
__device__ int encode(float x, float scale, float zero) {
  constexpr float half = 1 << (BITS - 1);
  float steps = fminf(fmaxf(x / scale, -half - zero), half - 1.0f - zero);
  return __float2int_rn(steps) + (int)zero;
}

// LayerNorm of a head's channels, spread over the lanes, of queries and keys at once: their sums wait
// for the same shuffles
__device__ void normalize(float (&q)[LANE_CHANNELS], float (&k)[LANE_CHANNELS], int lane,
                          const float* query_gain, const float* query_bias, const float* key_gain,
                          const float* key_bias) {
  float2 mean = {0.0f, 0.0f};
#pragma unroll
  for (int i = 0; i < LANE_CHANNELS; i++) {
    mean.x += q[i];
    mean.y += k[i];
  }
  mean = warp_sum(mean);
  float2 variance = {0.0f, 0.0f};
#pragma unroll
  for (int i = 0; i < LANE_CHANNELS; i++) {
    bool there = lane + 32 * i < CHANNELS;
    q[i] = there ? q[i] - mean.x / CHANNELS : 0.0f;
    k[i] = there ? k[i] - mean.y / CHANNELS : 0.0f;
    variance.x += q[i] * q[i];
    variance.y += k[i] * k[i];
  }
  variance = warp_sum(variance);
  float query_factor = rsqrtf(variance.x / CHANNELS + NORM_EPS);
  float key_factor = rsqrtf(variance.y / CHANNELS + NORM_EPS);
#pragma unroll
  for (int i = 0; i < LANE_CHANNELS; i++) {
    int channel = lane + 32 * i;
    if (channel < CHANNELS) {
      q[i] = q[i] * query_factor * query_gain[channel] + query_bias[channel];
      k[i] = k[i] * key_factor * key_gain[channel] + key_bias[channel];
    }
  }
}

extern "C" __global__ void __launch_bounds__(WARPS * 32) attend_codes(
    const Input* qkv,             // (rows, 3, HEADS, CHANNELS)
    signed char* keys,            // (rows, HEADS, slots, CHANNELS), as values
    signed char* values,
    signed char* out,             // (rows, HEADS, CHANNELS)
    int* out_sums,                // (rows,), added to
    const long long* position_at, // of the query, one for all rows
    const float* query_gain, const float* query_bias, const float* key_gain, const float* key_bias,
    const float* query_params,    // scale and zero point (2, HEADS, query_positions)
    const float* key_params,      // (2, HEADS, key_positions)
    const float* value_params,    // (2, HEADS)
    const float* key_weights,     // (HEADS,), of the first `sinks` keys
    const float* out_params,      // (2 or more, out_positions)
    int query_positions, int key_positions, int out_positions, int sinks, int rows, int slots,
    float weight_scale, float softmax_scale) {
  __shared__ __align__(16) signed char query_codes[WARPS][CHANNELS + 8];
  __shared__ __align__(16) unsigned char weights[WARPS][WEIGHT_PLACES];
  __shared__ __align__(16) int sums[WARPS][KEY_GROUPS][CHANNELS];

  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int row_head = blockIdx.x * WARPS + warp;
  if (row_head >= rows * HEADS) return;
  const int row = row_head / HEADS;
  const int head = row_head % HEADS;
  const int position = (int)*position_at;
  const int length = position + 1;  // keys, with that of this step
  signed char* own_keys = keys + (size_t)row_head * slots * CHANNELS;
  signed char* own_values = values + (size_t)row_head * slots * CHANNELS;

  // the last entry of a table serves all positions from there on
  const float* query_entry = query_params + head * query_positions + min(position, query_positions - 1);
  const float query_scale = query_entry[0];
  const float query_zero = query_entry[HEADS * query_positions];
  const float* key_entries = key_params + head * key_positions;
  const float* key_entry = key_entries + min(position, key_positions - 1);
  const float key_scale = key_entry[0];
  const float key_zero = key_entry[HEADS * key_positions];
  const float value_scale = value_params[head];
  const float value_zero = value_params[HEADS + head];
  const float* out_entry = out_params + min(position, out_positions - 1);
  const float out_scale = out_entry[0];
  const float out_zero = out_entry[out_positions];

  // codes of this step's query, key and value
  float q[LANE_CHANNELS], k[LANE_CHANNELS], v[LANE_CHANNELS];
  const Input* token = qkv + (size_t)row * 3 * HEADS * CHANNELS + head * CHANNELS;
#pragma unroll
  for (int i = 0; i < LANE_CHANNELS; i++) {
    int channel = lane + 32 * i;
    bool there = channel < CHANNELS;
    q[i] = there ? as_float(token[channel]) : 0.0f;
    k[i] = there ? as_float(token[HEADS * CHANNELS + channel]) : 0.0f;
    v[i] = there ? as_float(token[2 * HEADS * CHANNELS + channel]) : 0.0f;
  }
  normalize(q, k, lane, query_gain, query_bias, key_gain, key_bias);
  int query_sum = 0;  // of codes without their zero point
#pragma unroll
  for (int i = 0; i < LANE_CHANNELS; i++) {
    int channel = lane + 32 * i;
    if (channel < CHANNELS) {
      int code = encode<QUERY_BITS>(q[i], query_scale, query_zero);
      query_codes[warp][channel] = code;
      query_sum += code - (int)query_zero;
      size_t place = (size_t)position * CHANNELS + channel;
      own_keys[place] = encode<KEY_BITS>(k[i], key_scale, key_zero);
      own_values[place] = encode<VALUE_BITS>(v[i], value_scale, value_zero);
    }
  }
  query_sum = warp_sum(query_sum);
  __syncwarp();  // from here on the cache holds this step's key and value too

  // scores in base 2, of the keys lane, lane + 32, ...
  const int* query_words = (const int*)query_codes[warp];
  const float query_factor = query_scale * softmax_scale * LOG2_E;
  float scores[ROUNDS];
  float largest = ABSENT;
#pragma unroll
  for (int round = 0; round < ROUNDS; round++) {
    int key = round * 32 + lane;
    scores[round] = ABSENT;
    if (key < length) {
      const Chunk* codes = (const Chunk*)(own_keys + (size_t)key * CHANNELS);
      int product = 0;
      int key_sum = 0;
#pragma unroll
      for (int chunk = 0; chunk < CHUNKS; chunk++) {
        Chunk four_or_two = codes[chunk];
        const int* words = (const int*)&four_or_two;
#pragma unroll
        for (int w = 0; w < CHUNK_WORDS; w++) {
          product = __dp4a(words[w], query_words[chunk * CHUNK_WORDS + w], product);
          key_sum = __dp4a(words[w], 0x01010101, key_sum);
        }
      }
      float scale = key_scale;
      float zero = key_zero;
#if NUMERATORS
      int entry = min(key, key_positions - 1);
      scale = key_entries[entry];
      zero = key_entries[HEADS * key_positions + entry];
#endif
      product -= (int)query_zero * key_sum + (int)zero * query_sum;
      scores[round] = (float)product * (query_factor * scale);
#if NUMERATORS
      if (key < sinks) scores[round] -= log2f(key_weights[head]);
#endif
    }
    largest = fmaxf(largest, scores[round]);
  }
  largest = warp_max(largest);

  // codes 0, 1, ... of the weights
  constexpr float LAST_CODE = (1 << WEIGHT_BITS) - 1;
  float total = 0.0f;
#pragma unroll
  for (int round = 0; round < ROUNDS; round++) {
    scores[round] = exp2f(scores[round] - largest);  // now numerators; 0 behind the last key
    total += scores[round];
  }
#if NUMERATORS
  const float factor = LAST_CODE;
#else
  const float factor = 1.0f / (warp_sum(total) * weight_scale);
#endif
  int weight_sum = 0;
  int sink_sum = 0;
#pragma unroll
  for (int round = 0; round < ROUNDS; round++) {
    int key = round * 32 + lane;
    int code = __float2int_rn(fminf(scores[round] * factor, LAST_CODE));
    weights[warp][key] = code;
    weight_sum += code;
    if (key < sinks) sink_sum += code;
  }
  if (lane < 4 * KEY_GROUPS) weights[warp][ROUNDS * 32 + lane] = 0;
  if (lane + 32 < 4 * KEY_GROUPS) weights[warp][ROUNDS * 32 + 32 + lane] = 0;
  weight_sum = warp_sum(weight_sum);
  __syncwarp();

  // products of weights and values: this lane's four keys, and its chunk of their channels
  const int group = lane / CHUNKS;
  const int chunk = lane % CHUNKS;
  if (group < KEY_GROUPS) {
    __align__(16) int average[CHUNK_CODES] = {};
#pragma unroll 2
    for (int first = 4 * group; first < length; first += 4 * KEY_GROUPS) {
      Chunk codes[4];
#pragma unroll
      for (int j = 0; j < 4; j++) {
        codes[j] = Chunk{};
        if (first + j < length)
          codes[j] = ((const Chunk*)(own_values + (size_t)(first + j) * CHANNELS))[chunk];
      }
      unsigned four_weights = ((const unsigned*)weights[warp])[first / 4];
#pragma unroll
      for (int w = 0; w < CHUNK_WORDS; w++) {
        unsigned a = ((unsigned*)&codes[0])[w];
        unsigned b = ((unsigned*)&codes[1])[w];
        unsigned c = ((unsigned*)&codes[2])[w];
        unsigned d = ((unsigned*)&codes[3])[w];
        // words of four channels of a key become words of four keys of a channel
        unsigned ab_low = __byte_perm(a, b, 0x5140);
        unsigned cd_low = __byte_perm(c, d, 0x5140);
        unsigned ab_high = __byte_perm(a, b, 0x7362);
        unsigned cd_high = __byte_perm(c, d, 0x7362);
        int* four = average + 4 * w;
        four[0] = dot_unsigned(four_weights, __byte_perm(ab_low, cd_low, 0x5410), four[0]);
        four[1] = dot_unsigned(four_weights, __byte_perm(ab_low, cd_low, 0x7632), four[1]);
        four[2] = dot_unsigned(four_weights, __byte_perm(ab_high, cd_high, 0x5410), four[2]);
        four[3] = dot_unsigned(four_weights, __byte_perm(ab_high, cd_high, 0x7632), four[3]);
      }
    }
#pragma unroll
    for (int i = 0; i < CHUNK_CODES; i += 4)
      *(int4*)&sums[warp][group][chunk * CHUNK_CODES + i] = *(int4*)&average[i];
  }
#if EARLY_NEXT
  // not before: the next product's tiles would take the L1 cache that holds keys and values
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
  __syncwarp();

  // codes of the average, for the product that reads them
#if NUMERATORS
  sink_sum = warp_sum(sink_sum);
  float mass = (float)(weight_sum - sink_sum) + (sinks ? key_weights[head] * (float)sink_sum : 0.0f);
  float average_scale = value_scale / mass;
#else
  float average_scale = weight_scale * value_scale;
#endif
  int code_sum = 0;
#pragma unroll
  for (int i = 0; i < LANE_CHANNELS; i++) {
    int channel = lane + 32 * i;
    if (channel < CHANNELS) {
      int exact = -(int)value_zero * weight_sum;
#pragma unroll
      for (int other = 0; other < KEY_GROUPS; other++) exact += sums[warp][other][channel];
      int code = encode<OUT_BITS>((float)exact * average_scale, out_scale, out_zero);
      out[(size_t)row_head * CHANNELS + channel] = code;
      code_sum += code;
    }
  }
  code_sum = warp_sum(code_sum);
  if (lane == 0) atomicAdd(out_sums + row, code_sum);
}
